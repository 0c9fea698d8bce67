"""Guards cautious decay: only where update and weight have the same sign, neither zero; one set of bits."""

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, on, results, same
from lucid import engine
from lucid.engine import reference
from options import STORED, assert_levels_agree, on_reference, ran
from patterns import patterns
from stored import ENGINES, stepped

by_format = pytest.mark.parametrize(("dtype", "masters", "state_format"), STORED, ids=str)


def numpy_change(theta, m, w, h):
    """What the contract subtracts from θ, written once more in the arrays' own type."""
    t = theta.dtype.type
    one = {key: t(value) for key, value in h._asdict().items()}
    with np.errstate(all="ignore"):
        update = (one["k"] * m) / (np.sqrt(w) * one["s"] + one["e"])
        decay = np.where(np.sign(update) * np.sign(theta) == 1, one["d"] * theta, t(0))
        return decay + update


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference_is_the_contract(dtype):
    generator = torch.Generator().manual_seed(7)
    theta, g, m, v = (patterns(generator, 20_000, dtype) for _ in range(4))
    h = engine.Scalars.of(1e-3, 0.9, 0.999, 1e-8, 0.1, False, 3.0, cautious_decay=True)
    found, m, v, _ = reference.adamw(h, theta, g, m, v.abs(), None)
    with np.errstate(all="ignore"):
        wanted = theta.numpy() - numpy_change(theta.numpy(), m.numpy(), v.numpy(), h)
    assert same(found, torch.from_numpy(wanted))
    plain = reference.adamw(h._replace(cautious=0.0), theta, g, m, v, None)[0]
    assert not same(found, plain)
    assert found.isfinite().float().mean() > 0.4


TINY = 2.0**-149  # whose product with another underflows, so that no product can tell the signs
CASES = [  # θ and update, and whether the weight decays
    *((sign * 4.0, sign * 2.0, True) for sign in (1.0, -1.0)),
    *((sign * 4.0, sign * -2.0, False) for sign in (1.0, -1.0)),
    *((sign * TINY, sign * TINY, True) for sign in (1.0, -1.0)),
    *((sign * TINY, sign * -TINY, False) for sign in (1.0, -1.0)),
    *((4.0, zero, False) for zero in (0.0, -0.0)),
    *((-4.0, zero, False) for zero in (0.0, -0.0)),
    *((zero, 2.0, False) for zero in (0.0, -0.0)),
]


@pytest.mark.parametrize("name", ENGINES)
def test_where_a_weight_decays(name):
    """With β of 0, ε of 1 and a gradient far below ε, the update is k times the gradient; d is a half."""
    theta, gradient = (torch.tensor(column) for column in list(zip(*CASES, strict=True))[:2])
    gradient = torch.where(gradient.abs() > 1, gradient * 1e-3, gradient)
    options = {"lr": 1.0, "betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.5}
    found = stepped(name, theta, gradient, cautious_decay=True, **options)["param"]
    decays = torch.tensor([decays for *_, decays in CASES])
    update = gradient / (gradient.abs() + 1)
    assert same(found, theta - (torch.where(decays, 0.5 * theta, 0.0) + update))
    assert not same(found, stepped(name, theta, gradient, **options)["param"])


@by_format
def test_every_engine_gives_the_references_bits(dtype, masters, state_format, engine_name):
    options = {"master_weights": masters, "state_format": state_format, "few": True, "cautious_decay": True}
    wanted = on_reference(dtype, 2, **options)
    for observe in (False, True) if engine_name == "cpu" else (True,):
        with on(engine_name):
            assert_same(ran(dtype, 2, observe=observe, **options), wanted)


@pytest.mark.slow
@by_format
def test_levels_threads_and_batches_give_the_references_bits(dtype, masters, state_format):
    options = {"master_weights": masters, "state_format": state_format, "cautious_decay": True}
    assert_levels_agree(dtype, 4, **options)


def test_the_observed_update_has_the_decay_that_was_subtracted(engine_name):
    """Half of the weights decay: the update's root mean square tells."""

    def run(cautious):
        param = Parameter(torch.tensor([1.0, -1.0]).repeat(2000))
        optimizer = optim.AdamW([param], lr=0.5, weight_decay=1.0, cautious_decay=cautious)
        optimizer.observe()
        param.grad = torch.ones_like(param)
        before = param.detach().clone()
        optimizer.step()
        return optimizer.statistics(), (before - param.detach()).double().square().mean().sqrt().item()

    with on(engine_name):
        found, plain = run(True), run(False)
    for statistics, moved in (found, plain):
        assert statistics["group0/update_rms"] == pytest.approx(moved, rel=1e-5)
    assert found[1] != pytest.approx(plain[1], rel=1e-2)


def test_it_is_an_option_of_groups(engine_name):
    params = [Parameter(torch.ones(5)) for _ in range(2)]
    groups = [{"params": params[:1], "cautious_decay": True}, {"params": params[1:]}]
    optimizer = optim.AdamW(groups, lr=0.1, weight_decay=1.0)
    for param in params:
        param.grad = -torch.ones(5)  # the weights grow, so decay does not agree
    with on(engine_name):
        optimizer.step()
    cautious, plain = (row["param"] for row in results(optimizer))
    assert torch.allclose(cautious, torch.full((5,), 1.1))
    assert torch.allclose(plain, torch.full((5,), 1.0))
