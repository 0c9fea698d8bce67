"""Guards `max_grad_norm` as an option: which values it takes, when `grad_norm` is known, copies and checkpoints."""

import copy
import fractions
import math
import pickle

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, on, results, through_a_file
from gradients import SMALL, Mixed, used
from lucid.engine.values import shown


def one_step(optimizer, value=3.0):
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.full_like(param, value)
    optimizer.step()


def single(**options):
    return optim.AdamW([Parameter(torch.ones(1))], **options)


def test_grad_norm_is_that_of_the_last_step_or_none(engine_name):
    optimizer = single()
    assert optimizer.max_grad_norm is None
    assert optimizer.grad_norm is None
    with on(engine_name):
        one_step(optimizer)
        assert optimizer.grad_norm is None
        optimizer.max_grad_norm = 1
        assert (optimizer.max_grad_norm, type(optimizer.max_grad_norm)) == (1.0, float)
        assert optimizer.grad_norm is None
        one_step(optimizer, 3.0)
        optimizer.grad_norm.fill_(99.0)  # it is nobody's but the caller's
        assert optimizer.grad_norm == 3.0
        one_step(optimizer, -5.0)
        assert optimizer.grad_norm == 5.0
        optimizer.zero_grad()
        optimizer.step()
        assert optimizer.grad_norm == 0.0
        optimizer.max_grad_norm = None
        one_step(optimizer)
        assert optimizer.grad_norm is None


@pytest.mark.parametrize("nonfinite", ["skip", "error"])
def test_grad_norm_is_known_where_gradients_are_read_for_another_reason(nonfinite, engine_name):
    optimizer = single(nonfinite=nonfinite)
    with on(engine_name):
        one_step(optimizer, -3.0)
        assert optimizer.grad_norm == 3.0
        optimizer.nonfinite = "propagate"
        one_step(optimizer)
    assert optimizer.grad_norm is None


def test_a_step_that_fails_keeps_the_last_norm():
    optimizer = single(max_grad_norm=1.0)
    one_step(optimizer, 3.0)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        one_step(optimizer, 4.0)
    assert optimizer.grad_norm == 3.0


def test_the_bound_may_change_between_steps(engine_name):
    """And is the optimizer's, not a group's: one norm of all groups together."""
    bounds = [None, 0.5, math.inf, 0.5, 1e-3, None]
    world, twin = Mixed(rows=SMALL), Mixed(rows=SMALL)
    with on(engine_name):
        for bound in bounds:
            norm = world.step(bound)
            twin.set_gradients()
            gradients = [torch.from_numpy(used(param)).double() for param in twin.params if param.grad is not None]
            whole = torch.cat([g.reshape(-1) for g in gradients]).norm().item()
            assert norm is None if bound is None else norm.item() == pytest.approx(whole, rel=1e-13)
            twin.optimizer.max_grad_norm = bound
            twin.optimizer.step()
            twin.optimizer = copy.deepcopy(twin.optimizer)
            twin.params = [param for group in twin.optimizer.param_groups for param in group["params"]]
    assert_same(results(world.optimizer), results(twin.optimizer))


BAD = {
    "0": (0, ValueError),
    "0.0": (0.0, ValueError),
    "negative": (-1.0, ValueError),
    "below all floats": (-(10**400), ValueError),
    "negative infinity": (-math.inf, ValueError),
    "NaN": (math.nan, ValueError),
    "bool": (True, TypeError),
    "str": ("1.0", TypeError),
    "tensor": (torch.tensor(1.0), TypeError),
    "list": ([1.0], TypeError),
    "complex": (1j, TypeError),
}


@pytest.mark.parametrize(("value", "error"), BAD.values(), ids=BAD.keys())
def test_bad_bounds_are_refused(value, error):
    with pytest.raises(error, match=r"max_grad_norm: expected None(, | or )a number.*got ") as caught:
        single(max_grad_norm=value)
    assert shown(value) in str(caught.value)
    optimizer = single(max_grad_norm=2.0)
    with pytest.raises(error, match="max_grad_norm"):
        optimizer.max_grad_norm = value
    assert optimizer.max_grad_norm == 2.0


@pytest.mark.parametrize("value", [1, 0.25, np.float32(0.25), np.int64(3), fractions.Fraction(1, 4), 5e-324, math.inf])
def test_any_number_above_0_is_a_bound(value):
    optimizer = single(max_grad_norm=value)
    assert optimizer.max_grad_norm == float(value)
    one_step(optimizer)
    assert optimizer.grad_norm == 3.0


def test_the_norm_cannot_be_set():
    with pytest.raises(AttributeError):
        single().grad_norm = torch.tensor(1.0)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copies_keep_the_bound(copied):
    optimizer = single(max_grad_norm=0.5)
    one_step(optimizer)
    twin = copied(optimizer)
    assert twin.max_grad_norm == 0.5
    one_step(optimizer)
    one_step(twin)
    assert twin.grad_norm == optimizer.grad_norm == 3.0
    if copied is not copy.copy:  # that shares what it copies
        assert_same(results(twin), results(optimizer))
        twin.max_grad_norm = None
        assert optimizer.max_grad_norm == 0.5


def keys_of(state_dict):
    groups = state_dict["param_groups"]
    return [*state_dict, *(key for group in groups for key in group), *map(sorted, state_dict["state"].values())]


def test_checkpoints_know_nothing_of_it():
    plain, clipping = single(), single(max_grad_norm=0.5, nonfinite="skip")
    for optimizer in (plain, clipping):
        one_step(optimizer)
    assert keys_of(clipping.state_dict()) == keys_of(plain.state_dict())
    assert clipping.state_dict().keys() == {"state", "param_groups"}
    for word in ("norm", "nonfinite", "skip"):
        assert word not in str(clipping.state_dict())
    assert keys_of(clipping.torch_state_dict()) == keys_of(plain.torch_state_dict())
    assert clipping.param_groups[0].keys() == plain.param_groups[0].keys()
    assert clipping.defaults.keys() == plain.defaults.keys()
    plain.load_state_dict(through_a_file(clipping.state_dict()))
    assert (plain.max_grad_norm, plain.nonfinite) == (None, "propagate")
    clipping.load_state_dict(through_a_file(plain.state_dict()))
    assert (clipping.max_grad_norm, clipping.nonfinite) == (0.5, "skip")
    clipping.load_state_dict(torch.optim.AdamW([Parameter(torch.ones(1))]).state_dict())
    assert (clipping.max_grad_norm, clipping.nonfinite) == (0.5, "skip")


@pytest.mark.filterwarnings("ignore:param_groups")
def test_a_group_has_no_bound_of_its_own():
    """Unknown keys are kept and do nothing, as torch's optimizers have it."""
    optimizer = optim.AdamW([{"params": [Parameter(torch.ones(1))], "max_grad_norm": 1e-9}], betas=(0.0, 0.0))
    one_step(optimizer)
    (entry,) = optimizer.state.values()
    assert entry["exp_avg"].item() == 3.0
