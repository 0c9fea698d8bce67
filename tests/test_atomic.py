"""Guards that a step happens whole or not at all.

One thing is wrong with the last parameter of the last group, or an exception comes from the middle of the step.
Afterwards parameters, state, step counts, groups and gradients are what they were, identities and addresses
included, and training goes on as though the step had never been tried. With no state yet, with a warm plan, and
with a plan that no longer reads the state; on both engines.
"""

import contextlib
import functools
import itertools
import math
import random
import signal
import sys

import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import SEALED, World, assert_same, in_child, is_sealed, on, peek, results, snapshot
from lucid import engine
from lucid.engine import reference
from lucid.engine.cuda.device import DevicePlan
from lucid.engine.cuda.launch import Interpreter
from lucid.optim import formats, part

STAGES = {0: "first", 2: "warm", SEALED: "sealed"}


def at(**stages_of):
    """Each engine at its stages."""
    cases = [(name, stage) for name, stages in stages_of.items() for stage in stages]
    return pytest.mark.parametrize(
        ("engine_name", "stage"), cases, ids=[f"{name}-{STAGES[stage]}" for name, stage in cases]
    )


# The plan, which reads the state or trusts it, is that of the CPU engine on the CUDA engine too; and what is checked
# before any engine is asked is alike for all. So these see to it that a refusal leaves no trace in what is the CUDA
# engine's own, of which a step takes long when it is interpreted.
EVERY_STAGE = at(cpu=STAGES, cuda=[2], reference=STAGES)
WITH_STATE = at(cpu=[2, SEALED], cuda=[2], reference=[2, SEALED])
NOT_ON_CUDA = at(cpu=STAGES, reference=STAGES)


def world_at(stage, engine_name, **options):
    world = World(**options).run(stage)
    assert is_sealed(world.optimizer) == (stage == SEALED and engine_name != "reference")
    return world


def check_refusal(stage, engine_name, spoil, error, match="", **options):
    """`spoil` changes a world and returns how to mend it."""
    with on(engine_name):
        wanted = results(World(**options).run(stage + 4).optimizer)
        world = world_at(stage, engine_name, **options)
        world.set_gradients()
        mend = spoil(world)
        for _ in range(2):
            before = snapshot(world.optimizer)
            versions = [param._version for param in world.params]
            with pytest.raises(error, match=match):
                world.optimizer.step()
            assert snapshot(world.optimizer) == before
            assert versions == [param._version for param in world.params]
        mend()
        assert_same(results(world.run(4).optimizer), wanted)


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
    "expanded": (with_data(lambda d: d[:, :1].expand(4, 2, 3)), ValueError, "several elements at one place"),
    "windows": (
        with_data(lambda d: d.as_strided((4, 2, 3), (3, 2, 1))),
        ValueError,
        "several elements at one place",
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
    "expanded": (with_slot("exp_avg", lambda t: torch.zeros(1).expand(t.shape)), ValueError, "memory"),
    "overlapping": (
        with_slot("exp_avg_sq", lambda t: torch.ones(14).as_strided(t.shape, (3, 2, 1))),
        ValueError,
        "memory",
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


# Exceptions from around and inside the step


@NOT_ON_CUDA
@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["closure", "pre-hook"])
def test_what_runs_before_the_step_raises(where, raised, stage, engine_name):
    def interrupt(*_):
        raise raised("stop")

    with on(engine_name):
        wanted = results(World().run(stage + 2).optimizer)
        world = world_at(stage, engine_name)
        world.set_gradients()
        before = snapshot(world.optimizer)
        handle = world.optimizer.register_step_pre_hook(interrupt) if where == "pre-hook" else None
        with pytest.raises(raised):
            world.optimizer.step(None if handle else interrupt)
        if handle:
            handle.remove()
        assert snapshot(world.optimizer) == before
        assert_same(results(world.run(2).optimizer), wanted)


@EVERY_STAGE
def test_a_post_hook_that_raises_comes_after_the_whole_step(stage, engine_name):
    def interrupt(*_):
        raise RuntimeError("stop")

    with on(engine_name):
        wanted = results(World().run(stage + 1).optimizer)
        world = world_at(stage, engine_name)
        world.optimizer.register_step_post_hook(interrupt)
        with pytest.raises(RuntimeError, match="stop"):
            world.step()
        assert_same(results(world.optimizer), wanted)


PLACES = {
    "compute": (reference, "compute"),
    "increment_version": (torch.autograd.graph, "increment_version"),
    "steps": (engine.Plan, "steps"),
    "bind": (engine.Plan, "bind"),
    "gather": (engine.Plan, "gather"),
    "run": (engine.Plan, "run"),
    "write": (engine.Plan, "_write"),
    "scalars": (engine.Scalars, "of"),
    "adopt": (part, "_adopt"),
    "initialising": (part.Part, "_is_initialising"),
    "judged": (part.Part, "_judged"),
    "complete": (formats.StateFormat, "complete"),
    "new slot": (formats.Slot, "new"),
    "new step": (formats, "new_step"),
    "check": (optim.Optimizer, "_format"),
    "hyperparameters": (optim.AdamW, "_hyperparameters"),
    "groups": (optim.Optimizer, "_checked_groups"),
}


ON_DEVICE = {
    **{place: PLACES[place] for place in ("gather", "bind", "steps", "scalars", "increment_version", "run", "write")},
    "prepare": (DevicePlan, "prepare"),
    "upload": (Interpreter, "upload"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("raised", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(
    ("engine_name", "stage", "place"),
    [*itertools.product(["cpu", "reference"], STAGES, PLACES), *itertools.product(["cuda"], [2], ON_DEVICE)],
)
def test_an_exception_at_each_place_inside_the_step(place, raised, when, stage, engine_name, monkeypatch):
    """At the first call and at the last: the last parameter's state, the last group's scalars."""
    owner, name = (PLACES | ON_DEVICE)[place]
    with on(engine_name):
        wanted = results(World().run(stage + 2).optimizer)
        finished = results(World().run(stage + 1).optimizer)
        for stop_at in (1, 4):
            world = world_at(stage, engine_name)
            world.set_gradients()
            before = snapshot(world.optimizer)
            calls = []
            original = getattr(owner, name)

            def stopping(*args, original=original, calls=calls, stop_at=stop_at, **kwargs):
                calls.append(1)
                if len(calls) == stop_at and when == "before":
                    raise raised
                found = original(*args, **kwargs)
                if len(calls) == stop_at:
                    raise raised
                return found

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, staticmethod(stopping) if name == "of" else stopping)
                try:
                    world.optimizer.step()
                except raised:
                    if place in ("run", "write") and when == "after":
                        assert_same(results(world.optimizer), finished)
                        world.done += 1
                    else:
                        assert snapshot(world.optimizer) == before
                else:
                    assert len(calls) < stop_at
                    assert_same(results(world.optimizer), finished)
                    world.done += 1
            assert_same(results(world.run(stage + 2 - world.done).optimizer), wanted)


class Interrupts:
    """Ctrl-C at one of the points at which Python handles signals: calls, and returns from C, of these files.

    But within a kernel, which is Python only where it is interpreted.
    """

    KERNELS = ("cuda/kernels.py", "cuda/formats.py", "cuda/adamw.py")

    def __init__(self, at, files):
        self.left = at
        self.files = files
        self.where = None

    def __call__(self, frame, event, _):
        file = frame.f_code.co_filename
        if event not in ("call", "c_return") or self.files not in file or file.endswith(self.KERNELS):
            return
        self.left -= 1
        if self.left == 0:
            self.where = f"{file.rpartition('/')[2]}:{frame.f_lineno} ({event})"
            sys.setprofile(None)
            signal.getsignal(signal.SIGINT)(signal.SIGINT, frame)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that strikes a dying generator
@at(cpu=STAGES, cuda=[0, 2], reference=STAGES)
def test_an_interrupt_at_every_point_of_the_step(stage, engine_name):
    """Whole or not at all, and the optimizer goes on working, wherever Ctrl-C strikes."""
    shapes = [(3,), (2, 2)]
    with on(engine_name):
        wanted = results(World(shapes=shapes, amsgrad=True).run(stage + 3).optimizer)
        finished = results(World(shapes=shapes, amsgrad=True).run(stage + 1).optimizer)
        wrong = []
        for at in range(1, 2000, 3 if engine_name == "cuda" and stage == 0 else 1):
            world = world_at(stage, engine_name, shapes=shapes, amsgrad=True)
            world.set_gradients()
            before = snapshot(world.optimizer)
            interrupts = Interrupts(at, "lucid/engine" if engine_name == "cuda" else "lucid")
            sys.setprofile(interrupts)
            try:
                world.optimizer.step()
            except KeyboardInterrupt:
                pass
            finally:
                sys.setprofile(None)
            if interrupts.where is None:
                break
            try:
                if snapshot(world.optimizer) != before:
                    assert_same(results(world.optimizer), finished)
                    world.done += 1
                assert_same(results(world.run(stage + 3 - world.done).optimizer), wanted)
            except (AssertionError, RuntimeError) as error:
                wrong.append(f"{interrupts.where}: {str(error)[:100]}")
        assert at > 20
        assert not wrong, "\n".join(dict.fromkeys(wrong))


def test_a_signal_at_any_moment():
    """As Ctrl-C: every parameter has then taken as many steps as every other, and all of each."""
    shapes = [(300_000,), (1000,), (300_000,)]
    delays = random.Random(0)

    def interrupt(*_):
        raise KeyboardInterrupt

    def steps(world, count):
        for _ in range(count):
            world.optimizer.step()

    world, twin = World(shapes=shapes), World(shapes=shapes)
    world.set_gradients()
    twin.set_gradients()
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for strike in range(40):
            if strike == 5:  # until now most had no time for the first step, which makes the state
                steps(world, 1)
            try:
                signal.setitimer(signal.ITIMER_REAL, delays.uniform(2e-4, 4e-3))
                steps(world, 1000)
            except KeyboardInterrupt:
                pass
            if not peek(world.optimizer):
                continue
            (done,) = {int(entry["step"]) for entry in peek(world.optimizer).values()}
            steps(twin, done - twin.done)
            twin.done = done
            assert_same(results(world.optimizer), results(twin.optimizer))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert twin.done > 0


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
