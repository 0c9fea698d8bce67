"""Guards that a step happens whole or not at all: what is wrong is found before the first write.

One thing is wrong with the last parameter of the last group, or its state. Afterwards parameters, state, step counts,
groups and gradients are what they were, identities and addresses included, and training goes on as though the step had
never been tried. With no state yet, with a warm plan, and with a plan that no longer reads the state; on both engines.
Exceptions and signals in the middle of a step are in test_atomic_interrupted.py.
"""

import contextlib
import functools
import math

import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import World, assert_same, in_child, on, peek, results, snapshot
from lucid import engine
from lucid.engine import formats
from stages import EVERY_STAGE, NOT_ON_CUDA, WITH_STATE, check_refusal, world_at

# Gradients and parameters that do not fit


def last(world):
    return world.params[-2]  # (4, 2, 3); the very last has no dimensions


def with_gradient(make):
    def spoil(world):
        param = last(world)
        param.grad_dtype = None
        param.grad = make(param)

        def mend():
            param.grad = None

        return mend

    return spoil


def with_data(make, gradient=None):
    def spoil(world):
        param = last(world)
        data = param.data
        if gradient is not None:
            param.grad = None
        param.data = make(data)
        if gradient is not None:
            param.grad_dtype = None
            param.grad = gradient(param.data)

        def mend():
            param.grad = None
            param.data = data

        return mend

    return spoil


def on_meta(world):
    param = last(world)
    meta = Parameter(torch.empty(param.shape, device="meta"))
    meta.grad = torch.empty(param.shape, device="meta")
    torch.utils.swap_tensors(param, meta)
    return functools.partial(torch.utils.swap_tensors, param, meta)


BAD = {
    "sparse gradient": (with_gradient(lambda p: torch.ones(p.shape).to_sparse()), TypeError, "sparse"),
    "shape": (with_data(lambda d: d.reshape(8, 3)), ValueError, r"has shape \(4, 2, 3\), expected \(8, 3\)"),
    "fewer dimensions": (with_data(lambda d: d.reshape(-1)), ValueError, r"expected \(24,\)"),
    "complex gradient": (
        with_gradient(lambda p: torch.ones(p.shape, dtype=torch.complex64)),
        TypeError,
        "dtype torch.complex64",
    ),
    "integer gradient": (with_gradient(lambda p: torch.ones(p.shape, dtype=torch.int32)), TypeError, "torch.int32"),
    "8-bit gradient": (
        with_gradient(lambda p: torch.ones(p.shape).to(torch.float8_e4m3fn)),
        TypeError,
        "torch.float8_e4m3fn",
    ),
    "float8 parameter": (with_data(lambda d: d.to(torch.float8_e4m3fn)), TypeError, "dtype torch.float8_e4m3fn"),
    "meta": (on_meta, ValueError, "meta"),
    "expanded": (with_data(lambda d: d[:, :1].expand(4, 2, 3)), ValueError, "several elements at the same address"),
    "windows": (
        with_data(lambda d: d.as_strided((4, 2, 3), (3, 2, 1))),
        ValueError,
        "several elements at the same address",
    ),
}


@EVERY_STAGE
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_gradient_or_parameter(kind, stage, engine_name):
    check_refusal(stage, engine_name, *BAD[kind])


def test_messages_name_the_parameter():
    world = World()
    optimizer = optim.AdamW([("head.weight", last(world)), ("head.bias", world.params[0])])
    world.set_gradients()
    last(world).grad = torch.ones(4, 2, 3).to_sparse()
    with pytest.raises(TypeError, match=r"the gradient of parameter 'head\.weight' is sparse"):
        optimizer.step()


@WITH_STATE
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_a_parameter_whose_type_is_no_longer_its_states(dtype, stage, engine_name):
    check_refusal(stage, engine_name, with_data(lambda d: d.to(dtype), torch.ones_like), ValueError, "exp_avg")


@EVERY_STAGE
def test_an_inference_tensor_cannot_half_apply_a_step(stage, engine_name):
    """Updated or refused: torch lets nobody write to it outside inference mode, and says so while writing."""
    with torch.inference_mode():
        frozen = torch.ones(4, 2, 3)
    with on(engine_name):
        world = world_at(stage, engine_name)
        world.set_gradients()
        last(world).grad = None
        last(world).data = frozen
        last(world).grad = torch.ones(4, 2, 3)
        before = snapshot(world.optimizer)
        try:
            world.optimizer.step()
        except (RuntimeError, TypeError, ValueError):
            assert snapshot(world.optimizer) == before
        else:
            assert {int(entry["step"]) for entry in peek(world.optimizer).values()} == {stage + 1}


@pytest.mark.parametrize("how", ["step", "init_state"])
def test_state_made_in_inference_mode_can_be_updated_outside(how, engine_name):
    def run(mode):
        world = World()
        with mode:
            world.step() if how == "step" else world.optimizer.init_state()
        return results(world.run(2).optimizer)

    with on(engine_name):
        assert_same(run(torch.inference_mode()), run(contextlib.nullcontext()))


# Groups


NUMBERS = {
    "nan": (math.nan, ValueError),
    "inf": (math.inf, ValueError),
    "negative": (-1e-3, ValueError),
    "text": ("0.1", TypeError),
    "none": (None, TypeError),
    "flag": (True, TypeError),
    "complex": (1j, TypeError),
    "tensor of two": (torch.ones(2), TypeError),
    "nan tensor": (torch.tensor(math.nan), (ValueError, TypeError)),
}


@NOT_ON_CUDA
@pytest.mark.parametrize("wrong", NUMBERS)
@pytest.mark.parametrize("name", ["lr", "beta1", "beta2", "eps", "weight_decay"])
def test_a_bad_hyperparameter(name, wrong, stage, engine_name):
    value, error = NUMBERS[wrong]

    def spoil(world):
        group = world.optimizer.param_groups[-1]
        right, group[name] = group[name], value
        return lambda: group.update({name: right})

    check_refusal(stage, engine_name, spoil, error, name)


@NOT_ON_CUDA
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("beta1", 1.0, ValueError), ("beta2", 1.5, ValueError), ("amsgrad", 1, TypeError), ("maximize", "no", TypeError)],
)
def test_a_bad_hyperparameter_of_its_own_range(name, value, error, stage, engine_name):
    def spoil(world):
        group = world.optimizer.param_groups[-1]
        right, group[name] = group[name], value
        return lambda: group.update({name: right})

    check_refusal(stage, engine_name, spoil, error, name)


@NOT_ON_CUDA
@pytest.mark.parametrize("name", ["lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize"])
def test_a_missing_hyperparameter(name, stage, engine_name):
    def spoil(world):
        group = world.optimizer.param_groups[-1]
        items = list(group.items())
        del group[name]

        def mend():
            group.clear()
            group.update(items)

        return mend

    check_refusal(stage, engine_name, spoil, ValueError, name)


@NOT_ON_CUDA
@pytest.mark.parametrize("what", ["text", "number", "none"])
def test_what_is_no_parameter(what, stage, engine_name):
    def spoil(world):
        world.optimizer.param_groups[-1]["params"].append({"text": "p", "number": 3.0, "none": None}[what])
        return world.optimizer.param_groups[-1]["params"].pop

    with on(engine_name):
        world = world_at(stage, engine_name)
        world.set_gradients()
        mend = spoil(world)
        kept = [(p, p.detach().clone()) for p in world.params]
        with pytest.raises((TypeError, AttributeError, ValueError)):
            world.optimizer.step()
        assert all(torch.equal(param, before) for param, before in kept)
        mend()
        wanted = results(World().run(stage + 2).optimizer)
        assert_same(results(world.run(2).optimizer), wanted)


# State


def entry_of(world):
    return world.optimizer.state[last(world)]


def with_slot(key, make):
    def spoil(world):
        entry = entry_of(world)
        items = list(entry.items())
        value = make(entry[key])
        if value is None:
            del entry[key]
        else:
            entry[key] = value

        def mend():
            entry.clear()
            entry.update(items)

        return mend

    return spoil


def with_step_count(count):
    def spoil(world):
        step = entry_of(world)["step"]
        right = step.item()
        step.fill_(count)
        return lambda: step.fill_(right)

    return spoil


def without_entry(value):
    def spoil(world):
        entry = entry_of(world)
        world.optimizer.state[last(world)] = value
        return lambda: world.optimizer.state.update({last(world): entry})

    return spoil


BAD_STATE = {
    "missing exp_avg": (with_slot("exp_avg", lambda t: None), ValueError, "exp_avg"),
    "missing exp_avg_sq": (with_slot("exp_avg_sq", lambda t: None), ValueError, "exp_avg_sq"),
    "missing step": (with_slot("step", lambda t: None), ValueError, "step"),
    "shape": (with_slot("exp_avg", lambda t: t.reshape(-1).clone()), ValueError, r"exp_avg.*shape \(24,\)"),
    "one element": (with_slot("exp_avg_sq", lambda t: torch.zeros(())), ValueError, "exp_avg_sq"),
    "float64": (with_slot("exp_avg", lambda t: t.double()), ValueError, "float64"),
    "bfloat16": (with_slot("exp_avg_sq", lambda t: t.bfloat16()), ValueError, "bfloat16"),
    "integers": (with_slot("exp_avg", lambda t: t.int()), ValueError, "int32"),
    "complex": (with_slot("exp_avg", lambda t: t + 0j), ValueError, "complex64"),
    "sparse": (with_slot("exp_avg", lambda t: t.to_sparse()), ValueError, "sparse"),
    "meta": (with_slot("exp_avg", lambda t: t.to("meta")), ValueError, "meta"),
    "a list": (with_slot("exp_avg", lambda t: t.tolist()), ValueError, "expected a tensor"),
    "expanded": (
        with_slot("exp_avg", lambda t: torch.zeros(1).expand(t.shape)),
        ValueError,
        "several elements at the same address",
    ),
    "overlapping": (
        with_slot("exp_avg_sq", lambda t: torch.ones(14).as_strided(t.shape, (3, 2, 1))),
        ValueError,
        "several elements at the same address",
    ),
    "not a dict": (without_entry([1, 2]), TypeError, "expected a dict"),
    "a number": (without_entry(3), TypeError, "expected a dict"),
    "step 2**24": (with_step_count(2.0**24), ValueError, "step"),
    "step -1": (with_step_count(-1.0), ValueError, "step"),
    "step -2": (with_step_count(-2.0), ValueError, "step"),
    "step 1/2": (with_step_count(0.5), ValueError, "step"),
    "step nan": (with_step_count(math.nan), ValueError, "step"),
    "step inf": (with_step_count(math.inf), ValueError, "step"),
    "step of two": (with_slot("step", lambda t: torch.ones(2)), ValueError, "step"),
    "complex step": (with_slot("step", lambda t: t + 0j), ValueError, "step"),
    "step as text": (with_slot("step", lambda t: "3"), ValueError, "step"),
    "step object 1/2": (with_slot("step", lambda t: torch.tensor(0.5)), ValueError, "step"),
}


@WITH_STATE
@pytest.mark.parametrize("kind", BAD_STATE)
def test_bad_state(kind, stage, engine_name):
    check_refusal(stage, engine_name, *BAD_STATE[kind])


@WITH_STATE
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_state_in_the_memory_of_the_parameter(key, stage, engine_name):
    """Three arrays are read and written together; two that are one have no right result."""
    with on(engine_name):
        world = world_at(stage, engine_name)
        world.set_gradients()
        entry_of(world)[key] = last(world).data
        before = snapshot(world.optimizer)
        with pytest.raises(ValueError, match="memory"):
            world.optimizer.step()
        assert snapshot(world.optimizer) == before


@WITH_STATE
def test_moments_that_are_one_tensor(stage, engine_name):
    with on(engine_name):
        world = world_at(stage, engine_name)
        world.set_gradients()
        entry_of(world)["exp_avg"] = entry_of(world)["exp_avg_sq"]
        before = snapshot(world.optimizer)
        with pytest.raises(ValueError, match="memory"):
            world.optimizer.step()
        assert snapshot(world.optimizer) == before


@EVERY_STAGE
def test_step_counts_end_where_float32_counts_no_further(stage, engine_name):
    """The last count is reached, by all or by none, and it does not stick there unseen."""
    with on(engine_name):
        world = world_at(stage, engine_name)
        world.optimizer.init_state()
        entry_of(world)["step"].fill_(formats.MAX_STEP - 2)
        world.step()
        assert entry_of(world)["step"].item() == formats.MAX_STEP - 1 <= 2**24
        world.set_gradients()
        before = snapshot(world.optimizer)
        with pytest.raises(ValueError, match="step"):
            world.optimizer.step()
        assert snapshot(world.optimizer) == before


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_parameter_left_out_after_a_failed_first_step(broken):
    """The failed step must not leave behind addresses of state that was never adopted."""

    def run():
        world = World(shapes=[(1000,)] * 4)
        world.set_gradients()
        if engine.name_for(world.params[0].device) == "cpu":
            world.params[3].grad = world.params[3].grad.to_sparse()
            with pytest.raises(TypeError):
                world.optimizer.step()
        world.set_gradients()
        world.params[broken].grad = None
        world.optimizer.step()
        world.done += 1
        filler = [torch.full((1000,), math.nan) for _ in range(50)]  # takes the memory that was freed
        world.run(3)
        assert all(t.isnan().all() for t in filler)
        return results(world.optimizer)

    def act():
        torch.set_num_threads(1)
        with on("reference"):
            wanted = run()
        assert_same(run(), wanted)

    in_child(act)


# Creating state early


def test_init_state_is_all_or_nothing(engine_name, monkeypatch):
    original = formats.Slot.new
    with on(engine_name):
        for stop_at in range(1, 9):
            world = World()
            before = snapshot(world.optimizer)
            calls = []

            def stopping(*args, calls=calls, stop_at=stop_at, **options):
                calls.append(1)
                if len(calls) == stop_at:
                    raise MemoryError
                return original(*args, **options)

            with monkeypatch.context() as patch:
                patch.setattr(formats.Slot, "new", stopping)
                with pytest.raises(MemoryError):
                    world.optimizer.init_state()
            assert snapshot(world.optimizer) == before
