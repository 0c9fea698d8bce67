"""Guards bfloat16 weights that are stochastically rounded: the same bits on every engine, unbiased, nothing kept.

Naive bfloat16 weights stay where they are if an update is below half of their last place. Here they move by it in the
mean. What is drawn is independent of the draws for the moments.
"""

import itertools
import math

import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, draw, on, same
from lucid import engine
from lucid.engine import codecs
from lucid.engine.shards import WHOLE
from options import FORMATS, NUMBERINGS, assert_continues, assert_levels_agree, draws_for, on_reference, ran
from patterns import LEVELS
from stored import ENGINES, LOWER, assert_stored, delivered, float32, stepped

STOCHASTIC = {"master_weights": "stochastic"}
BF16 = torch.bfloat16
by_format = pytest.mark.parametrize("state_format", FORMATS)


# What is stored


@pytest.mark.parametrize("state_format", ["fp32", "8bit"])
@pytest.mark.parametrize("name", ENGINES)
def test_every_upper_half_is_drawn(name, state_format):
    """All 2^16 upper halves, each with lower halves around its middle, are rounded as the codec rounds them."""
    values = float32((torch.arange(2**16)[:, None] << 16 | torch.tensor(LOWER)).flatten())
    values = values[~values.isinf() & (values != 0)]
    values = values[: len(values) // 96 * 96].view(-1, 96)
    if state_format == "fp32":
        found = delivered(name, values, BF16, seed=3, **STOCHASTIC)
    else:  # a parameter moves by 0 - exp_avg, which a block of equal moments stores exactly
        values = values[:, :1].expand(-1, 96)[values[:, 0].isfinite() & (values[:, 0].abs() > 2.0**-100)].contiguous()
        param = torch.zeros(values.shape, dtype=BF16)
        options = {"lr": 1.0, "betas": (0.0, 0.0), "eps": 2.0**126, "weight_decay": 0.0, "state_format": "8bit"}
        gradient = torch.where(values.abs() < 2.0**30, -values, -values.sign())
        wide = stepped(name, param.float(), gradient, **options)
        found = stepped(name, param, gradient, seed=3, **STOCHASTIC, **options)
        values = wide["param"]
    drawn = draws_for(1, int(found["stream"]), 1, values.shape)
    wanted = codecs.rounded_to_bfloat16(values, drawn)
    assert_stored({"param": found["param"]}, {"param": wanted}, name)


@pytest.mark.parametrize("name", ENGINES)
def test_a_step_draws_for_its_weights_and_its_moments_apart(name):
    """Each with the draws of its own use: the same draws would round an update and its moments to the same side."""
    gradient = draw(0, (64, 100))
    param = draw(1, (64, 100)).to(BF16)
    options = {"lr": 1e-2, "state_format": "bf16", "seed": 4}
    found = stepped(name, param, gradient, **STOCHASTIC, **options)
    wide = stepped(name, param.float(), gradient, lr=1e-2)
    uses = [draws_for(use, int(found["stream"]), 1, (64, 100)) for use in range(3)]
    assert torch.equal(found["param"], codecs.rounded_to_bfloat16(wide["param"], uses[1]))
    assert torch.equal(found["exp_avg"], codecs.rounded_to_bfloat16(wide["exp_avg"], uses[0]))
    for one, other in itertools.combinations(uses, 2):
        together = torch.stack([one.double().flatten(), other.double().flatten()])
        assert torch.corrcoef(together)[0, 1].abs() < 5 / math.sqrt(6400)


def test_nothing_is_kept_beside_a_weight(engine_name):
    param = Parameter(draw(0, (64, 80)).to(BF16))
    optimizer = optim.AdamW([param], state_format="8bit", **STOCHASTIC)
    param.grad = torch.ones_like(param)
    with on(engine_name):
        optimizer.step()
    codes = {"exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale"}
    assert optimizer.state[param].keys() == {"step", "stream"} | codes


def test_a_weight_that_does_not_move_stays(engine_name):
    """Whatever is drawn: every bfloat16 number is its own rounding."""
    every = torch.arange(2**16).to(torch.int16).view(BF16)
    param = Parameter(every[every.isfinite()].clone())
    optimizer = optim.AdamW([param], lr=0.0, weight_decay=0.0, **STOCHASTIC)
    optimizer.init_state()
    param.grad = torch.zeros_like(param)
    with on(engine_name):
        for _ in range(3):
            optimizer.step()
    assert same(param.detach(), every[every.isfinite()])


# Every engine, level, thread count, batch size, layout, shard


@by_format
def test_every_engine_gives_the_references_bits(state_format, engine_name):
    options = STOCHASTIC | {"state_format": state_format, "few": True}
    for gradient in (BF16, torch.float32) if engine_name == "cpu" else (BF16,):
        wanted = on_reference(BF16, 2, gradient_dtype=gradient, **options)
        for observe in (False, True) if engine_name == "cpu" else (False,):
            with on(engine_name):
                assert_same(ran(BF16, 2, gradient_dtype=gradient, observe=observe, **options), wanted)


@pytest.mark.slow
@by_format
def test_levels_threads_and_batches_give_the_references_bits(state_format):
    options = STOCHASTIC | {"state_format": state_format}
    assert_levels_agree(BF16, **options)


@pytest.mark.parametrize("numbering", NUMBERINGS)
@by_format
def test_weights_of_shards(state_format, numbering, engine_name, monkeypatch):
    options = STOCHASTIC | {"state_format": state_format, "few": True}
    options |= {"numbering": numbering, "monkeypatch": monkeypatch}
    wanted = on_reference(BF16, 2, **options)
    with on(engine_name):
        assert_same(ran(BF16, 2, **options), wanted)


@by_format
def test_a_shard_has_the_weights_of_the_whole(state_format, engine_name, monkeypatch):
    start, gradient = draw(0, (64, 150)).to(BF16), draw(1, (64, 150)).to(BF16)

    def run(rows):
        param = Parameter(start[rows].clone())
        optimizer = optim.AdamW([param], lr=1e-3, state_format=state_format, seed=5, **STOCHASTIC)
        numbering = WHOLE._replace(first=(rows.start or 0) * 150)
        with monkeypatch.context() as patch, on(engine_name):
            patch.setattr(engine.shards, "numbering", lambda param, name: numbering)
            for _ in range(2):
                param.grad = gradient[rows].clone()
                optimizer.step()
        return param.detach()

    assert same(run(slice(32, 64)), run(slice(64))[32:])


def test_a_run_continues_with_the_same_draws(engine_name):
    with on(engine_name):
        assert_continues(BF16, state_format="8bit", **STOCHASTIC)


# Unbiased


def moved(steps, lr, weight_decay, gradient, **options):
    """What the mean of 16,384 weights of 1 is after some steps, and torch's naive bfloat16."""
    ours, theirs = (Parameter(torch.ones(128, 128, dtype=BF16)) for _ in range(2))
    optimizers = [
        optim.AdamW([ours], lr=lr, weight_decay=weight_decay, **STOCHASTIC, **options),
        torch.optim.AdamW([theirs], lr=lr, weight_decay=weight_decay, fused=True),
    ]
    for param, optimizer in zip((ours, theirs), optimizers, strict=True):
        for _ in range(steps):
            param.grad = torch.full_like(param, gradient)
            optimizer.step()
    return ours.detach().double(), theirs.detach().double()


@pytest.mark.parametrize("state_format", ["fp32", "8bit"])
def test_updates_far_below_half_a_last_place_accumulate_in_the_mean(state_format):
    """A thousand steps of 1e-5 each, against half a last place of 2e-3 below 1."""
    ours, theirs = moved(1000, 1e-5, 0.0, 1.0, state_format=state_format)
    assert (theirs == 1).all()
    assert ours.std() > 1e-3  # each weight walks in units of its last place
    assert abs(ours.mean() - 0.99) < 6 * ours.std() / 128 + 2e-6


def test_weights_decay_in_the_mean_as_exact_arithmetic_says():
    ours, theirs = moved(1000, 1e-4, 0.1, 0.0)
    assert (theirs == 1).all()
    assert abs(ours.mean() - (1 - 1e-5) ** 1000) < 6 * ours.std() / 128 + 2e-6


def test_one_step_is_unbiased_over_many_streams():
    """The mean over 400 seeds of each weight after one step, against the step in float32."""
    start, gradient = draw(0, (1000,)).to(BF16), draw(1, (1000,))
    exact = stepped("reference", start.float(), gradient, lr=1e-3)["param"].double()
    total = torch.zeros(1000, dtype=torch.float64)
    for seed in range(400):
        total += stepped(LEVELS[-1], start, gradient, lr=1e-3, seed=seed, **STOCHASTIC)["param"].double()
    _, exponent = torch.frexp(exact)
    unit = torch.exp2(exponent.double() - 8)
    error = (total / 400 - exact) / unit
    assert error.abs().max() < 6 * 0.5 / math.sqrt(400)
    assert abs(error.mean()) < 6 * 0.5 / math.sqrt(400 * 1000)
