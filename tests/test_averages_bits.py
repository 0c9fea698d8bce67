"""Guards the average of the weights: the same bits on every engine, and the exact average to 1e-5 after many steps.

The rule in torch operations is held against an independent writing in numpy, with draws in whole numbers; then every
SIMD level, thread count, batch size, layout, state format and shard must give the reference's bits. A plain float32
average stalls where its change is below half of its last place, and one in bfloat16 never moves: ours must not.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lucid.optim as optim
from bits import assert_same, draw, on, results, same
from lucid import engine
from lucid.engine import codecs, reference
from lucid.engine.shards import WHOLE
from offloading import offload_all
from options import NUMBERINGS, STORED, assert_continues, assert_levels_agree, draws_for, on_reference, ran
from patterns import patterns
from stored import DRAWS, ENGINES, float32, stepped

GAMMAS = [0.0, 0.3, 0.4999999999, 0.5, 0.9, 0.9999]
by_format = pytest.mark.parametrize(("dtype", "masters", "state_format"), STORED, ids=str)


# The rule


def numpy_average(a, theta, gamma, drawn):
    """The rule once more, each operation of numpy's in the arrays' own type."""
    t = a.dtype.type
    with np.errstate(all="ignore"):
        if gamma < 0.5:
            return theta + t(gamma) * (a - theta)
        change = t(1 - gamma) * (theta - a)
        if t is np.float32:
            _, exponent = np.frexp(np.where(np.isfinite(a), a, t(1)))
            unit = np.where(abs(a) < np.finfo(t).tiny, t(0), np.ldexp(t(1), exponent - 1))  # not above |a|
            change = change + (drawn.astype(t) - t(32767.5)) * t(2.0**-39) * unit
        return a + change


def scalars(gamma):
    return engine.Scalars.of(1e-3, 0.9, 0.999, 1e-8, 0.1, False, 1.0, ema_decay=gamma)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference_is_the_rule(dtype, gamma):
    generator = torch.Generator().manual_seed(7)
    a, theta = (patterns(generator, 30_000, dtype) for _ in range(2))
    theta = torch.where(torch.rand(30_000, generator=generator) < 0.5, theta, a * 1.01)
    drawn = torch.randint(0, 2**16, a.shape, generator=generator, dtype=torch.int32)
    found = reference.average(scalars(gamma), a, theta, drawn)
    assert same(found, torch.from_numpy(numpy_average(a.numpy(), theta.numpy(), gamma, drawn.numpy())))
    assert found.isfinite().float().mean() > 0.6


def test_a_dither_is_below_half_a_unit_and_has_mean_zero():
    normal = float32([0x00800000, 0x3F800000, 0x3FFFFFFF, 0xC2345678, 0x7F7FFFFF])
    for x in normal:
        found = codecs.dither(x.expand(2**16), DRAWS).double()
        _, exponent = torch.frexp(x.double())
        unit = torch.exp2(exponent.double() - 24)
        assert 0.4999 * unit < found.abs().max() < 0.5 * unit or x.abs() < 1e-30
        assert found.sum() == 0
    assert not codecs.dither(float32([0, 1, 0x007FFFFF]), DRAWS[:3]).any()  # subnormal


@pytest.mark.parametrize("gamma", [0.3, 0.9999])
@pytest.mark.parametrize("name", ENGINES)
def test_an_engines_average_is_the_rule(name, gamma):
    """With the draws of this use, in whole numbers, from the weights as they are stored."""
    shape = (5, 300)
    generator = torch.Generator().manual_seed(3)
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"master_weights": False}), (torch.float64, {})):
        start, a = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for stream, step in ((0, 1), (-(2**63), 2), (123456789, 2**24 - 1)):
            state = {"ema": a.to(wide), "stream": torch.tensor(stream), "step": torch.tensor(step - 1.0)}
            after = stepped(name, start.to(dtype), start, state, lr=1e-3, ema_decay=gamma, **options)
            drawn = draws_for(2, stream, step, shape)
            wanted = numpy_average(a.to(wide).numpy(), after["param"].to(wide).numpy(), gamma, drawn.numpy())
            assert same(after["ema"], torch.from_numpy(wanted)), (dtype, stream)


def test_a_complex_average_is_that_of_two_reals(engine_name):
    def run(real):
        param = draw(0, (7, 45), torch.complex64)
        param = Parameter(torch.view_as_real(param).clone() if real else param)
        optimizer = optim.AdamW([param], lr=0.01, ema_decay=0.9)
        with on(engine_name):
            for step in range(3):
                gradient = draw(1 + step, (7, 45), torch.complex64)
                param.grad = torch.view_as_real(gradient) if real else gradient
                optimizer.step()
        return optimizer.state[param]["ema"]

    assert same(torch.view_as_real(run(real=False)), run(real=True))


# Every engine, level, thread count, batch size, layout, shard


@by_format
def test_every_engine_gives_the_references_averages(dtype, masters, state_format, engine_name):
    options = {"master_weights": masters, "state_format": state_format, "few": True}
    for gamma in (0.3, 0.9999) if engine_name == "cpu" else (0.9999,):
        wanted = on_reference(dtype, 2, ema_decay=gamma, **options)
        with on(engine_name):
            assert_same(ran(dtype, 2, ema_decay=gamma, **options), wanted, f"{gamma}")


@pytest.mark.slow
@by_format
def test_levels_threads_and_batches_give_the_references_averages(dtype, masters, state_format):
    options = {"master_weights": masters, "state_format": state_format, "ema_decay": 0.9}
    assert_levels_agree(dtype, 4, **options)


@by_format
def test_observing_changes_no_average(dtype, masters, state_format, engine_name):
    options = {"master_weights": masters, "state_format": state_format, "ema_decay": 0.999, "few": True}
    with on(engine_name):
        assert_same(ran(dtype, 2, observe=True, **options), on_reference(dtype, 2, **options))


@pytest.mark.parametrize("numbering", NUMBERINGS)
@by_format
def test_averages_of_shards(dtype, masters, state_format, numbering, engine_name, monkeypatch):
    options = {"master_weights": masters, "state_format": state_format, "ema_decay": 0.999, "few": True}
    options |= {"numbering": numbering, "monkeypatch": monkeypatch}
    wanted = on_reference(dtype, 2, **options)
    with on(engine_name):
        assert_same(ran(dtype, 2, **options), wanted)


@by_format
def test_averages_of_state_on_the_host(dtype, masters, state_format, monkeypatch):
    """Whose rows go to the CPU engine in pieces."""
    options = {"master_weights": masters, "state_format": state_format, "ema_decay": 0.999, "few": True}
    wanted = on_reference(dtype, 2, **options)
    log = []
    offload_all(monkeypatch, log)
    assert_same(ran(dtype, 2, **options), wanted)
    assert log


@pytest.mark.parametrize("cut", [1, 8, 31])
@pytest.mark.parametrize("state_format", ["fp32", "bf16", "8bit"])
def test_a_shard_has_the_averages_of_the_whole(state_format, cut, engine_name, monkeypatch):
    options = {"lr": 0.01, "state_format": state_format, "ema_decay": 0.9, "seed": 5}
    start, gradient = draw(0, (64, 150)), draw(1, (64, 150))

    def run(rows):
        param = Parameter(start[rows].clone())
        optimizer = optim.AdamW([param], **options)
        first = (rows.start or 0) * 150
        with monkeypatch.context() as patch, on(engine_name):
            patch.setattr(engine.shards, "numbering", lambda param, name: WHOLE._replace(first=first))
            for _ in range(2):
                param.grad = gradient[rows].clone()
                optimizer.step()
        return optimizer.state[param]["ema"]

    assert same(run(slice(cut, 64)), run(slice(64))[cut:])


def test_parameters_that_share_memory_average_their_own_steps():
    def run():
        data = draw(0, (70, 70))
        params = [Parameter(data), Parameter(data)]
        optimizer = optim.AdamW(params, lr=0.1, ema_decay=0.9)
        for step in range(3):
            for number, param in enumerate(params):
                param.grad = draw(10 * step + number, (70, 70))
            optimizer.step()
        return results(optimizer)

    with on("reference"):
        wanted = run()
    torch.set_num_threads(2)
    with engine.cpu.forced_batch_elements(64):
        assert_same(run(), wanted)
    assert not same(wanted[0]["ema"], wanted[1]["ema"])


@by_format
def test_an_average_changes_nothing_else(dtype, masters, state_format, engine_name):
    options = {"master_weights": masters, "state_format": state_format, "few": True}
    with on(engine_name):
        plain, averaged = (ran(dtype, 2, ema_decay=gamma, **options) for gamma in (None, 0.999))
    for row, other in zip(plain, averaged, strict=True):
        other.pop("ema")
        if "stream" not in row:
            other.pop("stream")
    assert_same(averaged, plain)


# Exact arithmetic


def far_from_average(dtype, **options):
    """A parameter 5 % away from its average."""
    param = Parameter((draw(0, (8192,)).sign() * (0.5 + torch.rand(8192, generator=torch.Generator()))).to(dtype))
    optimizer = optim.AdamW([param], lr=0.0, weight_decay=0.0, ema_decay=0.9999, **options)
    optimizer.init_state()
    param.grad = torch.zeros_like(param)
    start = optimizer.state[param]["ema"].double()
    with torch.no_grad():
        param.mul_(1.05)
    return param, optimizer, start


def relative(found, exact):
    error = found.double() / exact - 1
    return math.sqrt(error.square().mean()), abs(error.mean().item())


STEPS = 50_000


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, {"master_weights": "stochastic"})],
    ids=str,
)
def test_after_many_steps_it_is_within_1e_5_of_exact_arithmetic(dtype, options):
    param, optimizer, start = far_from_average(dtype, **options)
    optimizer.step()  # torch's dummy step counts nothing where there is no state: here there is
    for _ in range(STEPS - 1):
        optimizer.step()
    entry = optimizer.state[param]
    assert entry["step"] == STEPS
    target = param.detach().double()
    exact = target + (start - target) * (1 - 1e-4) ** STEPS
    rms, mean = relative(entry["ema"], exact)
    assert rms < 1e-5
    assert mean < 1e-6


def test_what_this_guards_against():
    """Plain float32 stalls at more than 1e-4; torch's average of bfloat16 weights does not move at all."""
    _, optimizer, start = far_from_average(torch.float32)
    target = optimizer.param_groups[0]["params"][0].detach()
    a, weight = start.float(), 1 - 0.9999
    for _ in range(STEPS):
        a += weight * (target - a)
    exact = target.double() + (start - target.double()) * (1 - 1e-4) ** STEPS
    assert relative(a, exact)[0] > 1e-4

    model = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
    ours = optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, ema_decay=0.9999)
    ours.init_state()
    theirs.update_parameters(model)  # the first copies the weights
    with torch.no_grad():
        model.weight.mul_(1.05)
    before = model.weight / 1.05
    model.weight.grad = torch.zeros_like(model.weight)
    stuck = theirs.module.weight.clone()
    for _ in range(2000):
        theirs.update_parameters(model)
        ours.step()
    assert torch.equal(theirs.module.weight, stuck)
    moved = (ours.state[model.weight]["ema"] - before).abs() / (model.weight - before).abs()
    assert 0.15 < moved.median() < 0.21  # 1 - 0.9999^2000 is 0.18


@pytest.mark.parametrize("name", ENGINES)
def test_every_draw_moves_an_average_by_its_change_in_the_mean(name):
    """A change of a tenth of a unit: no element moves by more than one, and one in ten does."""
    n = 2**16
    a = torch.full((n,), 1.5)
    theta = a + 2.0**-23 * 0.1 / 1e-4  # (theta - a) / 10,000 is a tenth of a unit
    after = stepped(name, theta, torch.zeros(n), {"ema": a}, lr=0.0, weight_decay=0.0, ema_decay=1 - 1e-4)
    moved = (after["ema"].view(torch.int32) - a.view(torch.int32)).double()
    exact = ((theta[0].double() - 1.5) * 1e-4 * 2**23).item()
    assert set(moved.tolist()) == {0.0, 1.0}
    assert abs(moved.mean() - exact) < 6 * math.sqrt(exact / n)


def test_a_run_continues_with_the_same_averages(engine_name):
    with on(engine_name):
        assert_continues(torch.float32, state_format="8bit", ema_decay=0.9)
