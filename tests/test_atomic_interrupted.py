"""Guards that a step happens whole or not at all where an exception, Ctrl-C or a signal comes from its middle.

At every place, and with every plan, parameters, state and counts are those before the step or those after it.
"""

import itertools
import random
import signal

import pytest
import torch

import lucid.optim as optim
from bits import World, assert_same, on, peek, results, snapshot
from interrupting import interrupted
from lucid import engine
from lucid.engine import formats, reference
from lucid.engine.cuda.device import CUDA
from lucid.engine.cuda.launch import Interpreter
from lucid.optim import atomic_step, hyperparameters, new_state
from stages import EVERY_STAGE, NOT_ON_CUDA, STAGES, at, world_at


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
    "run": (engine.Plan, "write"),
    "write": (engine.Plan, "_write"),
    "scalars": (engine.Scalars, "of"),
    "adopt": (new_state.NewState, "adopt"),
    "begun": (atomic_step, "_has_begun"),
    "judged": (atomic_step.AtomicStep, "_judge"),
    "complete": (formats.StateFormat, "complete"),
    "new slot": (formats.Slot, "new"),
    "new step": (formats, "new_step"),
    "check": (hyperparameters, "checked_format"),
    "hyperparameters": (optim.AdamW, "_hyperparameters"),
    "groups": (hyperparameters, "checked_groups"),
}


ON_DEVICE = {
    **{place: PLACES[place] for place in ("gather", "bind", "steps", "scalars", "increment_version", "run", "write")},
    "prepare": (CUDA, "prepare"),
    "exchange": (CUDA, "exchange"),
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


@pytest.mark.slow
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
            where = interrupted(world.optimizer.step, at, "lucid/engine" if engine_name == "cuda" else "lucid")
            if where is None:
                break
            try:
                if snapshot(world.optimizer) != before:
                    assert_same(results(world.optimizer), finished)
                    world.done += 1
                assert_same(results(world.run(stage + 3 - world.done).optimizer), wanted)
            except (AssertionError, RuntimeError) as error:
                wrong.append(f"{where}: {str(error)[:100]}")
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
