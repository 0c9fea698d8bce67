"""Guards that processes which hold parts of a model find one norm, skip the same steps, and wait for nobody."""

import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import lucid.optim as optim
from bits import SEALED, draw, on, peek, same
from sharded import SHAPES, assert_whole, everyone_has, give_gradients, spread_over, whole

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, in torch's own import
    from torch.distributed.optim import ZeroRedundancyOptimizer

NAN, INF = math.nan, math.inf


def pairs(mesh, placements, shapes=SHAPES, **options):
    """An optimizer of spread parameters, and one of whole ones."""
    spread, plain = spread_over(mesh, placements, shapes)
    return optim.AdamW(spread, lr=1e-2, **options), optim.AdamW(plain, lr=1e-2, **options), spread, plain


def one_norm(engine_name):
    world = distributed.get_world_size()
    meshes = [(init_device_mesh("cpu", (world,)), [Shard(0)])]
    if world == 4:
        square = init_device_mesh("cpu", (2, 2))
        meshes += [(square, [Replicate(), Shard(0)]), (square, [Shard(0), Shard(1)]), (square, [Replicate()] * 2)]
    for mesh, placements in meshes:
        shapes = [shape for shape in SHAPES if len(shape) > 1 or len(placements) == 1]
        for bound in (1.0, 1e6, INF):
            ours, theirs, spread, plain = pairs(mesh, placements, shapes, max_grad_norm=bound)
            for step in range(3):
                give_gradients(spread, plain, step)
                with on(engine_name):
                    ours.step()
                theirs.step()
                assert torch.equal(ours.grad_norm, theirs.grad_norm)
                torchs = torch.nn.utils.get_total_norm([param.grad for param in spread])
                assert ours.grad_norm.item() == pytest.approx(whole(torchs).item(), rel=1e-5)
            assert_whole(ours, theirs, f"{placements}")


@pytest.mark.parametrize("engine_name", ["cpu", "reference", "cuda"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_norm_is_of_all_gradients(ranks, world, engine_name):
    ranks.run(world, one_norm, engine_name)


def several_kinds():
    """Some parameters sharded, some only in one dimension of two, some the same everywhere, some plain."""
    square = init_device_mesh("cpu", (2, 2))
    spread, plain = [], []
    for placements in ([Shard(0), Shard(0)], [Replicate(), Shard(0)], [Shard(1), Replicate()], [Replicate()] * 2):
        ours, theirs = spread_over(square, placements, [(33, 20), (4, 6)])
        spread += ours
        plain += theirs
    extra = [torch.nn.Parameter(draw(9, (5, 3))) for _ in range(2)]
    ours = optim.AdamW([*spread, extra[0]], max_grad_norm=2.0, nonfinite="skip")
    theirs = optim.AdamW([*plain, extra[1]], max_grad_norm=2.0)
    for step in range(SEALED):
        give_gradients(spread, plain, step)
        for param in extra:
            param.grad = draw(step, param.shape)
        ours.step()
        theirs.step()
        assert torch.equal(ours.grad_norm, theirs.grad_norm)


def test_parameters_spread_in_different_ways_make_one_norm(ranks):
    ranks.run(4, several_kinds)


def all_skip_together(engine_name, bad):
    """Rank by rank, one has a gradient that nobody can use."""
    world, own = distributed.get_world_size(), distributed.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    for max_norm in (None, INF):
        ours, _, spread, plain = pairs(mesh, [Shard(0)], nonfinite="skip", max_grad_norm=max_norm)
        give_gradients(spread, plain, 0)
        with on(engine_name):
            ours.step()
        for turn in range(world):
            before = [whole(param) for param in spread], [float(peek(ours)[param]["step"]) for param in spread]
            give_gradients(spread, plain, 1 + turn)
            if turn == own:
                spread[0].grad.to_local()[0, 3] = bad  # rank 3 has no row of most others
            with on(engine_name):
                ours.step()
                assert ours.skipped_steps == 1 + turn
                ours.nonfinite = "error"
                name = "parameter 0 of group 0" if turn == own else "another process"
                with pytest.raises(FloatingPointError, match=name):
                    ours.step()
            ours.nonfinite = "skip"
            after = [whole(param) for param in spread], [float(peek(ours)[param]["step"]) for param in spread]
            assert all(map(same, before[0], after[0]))
            assert before[1] == after[1]
        give_gradients(spread, plain, 9)
        with on(engine_name):
            ours.step()
        assert ours.skipped_steps == world
        assert all(float(peek(ours)[param]["step"]) == 2 for param in spread)


@pytest.mark.parametrize("engine_name", ["cpu", "reference", "cuda"])
@pytest.mark.parametrize("bad", [NAN, INF, 1e20])
def test_a_bad_gradient_on_one_rank_is_skipped_or_told_by_all(ranks, bad, engine_name):
    ranks.run(3, all_skip_together, engine_name, bad)


def large_but_right():
    """Sums of squares that make every rank look closer, at gradients that are right."""
    mesh = init_device_mesh("cpu", (2,))
    ours, theirs, spread, plain = pairs(mesh, [Shard(0)], nonfinite="skip")
    give_gradients(spread, plain, 0)
    for param in (spread[0].grad.to_local(), plain[0].grad):
        param[0, 0] = 1.5e19
    plain[0].grad = whole(spread[0].grad)
    ours.step()
    theirs.step()
    assert ours.skipped_steps == 0
    assert_whole(ours, theirs)


def test_a_large_gradient_is_no_bad_one(ranks):
    ranks.run(2, large_but_right)


def found_inf_on_one_rank():
    mesh = init_device_mesh("cpu", (2,))
    for options in ({"nonfinite": "skip"}, {"max_grad_norm": 1.0}):
        ours, _, spread, plain = pairs(mesh, [Shard(0)], **options)
        ours._step_supports_amp_scaling = True
        give_gradients(spread, plain, 0)
        ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.tensor(float(distributed.get_rank()))
        ours.step()
        assert ours.skipped_steps == 1
        del ours.grad_scale, ours.found_inf
        ours.step()
        assert ours.skipped_steps == 1


def test_an_overflow_that_gradscaler_found_on_one_rank_skips_on_all(ranks):
    ranks.run(2, found_inf_on_one_rank)


def one_cannot_step(before):
    """On one rank something has been spoilt: it says what is wrong, the others that someone does."""
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for spoil, kind, said in [
        (lambda optimizer, entry: entry.update(exp_avg=entry["exp_avg"].double()), ValueError, "exp_avg"),
        (lambda optimizer, entry: optimizer.param_groups[0].update(lr=-1.0), ValueError, "lr: expected"),
        (lambda optimizer, entry: optimizer.param_groups.append(3), TypeError, r"param_groups\[1\]"),
    ]:
        ours, theirs, spread, plain = pairs(mesh, [Shard(0)], max_grad_norm=INF)
        for step in range(before):
            give_gradients(spread, plain, step)
            ours.step()
            theirs.step()
        give_gradients(spread, plain, before)
        ours.init_state()
        saved = [dict(entry) for entry in ours.state.values()], list(ours.param_groups), dict(ours.param_groups[0])
        if own == 1:
            spoil(ours, ours.state[spread[0]])
        with pytest.raises(kind, match=said) if own == 1 else pytest.raises(RuntimeError, match="another process"):
            ours.step()
        for entry, right in zip(ours.state.values(), saved[0], strict=True):
            entry.update(right)
        ours.param_groups[:] = saved[1]
        ours.param_groups[0].update(saved[2])
        ours.step()
        theirs.step()
        assert_whole(ours, theirs)


@pytest.mark.parametrize("before", [0, 1, SEALED])
@pytest.mark.parametrize("world", [2, 4])
def test_nobody_waits_for_one_that_cannot_step(ranks, world, before):
    ranks.run(world, one_cannot_step, before)


BROKEN = {  # groups on one rank, from which it cannot read with whom it decides, and whether it exchanges words
    "no lr": lambda groups: groups[0].pop("lr"),
    "no beta1": lambda groups: groups[0].pop("beta1"),
    "bad lr": lambda groups: groups[0].update(lr=-1.0),
    "bad parameter": lambda groups: groups[0]["params"].append(3),
    "no list": lambda groups: groups[0].update(params=None),
    "no params": lambda groups: groups[0].pop("params"),
    "no dict": lambda groups: groups.__setitem__(0, "group"),
}


def broken_groups(name, options, rate):
    mesh = init_device_mesh("cpu", (2,))
    ours, _, spread, plain = pairs(mesh, [Shard(0)], [(6, 5), (3,)], **options)
    for step in range(3):
        give_gradients(spread, plain, step)
        ours.param_groups[0]["lr"] = rate(0.01)
        if step < 2:
            ours.step()
    before = [whole(param) for param in spread]
    if distributed.get_rank() == 1:
        BROKEN[name](ours.param_groups)
        expected = pytest.raises((TypeError, ValueError))
    else:
        expected = pytest.raises(RuntimeError, match="another process")
    with expected:
        ours.step()
    assert all(map(same, before, [whole(param) for param in spread]))


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize(("options", "rate"), [({"max_grad_norm": 1.0}, float), ({}, torch.tensor)], ids=["clip", "lr"])
def test_nobody_waits_for_one_whose_groups_are_broken(ranks, name, options, rate):
    ranks.run(2, broken_groups, name, options, rate)


def others_are_told_before_anything_is_written():
    """What is found wrong only once all rows are known: state that two share, a count that is full, a bad scale."""
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))

    def share(ours, spread):
        ours.state[spread[0]]["exp_avg"] = ours.state[spread[0]]["exp_avg_sq"]
        ours.state[spread[1]]["exp_avg"] = ours.state[spread[2]]["exp_avg"]

    def count(ours, spread):
        ours.state[spread[0]]["step"].fill_(2**24 - 1)

    def scale(ours, spread):
        ours.grad_scale = NAN

    for spoil, said in ((share, "share memory"), (count, "step count"), (scale, "grad_scale")):
        ours, _, spread, plain = pairs(mesh, [Shard(0)], [(6, 5), (6, 5), (6, 5)], max_grad_norm=1.0)
        give_gradients(spread, plain, 0)
        ours.step()
        before = [whole(param) for param in spread]
        if own == 1:
            spoil(ours, spread)
        kind, said = (ValueError, said) if own == 1 else (RuntimeError, "another process")
        with pytest.raises(kind, match=said):
            ours.step()
        assert all(map(same, before, [whole(param) for param in spread]))


def test_what_is_wrong_is_found_before_the_decision(ranks):
    ranks.run(2, others_are_told_before_anything_is_written)


def replicas_that_differ():
    """They should not; where they do, all of them decide alike."""
    own = distributed.get_rank()
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    for mesh, placements, shape in [(flat, [Replicate()], (8, 8)), (square, [Replicate(), Shard(0)], (4, 8))]:
        for options in ({"nonfinite": "skip"}, {"max_grad_norm": 1.0, "nonfinite": "skip"}):
            ours, _, spread, _ = pairs(mesh, placements, [(8, 8)], **options)
            for value, skipped in ((NAN, 1), (2.0, 1)):
                local = torch.ones(shape)
                local[0, 0] = value if own == 3 else 1.0
                spread[0].grad = DTensor.from_local(local, mesh, placements, run_check=False)
                ours.step()
                assert ours.skipped_steps == skipped
                norm = ours.grad_norm.item()
                assert math.isnan(norm) if math.isnan(value) else everyone_has(norm)


def test_replicas_that_differ_decide_alike(ranks):
    ranks.run(4, replicas_that_differ)


def two_meshes():
    """Parameters on one dimension of a mesh beside others on another, and one that is there on a single rank."""
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    one, whole_one = spread_over(mesh["dp"], [Shard(0)], [(9, 5)])
    other, whole_other = spread_over(mesh["tp"], [Shard(0)], [(7, 3)])
    both, whole_both = spread_over(mesh, [Shard(0), Replicate()], [(6, 4)])
    ours = optim.AdamW(one + other + both, max_grad_norm=INF)
    theirs = optim.AdamW(whole_one + whole_other + whole_both, max_grad_norm=INF)
    for step in range(3):
        give_gradients(one + other + both, whole_one + whole_other + whole_both, step)
        ours.step()
        theirs.step()
        assert torch.equal(ours.grad_norm, theirs.grad_norm)
    assert_whole(ours, theirs)
    if own == 2:
        ours.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    ours.step()
    ours.nonfinite = "skip"
    for turn in range(4):
        give_gradients(one + other + both, whole_one + whole_other + whole_both, turn)
        if own == turn:
            (one if turn % 2 else other)[0].grad.to_local().fill_(NAN)
        ours.step()
        assert ours.skipped_steps == 1 + turn


def test_parameters_on_several_meshes(ranks):
    ranks.run(4, two_meshes)


def spread_anew():
    """A parameter that becomes another's twin in place, spread in another way."""
    mesh = init_device_mesh("cpu", (2,))
    ours, theirs, spread, plain = pairs(mesh, [Replicate()], [(8, 8), (9,)], max_grad_norm=1e9)
    for step in range(3):
        for param in spread if step == 1 else ():
            twin = torch.nn.Parameter(param.detach().redistribute(placements=[Shard(0)]))
            param.grad = None
            for key, value in ours.state[param].items():
                if isinstance(value, DTensor):
                    ours.state[param][key] = value.redistribute(placements=[Shard(0)])
            torch.utils.swap_tensors(param, twin)
        give_gradients(spread, plain, step)
        ours.step()
        theirs.step()
        assert torch.equal(ours.grad_norm, theirs.grad_norm)
        assert_whole(ours, theirs)


def test_parameters_that_are_spread_anew(ranks):
    ranks.run(2, spread_anew)


def group_over_meshes():
    mesh, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    for device_mesh, placements in [(mesh, [Shard(0)]), (square, [Replicate(), Shard(0)])]:
        ours, _, spread, plain = pairs(device_mesh, placements, max_grad_norm=1.0, shard_group=distributed.group.WORLD)
        give_gradients(spread, plain, 0)
        with pytest.raises(ValueError, match="remove shard_group"):
            ours.step()
    # Stages of a pipeline, each sharded by itself.
    stage = distributed.get_rank() // 2
    own = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    spread, plain = spread_over(own["dp"], [Shard(0)], [(9, 5), (3,)])
    ours = optim.AdamW([spread[stage]], max_grad_norm=INF, shard_group=own.get_group("pp"))
    theirs = optim.AdamW(plain, max_grad_norm=INF)
    give_gradients(spread, plain, 0)
    ours.step()
    theirs.step()
    assert torch.equal(ours.grad_norm, theirs.grad_norm)
    assert copy.deepcopy(ours)._settings.shard_group is ours._settings.shard_group


def test_a_group_over_stages_and_not_over_meshes(ranks):
    ranks.run(4, group_over_meshes)


def lr_zero_without_gradients():
    """Some rank has no gradient at all, or parts are plain: the first step is still counted by all or by none."""
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    ours, _, spread, plain = pairs(mesh, [Shard(0)], [(8, 3)])
    give_gradients(spread, plain, 0)
    if own == 1:
        spread[0].grad = None
    ours.param_groups[0]["lr"] = 0.0
    ours.step()
    assert [float(entry["step"]) for entry in ours.state.values()] == ([] if own == 1 else [1.0])
    for fill in (0.0, 1.0):
        part = torch.nn.Parameter(torch.ones(3))
        ours = optim.AdamW([part], lr=0.0, shard_group=distributed.group.WORLD)
        part.grad = torch.full((3,), fill if own == 1 else 0.0)
        ours.step()
        assert float(ours.state[part]["step"]) == fill


def test_a_first_step_with_lr_zero_and_missing_gradients(ranks):
    ranks.run(2, lr_zero_without_gradients)


def observed_with_gaps():
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    ours, _, spread, plain = pairs(mesh, [Shard(0)], [(8, 3), (6,)])
    extra = torch.nn.Parameter(torch.ones(3))
    ours.add_param_group({"params": [extra]})
    ours.observe()
    for step, missing in enumerate(([], [0], [0, 1], [1])):
        give_gradients(spread, plain, step)
        for number in missing if own == 1 else ():
            spread[number].grad = None
        extra.grad = torch.ones(3) if own == 0 else None
        ours.step()
        assert (own == 1 and len(missing) == 2) or ours.statistics()


def test_observing_where_gradients_are_missing(ranks):
    ranks.run(2, observed_with_gaps)


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"nonfinite": "skip"}, {"state_format": "8bit"}])
def test_another_default_device(options):
    """Steps make no tensor where the user's default device is."""
    params = [torch.nn.Parameter(draw(0, (64, 70)))]
    optimizer = optim.AdamW(params, **options)
    optimizer.observe()
    params[0].grad = draw(1, (64, 70))
    with torch.device("meta"):
        optimizer.step()
        optimizer.statistics()
    assert float(optimizer.state[params[0]]["step"]) == 1


def first_step_with_lr_zero():
    """Zero gradients on one rank only: whether the step counts is one decision."""
    world, own = distributed.get_world_size(), distributed.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    for zero_on in ({0}, {world - 1}, set(range(world))):
        ours, _, spread, plain = pairs(mesh, [Shard(0)])
        ours.param_groups[0]["lr"] = 0.0
        give_gradients(spread, plain, 0)
        if own in zero_on:
            for param in spread:
                param.grad.to_local().zero_()
        ours.step()
        counts = {float(entry["step"]) for entry in ours.state.values()}
        assert counts == ({0.0} if len(zero_on) == world else {1.0})


@pytest.mark.parametrize("world", [2, 3])
def test_all_count_a_first_step_or_none_does(ranks, world):
    ranks.run(world, first_step_with_lr_zero)


def statistics_alike(engine_name):
    for world_mesh, placements in [
        (init_device_mesh("cpu", (4,)), [Shard(0)]),
        (init_device_mesh("cpu", (2, 2)), [Replicate(), Shard(0)]),
    ]:
        spread, plain = spread_over(world_mesh, placements, SHAPES)
        ours, theirs = (
            optim.AdamW([(str(i), param) for i, param in enumerate(params)], lr=1e-2) for params in (spread, plain)
        )
        for optimizer in (ours, theirs):
            optimizer.observe()
        for step in range(2):
            give_gradients(spread, plain, step)
            with on(engine_name):
                ours.step()
                theirs.step()
        found = ours.statistics()
        assert everyone_has(found)
        assert found == pytest.approx(theirs.statistics(), rel=1e-6)


@pytest.mark.parametrize("engine_name", ["cpu", "reference"])
def test_statistics_are_of_whole_parameters(ranks, engine_name):
    ranks.run(4, statistics_alike, engine_name)


# Plain parameters, of which each process has its own


def make_net():
    torch.manual_seed(1)
    sizes = [40, 70, 90, 3]
    return torch.nn.Sequential(*(torch.nn.Linear(*size) for size in pairwise(sizes)))


def batch(step, rank):
    return draw(100 * step + rank, (8, 40))


def zero_redundancy(layers):
    own, world = distributed.get_rank(), distributed.get_world_size()
    net, twin = make_net()[:layers], make_net()[:layers]
    replica = DistributedDataParallel(net)
    options = {"lr": 1e-2, "max_grad_norm": 0.1, "nonfinite": "skip"}
    sharded = ZeroRedundancyOptimizer(net.parameters(), optim.AdamW, shard_group=distributed.group.WORLD, **options)
    plain = optim.AdamW(twin.parameters(), **options)
    for step in range(5):
        sharded.zero_grad()
        replica(batch(step, own)).square().mean().backward()
        if step == 2:
            net[0].weight.grad[0, 0] = NAN
        for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
            theirs.grad = ours.grad.clone()
        sharded.step()
        plain.step()
        norm = sharded.optim.grad_norm.item()
        assert math.isnan(norm) if step == 2 else norm == plain.grad_norm.item()
        assert sharded.optim.skipped_steps == plain.skipped_steps
        for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
            assert same(ours, theirs)
        assert everyone_has([param.detach().numpy().tobytes() for param in net.parameters()])
    assert plain.skipped_steps == 1
    held = sum(bool(entry) for entry in sharded.optim.state.values())
    every = [None] * world
    distributed.all_gather_object(every, held)
    assert sum(every) == len(list(net.parameters()))


@pytest.mark.parametrize("layers", [3, 1])
@pytest.mark.parametrize("world", [2, 3])
def test_zero_redundancy_optimizer(ranks, world, layers):
    ranks.run(world, zero_redundancy, layers)  # one layer on three ranks: one of them has no parameter


def first_fsdp(state_format):
    own = distributed.get_rank()
    net = make_net()
    wrapped = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = optim.AdamW(
        wrapped.parameters(),
        lr=1e-2,
        max_grad_norm=0.1,
        nonfinite="skip",
        shard_group=distributed.group.WORLD,
        state_format=state_format,
    )
    for step in range(4):
        optimizer.zero_grad()
        wrapped(batch(step, own)).square().mean().backward()
        torchs = wrapped.clip_grad_norm_(INF).item()
        if step == 2 and own == 0:
            next(p for p in wrapped.parameters() if p.grad is not None and p.grad.numel()).grad.view(-1)[0] = NAN
        optimizer.step()
        norm = optimizer.grad_norm.item()
        assert math.isnan(norm) if step == 2 else norm == pytest.approx(torchs, rel=1e-5)
        assert optimizer.skipped_steps == (step >= 2)


@pytest.mark.parametrize("state_format", ["fp32", "bf16"])
def test_the_first_fsdp(ranks, state_format):
    ranks.run(2, first_fsdp, state_format)


def test_what_is_no_group_is_refused():
    for value in ("world", -100, object()):
        with pytest.raises(TypeError, match="shard_group: expected None or a"):
            optim.AdamW([torch.nn.Parameter(torch.ones(2))], shard_group=value)
