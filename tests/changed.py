"""A run in which something is changed, beside the same on the reference engine, which keeps nothing between steps."""

import contextlib
from unittest import mock

import pytest

from bits import SEALED, World, assert_same, is_sealed, on, results
from lucid import engine

MOMENTS = [1, 3, SEALED, SEALED + 20]


def both(change, warm, before=None, after=3, effect=True, **options):
    """Run on each engine: `before`, `warm` steps, `change`, more steps. Compare after each of those."""

    def run(name, change):
        reads = mock.patch.object(engine, "hold", return_value=False)  # what groups hold, at each step
        with on(name), reads if name == "reference" else contextlib.nullcontext():
            world = World(**options)
            held = before(world) if before else None
            world.run(warm)
            if name == "cpu" and before is None and warm >= SEALED:
                assert is_sealed(world.optimizer)
            with contextlib.ExitStack() as stack:
                kept = change(world) if before is None else change(world, held)
                if isinstance(kept, contextlib.AbstractContextManager):
                    stack.enter_context(kept)
                found = [results(world.run(1).optimizer) for _ in range(after)]
            del kept, held
            return found

    wanted = run("reference", change)
    found = run("cpu", change)
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert_same(ours, theirs, f"step {step + 1} after the change")
    if effect:  # else the test could not fail
        unchanged = run("reference", (lambda world: None) if before is None else (lambda world, held: None))
        with pytest.raises(AssertionError):
            assert_same(wanted[-1], unchanged[-1])


AT_ANY_MOMENT = pytest.mark.parametrize("warm", MOMENTS)


# Parameters


def entry(world, index=0):
    return world.optimizer.state[world.params[index]]


# Groups


def loaded(world):
    other = World().run(5)
    world.optimizer.load_state_dict(other.optimizer.state_dict())
