"""Optimizers at the stages at which a step may fail: without state, warm, with a plan that trusts its state."""

import pytest

from bits import SEALED, World, assert_same, is_sealed, on, results, snapshot

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
