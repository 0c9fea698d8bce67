"""Guards state on the host of sharded parameters, updated where it lies: bits, in backward, from and to checkpoints.

Interpreted kernels stand for the GPUs of 2 to 4 processes, ordinary pages for pinned memory (pinning.py).
"""

import types

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

import lucid.optim as optim
import resumed
from bits import assert_same, on, peek, same
from fsdp import Net, adamw, sharded, shards, train
from launchers import device_plan
from lucid.engine import pinned
from lucid.engine import shards as engine_shards
from lucid.optim import overlap
from lucid.optim.checkpoint import load_optimizer
from pinning import lies_in, pretend_pinned
from sharded import KINDS, SHAPES, assert_whole, give_gradients, spread_over
from test_device_ranks import layouts

HOW = [{}, {"max_grad_norm": 0.5}, {"nonfinite": "skip", "max_grad_norm": 0.5}]
FITS = {"tensor parallel": [(130, 256), (4, 512)]}  # blocks of 128 that no process shares


def all_pinned(optimizer):
    return all(lies_in(pinned.arena, entry) for entry in peek(optimizer).values())


# The bits of a step


def in_every_format(layout):
    for number, (name, (dtype, options)) in enumerate(KINDS.items()):
        how = HOW[number % len(HOW)]
        with pytest.MonkeyPatch.context() as patch:
            pretend_pinned(patch)
            ours, theirs = [], []
            for mesh, placements in layouts(distributed.get_world_size())[layout]:
                spread, plain = spread_over(mesh, placements, FITS.get(layout, SHAPES[:-2]), dtype)
                ours, theirs = ours + spread, theirs + plain
            host = optim.AdamW(ours, 0.01, state_device="cpu", **options, **how)
            twin = optim.AdamW(theirs, 0.01, **options, **how)
            for step in range(3):
                give_gradients(ours, theirs, step)
                if step == 2 and "nonfinite" in how:
                    theirs[0].grad[0] = torch.nan  # on one process
                    ours[0].grad = distribute_tensor(theirs[0].grad, ours[0].device_mesh, ours[0].placements)
                twin.step()
                with on("cuda"):
                    host.step()
            assert host.skipped_steps == twin.skipped_steps == ("nonfinite" in how)
            assert_whole(host, twin, f"{layout}, {name}, {how}")
            assert all_pinned(host)
            if how:
                assert same(host.grad_norm.cpu(), twin.grad_norm.cpu())


@pytest.mark.parametrize(
    ("world", "layout"), [(2, "fsdp"), (3, "fsdp"), (4, "hsdp"), (2, "tensor parallel"), (4, "several meshes")]
)
def test_shards_of_any_size(ranks, world, layout):
    """Of uneven and empty ones too."""
    ranks.run(world, in_every_format, layout)


def on_the_device():
    ((mesh, placements),) = layouts(distributed.get_world_size())["fsdp"]
    ours, theirs = spread_over(mesh, placements, [(2, 3), (1, 70)], torch.float32)
    optimizer = optim.AdamW(ours)
    give_gradients(ours, theirs, 0)
    with on("cuda"):
        optimizer.step()
        assert not device_plan(optimizer)._writes_host


def test_an_empty_shard_is_no_state_on_the_host(ranks):
    """Else steps would record events, and who reads the state would wait for kernels that write elsewhere."""
    ranks.run(3, on_the_device)


# In backward under FSDP2


def in_backward():
    for dtype, options in KINDS.values():
        with pytest.MonkeyPatch.context() as patch, on("cuda"):
            pretend_pinned(patch)
            patch.setattr(overlap, "streams_for", None)  # FSDP2's hooks run on a stream of its own
            runs = []
            for more in ({}, {"state_device": "cpu"}):
                net = sharded(Net(dtype))
                optimizer = adamw(net, **options, **more)
                if more:
                    optimizer.step_in_backward(model=net)
                train(net, optimizer, stop=3)
                runs.append(shards(optimizer))
            assert all_pinned(optimizer)
            assert_same(*runs, f"{dtype} {options}")


@pytest.mark.parametrize("world", [2, 3])
def test_in_backward(ranks, world):
    ranks.run(world, in_backward)


# Checkpoints

PLACES = {"host": {"state_device": "cpu"}, "device": {}}


def save(folder):
    for name, (dtype, options) in KINDS.items():
        for place, more in PLACES.items():
            with pytest.MonkeyPatch.context() as patch, on("cuda"):
                pretend_pinned(patch)
                net = resumed.sharded(dtype)
                optimizer = resumed.make(net, options | more)
                resumed.train(net, optimizer, range(3))
                state = {"optimizer": get_optimizer_state_dict(net, optimizer), "model": net.state_dict()}
                dcp.save(state, checkpoint_id=folder / f"{name} {place}")
    distributed.barrier()


def load(folder):
    """State saved here and loaded there, by torch's way and by ours, and trained on."""
    for name, (dtype, options) in KINDS.items():
        wanted = resumed.uninterrupted(name, 5)
        for place in PLACES:
            for to, more in PLACES.items():
                for by_torch in (False, True):
                    with pytest.MonkeyPatch.context() as patch, on("cuda"):
                        pretend_pinned(patch)
                        net = resumed.sharded(dtype)
                        optimizer = resumed.make(net, options | more)
                        path = folder / f"{name} {place}"
                        dcp.load({"model": net.state_dict()}, checkpoint_id=path)
                        if by_torch:
                            state = {"optimizer": get_optimizer_state_dict(net, optimizer)}
                            dcp.load(state, checkpoint_id=path)
                            set_optimizer_state_dict(net, optimizer, state["optimizer"])
                        else:
                            load_optimizer(net, optimizer, path)
                        assert all_pinned(optimizer) or to == "device"
                        resumed.train(net, optimizer, range(3, 5))
                        assert_whole(optimizer, wanted, f"{name}, {place} to {to}, by torch: {by_torch}")


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), [(2, 2), (2, 3), (3, 2)])
def test_checkpoints_from_and_to(ranks, tmp_path, one, other):
    ranks.run(one, save, tmp_path)
    ranks.run(other, load, tmp_path)


def test_processes_exchange_state_on_their_mesh():
    """State on the host of a mesh of GPUs: there the backend knows no memory of the host."""
    asked = []
    moved = types.SimpleNamespace(full_tensor=lambda: "whole")
    mesh = types.SimpleNamespace(device_type="cuda")
    value = types.SimpleNamespace(
        device_mesh=mesh, device=torch.device("cpu"), to=lambda kind: asked.append(kind) or moved
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_shards, "is_sharded", lambda tensor: tensor is value)
        patch.setattr(engine_shards, "local", lambda tensor: tensor)
        assert engine_shards.whole(value) == "whole"
    assert asked == ["cuda"]


def rooms():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, empty

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for shape in [(7, 3), (1, 4), (0, 2), (5,)]:
        for placement in (Shard(0), Replicate()):
            param = distribute_tensor(torch.ones(shape), mesh, [placement])
            found = engine_shards.empty(param, shape, torch.bfloat16, [placement], "cpu")
            wanted = empty(shape, dtype=torch.bfloat16, device_mesh=mesh, placements=[placement])
            assert isinstance(found, DTensor)
            assert found._spec == wanted._spec
            assert found.to_local().shape == wanted.to_local().shape


def test_room_to_load_into(ranks):
    ranks.run(3, rooms)
