"""Guards that processes find the norm of the whole model to the bit, however its gradients are spread over them.

Gradients are of very different sizes, so that a sum in float64 would show each difference in order. Each clipped step
is that of one process, state included. And what goes between processes is one all-reduce a mesh dimension.
"""

import math

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import lucid.optim as optim
from bits import draw, on
from lucid.engine import exact_sum
from lucid.engine.exact_sum import TOTAL_WORDS, WORDS, Count
from lucid.optim.agreement import Agreement, Finding
from sharded import KINDS, assert_whole, spread_over, whole

SHAPES = [(33, 200), (3, 2000), (1, 5000), (6, 8, 100), (130, 7), (2, 3)]
VECTORS = [(11,), (2,), (1,)]


def give_gradients(spread, plain, step, dtype):
    for number, (ours, theirs) in enumerate(zip(spread, plain, strict=True)):
        size = 10.0 ** (3 * ((number + step) % 4) - 4)
        theirs.grad = (draw(1000 * step + number, theirs.shape) * size).to(dtype)
        ours.grad = distribute_tensor(theirs.grad, ours.device_mesh, ours.placements)


def clipped(kind, engine_name):
    dtype, options = KINDS[kind]
    world = distributed.get_world_size()
    flat = init_device_mesh("cpu", (world,))
    cases = [(flat, [Shard(0)], SHAPES + VECTORS), (flat, [Shard(1)], SHAPES), (flat, [Replicate()], SHAPES)]
    if world == 4:
        square = init_device_mesh("cpu", (2, 2))
        cases += [
            (square, [Replicate(), Shard(0)], SHAPES + VECTORS),
            (square, [Shard(0), Shard(1)], SHAPES),
            (square, [Shard(1), Replicate()], SHAPES),
        ]
    if "8bit" in kind:  # codes need rows of dimension 0
        cases = [case for case in cases if Shard(1) not in case[1]]
    for mesh, placements, shapes in cases:
        spread, plain = spread_over(mesh, placements, shapes, dtype)
        ours = optim.AdamW(spread, max_grad_norm=0.3, **options)
        theirs = optim.AdamW(plain, max_grad_norm=0.3, **options)
        for step in range(2):
            give_gradients(spread, plain, step, dtype)
            with on(engine_name):
                ours.step()
            theirs.step()
            assert torch.equal(ours.grad_norm, theirs.grad_norm), placements
        assert_whole(ours, theirs, f"{placements}")


@pytest.mark.parametrize("kind", ["fp32", "8bit", "8bit of bfloat16"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_clipped_step_has_the_bits_of_one_process(ranks, world, kind):
    ranks.run(world, clipped, kind, "cpu")


def test_so_it_has_on_the_reference_engine(ranks):
    ranks.run(4, clipped, "fp32", "reference")


def flat_parts():
    """Each process has a plain parameter of its own: a part of one that was cut anywhere."""
    own, world = distributed.get_rank(), distributed.get_world_size()
    values, gradient = draw(0, (5003,)), draw(1, (5003,)) * 10.0 ** draw(2, (5003,))
    whole_one = torch.nn.Parameter(values.clone())
    whole_one.grad = gradient
    theirs = optim.AdamW([whole_one], max_grad_norm=0.1)
    theirs.step()
    for cuts in ([1, 2, 3], [1000, 1001, 5003], [777, 2048, 4999]):
        bounds = [0, *cuts[: world - 1], 5003]
        part = slice(bounds[own], bounds[own + 1])
        param = torch.nn.Parameter(values[part].clone())
        param.grad = gradient[part].clone()
        ours = optim.AdamW([param], max_grad_norm=0.1, shard_group=distributed.group.WORLD)
        ours.step()
        assert torch.equal(ours.grad_norm, theirs.grad_norm)
        assert torch.equal(param.detach(), whole_one.detach()[part])


@pytest.mark.parametrize("world", [2, 4])
def test_flat_parts_of_one_parameter(ranks, world):
    ranks.run(world, flat_parts)


def wide_range():
    """Sums beyond a float64, subnormals, and squares 2⁻²⁰⁰⁰ of others."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    cases = [(torch.float64, (1.3e154, 1e-160)), (torch.float64, (1e-300, 5e-324)), (torch.float32, (1e-44, 1e18))]
    for dtype, sizes in cases:
        gradient = draw(0, (9, 700), dtype).sign()
        gradient *= torch.tensor(sizes, dtype=dtype)[(torch.arange(6300).view(9, 700) % 3 == 0).long()]
        [ours_param], [theirs_param] = spread_over(mesh, [Shard(0)], [(9, 700)], dtype)
        theirs_param.grad = gradient
        ours_param.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        ours, theirs = (optim.AdamW([p], max_grad_norm=1.0, nonfinite="error") for p in (ours_param, theirs_param))
        ours.step()
        theirs.step()
        assert torch.equal(ours.grad_norm, theirs.grad_norm)
        assert 0 < ours.grad_norm.item() < math.inf or sizes[0] == 1e-300
        assert_whole(ours, theirs)


@pytest.mark.parametrize("world", [1, 3])
def test_gradients_of_the_whole_range(ranks, world):
    ranks.run(world, wide_range)


def replicas_are_counted_once():
    """If replicas differ, the first counts, and the findings of all."""
    own = distributed.get_rank()
    square = init_device_mesh("cpu", (2, 2))
    params, _ = spread_over(square, [Replicate(), Shard(0)], [(4, 4)])
    agreement = Agreement(params, None)
    words = exact_sum.blank(None)
    words[3], words[Count.LARGE] = 10 ** (own + 1), int(own == 3)
    total = agreement.total(words)
    assert total[3] == 10 + 100
    assert total[Count.LARGE] > 0
    assert sum(total[:WORDS]) == 110


def test_replicas_are_counted_once(ranks):
    ranks.run(4, replicas_are_counted_once)


def kinds_and_meshes():
    """Words of several kinds, near what a word may hold. Replicas on other meshes differ: all take the largest."""
    own = distributed.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    one, _ = spread_over(mesh["dp"], [Shard(0)], [(4, 4)])
    other, _ = spread_over(mesh["tp"], [Shard(0)], [(4, 4)])
    plain = [torch.nn.Parameter(torch.ones(3))]
    agreement = Agreement([*plain, *one, *other], None)
    assert agreement.kinds.tolist() == [0, 1, 2]
    words = torch.zeros(3, TOTAL_WORDS, dtype=torch.int64)
    words[0, :WORDS], words[1, :WORDS], words[2, :WORDS] = 5, 2**40 - 1 if own % 2 else 3, 7
    words[own % 3, Count.NAN] = int(own == 2)
    total = agreement.exchange(words.flatten()).tolist()
    assert total[:WORDS] == [5 + 2 * (2**40 - 1) + 2 * 7] * WORDS
    assert total[Count.NAN] > 0
    assert total[Count.INFINITE] == 0
    for finding in Finding:
        assert agreement.worst(finding if own == 3 else Finding.NOTHING) is finding


def test_several_kinds_and_meshes(ranks):
    ranks.run(4, kinds_and_meshes)


def exchanged():
    """How many all-reduces and bytes a clipped step of one process needs, whatever the number of parameters."""
    calls = []
    own = distributed.all_reduce

    def all_reduce(tensor, *args, **keywords):
        calls.append(tensor.nbytes)
        return own(tensor, *args, **keywords)

    for sizes, placements in (((4,), [Shard(0)]), ((2, 2), [Replicate(), Shard(0)])):
        mesh = init_device_mesh("cpu", sizes)
        spread, plain = spread_over(mesh, placements, SHAPES)
        optimizer = optim.AdamW(spread, max_grad_norm=1.0, nonfinite="skip")
        give_gradients(spread, plain, 0, torch.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "all_reduce", all_reduce)
            patch.setattr(distributed, "all_gather", None)
            optimizer.step()
        assert calls == [8 * TOTAL_WORDS] * len(placements)
        calls.clear()
        assert all(whole(param).isfinite().all() for param in spread)


def test_a_step_exchanges_words_once_a_mesh_dimension(ranks):
    ranks.run(4, exchanged)
