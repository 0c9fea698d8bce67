"""Guards that statistics of spread parameters are the same on every process, and that nobody waits for another.

Whichever processes have gradients, skip, or cannot step; over one mesh, replicas, several meshes, and empty shards.
"""

import math

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import lucid.optim as optim
from bits import SEALED, draw, on
from sharded import everyone_has, give_gradients, spread_over

SHAPES = [(9, 5), (6, 40), (7,), (2, 3)]  # the last two have no row on some of four ranks


def named(params, **options):
    optimizer = optim.AdamW([(f"p{number}", param) for number, param in enumerate(params)], lr=1e-2, **options)
    optimizer.observe()
    return optimizer


def own_part(optimizer):
    """The step of an optimizer of what this process holds of each parameter, as whole tensors, with no one else."""
    twins = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            twins[param] = torch.nn.Parameter(param.to_local().detach().clone())
    alone = named(twins.values())
    for param, twin in twins.items():
        alone.state[twin] = {
            key: value.to_local().clone() if hasattr(value, "to_local") else value.clone()
            for key, value in optimizer.state.get(param, {}).items()
        }
        twin.grad = None if param.grad is None else param.grad.to_local().clone()
    alone.step()
    return {
        number: tuple(alone._stepper.observations.seen.get(twin, ())) for number, twin in enumerate(twins.values())
    }, twins


def expected(optimizer, mesh, placements):
    """What all ranks are to tell after the next step: from their own parts, added up, each counted once."""
    seen, twins = own_part(optimizer)
    steps = [float(optimizer.state.get(param, {}).get("step", 0.0)) for param in twins]
    place = tuple(
        None if placement.is_replicate() else coordinate
        for placement, coordinate in zip(placements, mesh.get_coordinate(), strict=True)
    )
    mine = {
        number: (place, values, twin.numel(), step + 1)
        for (number, values), twin, step in zip(seen.items(), twins.values(), steps, strict=True)
        if values
    }
    every = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, mine)
    numbers, squares, largest = {}, 0.0, 0.0
    for number in range(len(twins)):
        parts, step = {}, 0.0
        for told in every:
            if number in told:
                place, values, elements, count = told[number]
                values = (*values, elements)  # of replicas that have not taken the same steps, the largest
                parts[place] = tuple(map(max, parts.get(place, values), values))
                step = max(step, count)
        if not parts:
            continue
        gradient, update, param, ratio, elements = zip(*parts.values(), strict=True)
        n = sum(elements)
        rms = [math.sqrt(sum(values) / n) if n else 0.0 for values in (update, param)]
        squares, largest = squares + sum(gradient), max(largest, step)
        measures = {
            "grad_norm": math.sqrt(sum(gradient)),
            "update_rms": rms[0],
            "param_rms": rms[1],
            "update_ratio": rms[0] / rms[1] if rms[1] else 0.0,
            "max_m_over_sqrt_v": max(ratio),
            "step": step,
        }
        numbers |= {f"p{number}/{key}": value for key, value in measures.items()}
    return numbers | {"grad_norm": math.sqrt(squares), "group0/step": largest}


GAPS = [  # who has no gradient of which parameters
    {},
    {1: [0]},
    {0: [0, 2], 1: [1]},
    {1: [0, 1, 2, 3]},
    {0: [0, 1, 2, 3]},
    {0: [3], 1: [3], 2: [3], 3: [3]},
    {0: [0, 1, 2, 3], 1: [0, 1, 2], 2: [0, 1], 3: [0, 1]},
]


def gaps_over(shape, placements, engine_name):
    """Gradients that some processes do not have."""
    mesh, own = init_device_mesh("cpu", shape), distributed.get_rank()
    spread, plain = spread_over(mesh, placements, SHAPES)
    ours = named(spread)
    for step, missing in enumerate(GAPS):
        give_gradients(spread, plain, step)
        for number in missing.get(own, ()):
            spread[number].grad = None
        with on(engine_name):
            wanted = expected(ours, mesh, placements)
            ours.step()
        found = ours.statistics()
        assert everyone_has(found), (step, found)
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-6), step
        # And no more of parameters that nobody has updated.
        assert {key.split("/")[0] for key in found if key[0] == "p"} == {
            key.split("/")[0] for key in wanted if key[0] == "p"
        }


@pytest.mark.parametrize("engine_name", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((2,), [Shard(0)]),
        ((4,), [Shard(0)]),
        ((2,), [Replicate()]),
        ((2, 2), [Replicate(), Shard(0)]),
        ((2, 2), [Shard(0), Replicate()]),
        ((2, 2), [Shard(0), Shard(0)]),
    ],
    ids=str,
)
def test_all_tell_the_same_where_some_have_no_gradient(ranks, shape, placements, engine_name):
    ranks.run(math.prod(shape), gaps_over, shape, placements, engine_name)


def over_a_long_time():
    """Longer than the plan looks at the state of others, with a gradient that is missing on the same rank for long."""
    mesh, own = init_device_mesh("cpu", (2,)), distributed.get_rank()
    spread, plain = spread_over(mesh, [Shard(0)], SHAPES)
    ours = named(spread)
    for step in range(3 * SEALED):
        give_gradients(spread, plain, step)
        if own == 1 and SEALED <= step < 2 * SEALED:
            for param in spread[step % 2 :]:
                param.grad = None
        ours.step()
        found = ours.statistics()
        assert everyone_has(found)
        assert found["group0/step"] == step + 1  # of the rank that has taken most


def test_step_counts_are_those_of_the_process_that_has_taken_most(ranks):
    ranks.run(2, over_a_long_time)


def several_meshes(missing_on):
    """Each dimension of a mesh has parameters of its own, both have some, and one parameter is plain."""
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    spread, plain = [], []
    for device_mesh, placements in [
        (mesh["dp"], [Shard(0)]),
        (mesh["tp"], [Shard(0)]),
        (mesh, [Shard(0), Replicate()]),
        (mesh, [Shard(0), Shard(0)]),
    ]:
        ours, theirs = spread_over(device_mesh, placements, [(9, 5), (3, 4)])
        spread += ours
        plain += theirs
    extra = torch.nn.Parameter(torch.ones(3))
    optimizer = named([*spread, extra])
    numbers = range(len(spread))
    for step in range(4):
        # Of every parameter on one rank; of one on all of them in turn; of a different one on each.
        gone = [numbers if own == missing_on else [], [step], [own, own + 4], [7] if own < 2 else []][step]
        give_gradients(spread, plain, step)
        for number in gone:
            spread[number].grad = None
        extra.grad = torch.ones(3)
        optimizer.step()
        found = optimizer.statistics()
        assert everyone_has(found), step
        told = {key.split("/")[0] for key in found if key[0] == "p"}
        assert told == {f"p{number}" for number in range(9)} - ({"p1"} if step == 1 else set())


@pytest.mark.parametrize("missing_on", range(4))
def test_over_several_meshes(ranks, missing_on):
    ranks.run(4, several_meshes, missing_on)


def stages():
    """Meshes that some processes share and others do not: each tells what those of its meshes know."""
    own = distributed.get_rank()
    # Names of their own: torch keeps what it knows of a mesh for an equal one of a later test, whose groups are others.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "part"))
    shared, whole_shared = spread_over(mesh["stage"], [Replicate()], [(4, 3)])
    spread, plain = spread_over(mesh["part"], [Shard(0)], [(9, 5), (6, 2), (3,)])
    here = slice(0, 1) if own < 2 else slice(1, 3)
    optimizer = named(shared + spread[here])
    for step in range(3):
        give_gradients(shared + spread, whole_shared + plain, step)
        for param in spread if own == 1 and step else ():
            param.grad = None
        optimizer.step()
        found = optimizer.statistics()
        every = [None] * 4
        distributed.all_gather_object(every, found)
        assert every[0] == every[1]
        assert every[2] == every[3]
        assert all(told["p0/step"] == step + 1 for told in every)
        assert "p1/step" in found


def test_stages_with_parameters_of_their_own(ranks):
    ranks.run(4, stages)


def skipped_together(options):
    """Steps that all leave out keep the numbers; what is skipped is counted, on all alike."""
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    spread, plain = spread_over(mesh, [Shard(0)], [(9, 5), (6, 4)])
    ours = named(spread, **options)
    give_gradients(spread, plain, 0)
    if own == 1:
        spread[0].grad = spread[1].grad = None
    ours.step()
    before = ours.statistics()
    assert everyone_has(before)
    for turn in range(2):
        give_gradients(spread, plain, turn)
        spread[turn].grad = None
        if "nonfinite" not in options:
            ours.found_inf = torch.tensor(1.0)
        elif own == turn:
            spread[1 - turn].grad.to_local()[0, 0] = math.nan
        ours.step()
        found = ours.statistics()
        assert found == before | {key: 1 + turn for key in before if key.endswith("skipped_steps")}
        assert everyone_has(found)
        vars(ours).pop("found_inf", None)
    give_gradients(spread, plain, 5)
    ours.step()
    assert everyone_has(ours.statistics())
    assert ours.statistics()["p1/skipped_steps"] == 2


@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"nonfinite": "skip", "max_grad_norm": 1.0}, {}], ids=str)
def test_skipped_steps(ranks, options):
    ranks.run(2, skipped_together, options)


def skipped_alone():
    """One process is told to leave steps out that the others take: nobody waits, and all count alike."""
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    spread, plain = spread_over(mesh, [Shard(0)], [(9, 5)])
    ours = named(spread)
    for step in range(4):
        give_gradients(spread, plain, step)
        if own == 1 and step in (1, 2):
            ours.found_inf = torch.tensor(1.0)
        ours.step()
        vars(ours).pop("found_inf", None)
        found = ours.statistics()
        assert everyone_has(found)
        assert found["skipped_steps"] == found["p0/skipped_steps"] == found["group0/skipped_steps"] == min(step, 2)
        assert found["p0/step"] == step + 1
    ours.nonfinite = "skip"
    give_gradients(spread, plain, 0)
    spread[0].grad.to_local().fill_(math.inf)
    ours.step()
    assert ours.statistics()["skipped_steps"] == 3
    assert everyone_has(ours.statistics())


def test_a_step_that_one_process_alone_leaves_out(ranks):
    ranks.run(2, skipped_alone)


def one_cannot_step(warm):
    """Nobody judges gradients, so that the others step; they do not wait for the one that cannot."""
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    spread, plain = spread_over(mesh, [Shard(0)], SHAPES)
    ours = named(spread)
    for step in range(warm):
        give_gradients(spread, plain, step)
        ours.step()
    new = torch.nn.Parameter(torch.ones(2, 3))  # which the one that cannot step has not planned with yet
    new_spread, new_plain = spread_over(mesh, [Shard(0)], [tuple(new.shape)])
    ours.add_param_group({"params": [("new", new_spread[0])]})
    give_gradients(spread + new_spread, plain + new_plain, warm)
    kept = ours.param_groups[0]["weight_decay"]
    if own == 1:
        before = ours.statistics() if warm else None
        ours.param_groups[0]["weight_decay"] = -1.0
        with pytest.raises(ValueError, match="weight_decay"):
            ours.step()
        if warm:
            assert ours.statistics() == before
        ours.param_groups[0]["weight_decay"] = kept
    else:
        ours.step()
        assert ours.statistics()["p0/step"] == warm + 1
        assert "new/step" in ours.statistics()
    give_gradients(spread + new_spread, plain + new_plain, warm + 1)
    ours.step()
    assert everyone_has(ours.statistics())
    assert ours.statistics()["p0/step"] == warm + 2


@pytest.mark.parametrize("warm", [0, 1, SEALED])
@pytest.mark.parametrize("world", [2, 4])
def test_nobody_waits_for_one_that_cannot_step(ranks, world, warm):
    ranks.run(world, one_cannot_step, warm)


def one_fails_late():
    """What fails after the checks, as memory may."""
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    spread, plain = spread_over(mesh, [Shard(0)], [(9, 5)])
    ours = named(spread, max_grad_norm=1.0)
    give_gradients(spread, plain, 0)
    ours.step()
    plan, right = ours._stepper.whole.plan, type(ours._stepper.whole.plan).write

    def fail(*args, **options):
        raise MemoryError("no more")

    give_gradients(spread, plain, 1)
    if own == 1:
        type(plan).write = fail
    try:
        if own == 1:
            with pytest.raises(MemoryError, match="no more"):
                ours.step()
        else:
            ours.step()
    finally:
        type(plan).write = right
    give_gradients(spread, plain, 2)
    ours.step()
    assert everyone_has(ours.statistics())


def test_nobody_waits_for_one_that_fails_while_it_writes(ranks):
    ranks.run(2, one_fails_late)


def first_step_of_nothing():
    """Nobody has a gradient: there is nothing to tell, and what was told before stays."""
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    spread, plain = spread_over(mesh, [Shard(0)], [(9, 5)])
    ours = named(spread)
    ours.step()
    with pytest.raises(RuntimeError, match="no step has been observed"):
        ours.statistics()
    give_gradients(spread, plain, 0)
    if own == 0:
        spread[0].grad = None
    ours.step()  # the first step of one, while the other has no state
    found = ours.statistics()
    assert everyone_has(found)
    assert (spread[0] in ours.state) == (own == 1)
    spread[0].grad = None
    ours.step()
    assert ours.statistics() == found


def test_where_nobody_has_a_gradient(ranks):
    ranks.run(2, first_step_of_nothing)


def parts_of_a_group():
    """Plain parts are told of by the process that has them; the norm is of all of them."""
    own = distributed.get_rank()
    param = torch.nn.Parameter(draw(own, (5, 3)))
    ours = named([param], max_grad_norm=math.inf, shard_group=distributed.group.WORLD)
    for step in range(3):
        param.grad = None if own == 1 and step == 1 else torch.full((5, 3), 1.0 + own)
        ours.step()
        assert ours.grad_norm.item() ** 2 == pytest.approx(15.0 if step == 1 else 15.0 + 60.0)
    assert ours.statistics()["grad_norm"] == pytest.approx(math.sqrt(15.0) * (1 + own))
    assert ours.statistics()["p0/step"] == 3 - own


def test_parts_of_a_shard_group_are_told_of_by_their_process(ranks):
    ranks.run(2, parts_of_a_group)


def a_checkpoint_tools_step():
    """A step of zero gradients, by which torch's tools create state, is no step and is not told of."""
    mesh = init_device_mesh("cpu", (2,))
    spread, plain = spread_over(mesh, [Shard(0)], [(9, 5)])
    ours = named(spread)
    give_gradients(spread, plain, 0)
    spread[0].grad.to_local().zero_()
    ours.param_groups[0]["lr"] = 0.0
    ours.step()
    with pytest.raises(RuntimeError, match="no step has been observed"):
        ours.statistics()


def test_a_step_that_creates_state_is_not_told_of(ranks):
    ranks.run(2, a_checkpoint_tools_step)
