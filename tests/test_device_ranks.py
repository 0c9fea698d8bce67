"""Guards steps that the devices of several processes decide together: no host reads a device, and all bits are right.

Interpreted kernels stand for the devices. The memory of a device is protected while a step runs (guarded.py), but for
its kernels, torch's operations on it, and the exchange between processes, which runs on the device too.
"""

import contextlib
import math

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import _disable_current_modes

import lucid.optim as optim
from bits import draw, on, same
from guarded import Forbidden, Guarded, OnDevice
from lucid.engine import only
from lucid.engine.cuda import device_tables, launch
from sharded import assert_whole, give_gradients, spread_over
from test_exact_norm_ranks import clipped

NAN, INF = math.nan, math.inf
SHAPES = [(33, 200), (1, 500), (6, 8, 10), (2, 3)]  # fewer rows than processes: some have none
OPTIONS = {
    "clipped": {"max_grad_norm": 0.5},
    "skip": {"nonfinite": "skip"},
    "scaled": {"scaled": True, "max_grad_norm": INF},
    "lr": {"rate": True},
    "all": {"max_grad_norm": 0.5, "nonfinite": "skip", "scaled": True, "rate": True},
}


def moved(tensor, memory):
    """The same numbers in a device's memory."""
    if not isinstance(tensor, DTensor):
        return memory.tensor(tensor.detach())
    local = memory.tensor(tensor.detach().to_local())
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def move_state(optimizer, memory):
    """Move the state; return the addresses of what stays in the host's memory."""
    hosts = set()
    for entry in optimizer.state.values():
        for key, value in entry.items():
            if key in ("step", "stream"):
                hosts.add(value.data_ptr())
            else:
                entry[key] = moved(value, memory)
    return hosts


@contextlib.contextmanager
def guarded(memory, hosts):
    """No code of the host may read the memory inside, but processes exchange what is in it."""
    own, exchanges = distributed.all_reduce, []

    def all_reduce(words, *args, **kwargs):
        exchanges.append(words.numel())
        with memory.allowed(), _disable_current_modes():
            own(words, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, OnDevice(memory, hosts), memory.forbidden():
        patch.setattr(distributed, "all_reduce", all_reduce)
        yield exchanges


@contextlib.contextmanager
def device(made):
    """`made` stands for the first GPU."""
    device_tables._powers.cache_clear()
    launch._launchers[1, 0] = made
    try:
        yield made
    finally:
        del launch._launchers[1, 0]
        device_tables._powers.cache_clear()


def set_inputs(optimizer, step, options, place):
    """GradScaler's values, of which one process alone finds an overflow, and a learning rate; `place` moves them."""
    if options.get("scaled"):
        overflow = step == 3 and distributed.get_rank() == distributed.get_world_size() - 1
        optimizer.grad_scale = place(torch.tensor(2.0 ** (4 - step)))
        optimizer.found_inf = place(torch.tensor(float(overflow)))
    if options.get("rate"):
        optimizer.param_groups[0]["lr"] = place(torch.tensor(0.01 * (step + 1)))


def layouts(world):
    flat = init_device_mesh("cpu", (world,))
    found = {"fsdp": [(flat, [Shard(0)])], "tensor parallel": [(flat, [Shard(1)])]}
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        found["hsdp"] = [(square, [Replicate(), Shard(0)])]
        found["several meshes"] = [(square["dp"], [Shard(0)]), (square["tp"], [Shard(0)]), (square, [Shard(0)] * 2)]
    return found


def decided_on_devices(layout, kind):
    options = OPTIONS[kind]
    given = {key: value for key, value in options.items() if key in ("max_grad_norm", "nonfinite")}
    memory = Forbidden()
    ours, theirs, plain = [], [], []
    for number, (mesh, placements) in enumerate(layouts(distributed.get_world_size())[layout]):
        shapes = [(5 + number, 8), (2, 30)] if number else SHAPES
        spread, own = spread_over(mesh, placements, shapes)
        ours += [torch.nn.Parameter(moved(param, memory)) for param in spread]
        theirs += [torch.nn.Parameter(param.detach().clone()) for param in spread]
        plain += own
    optimizer, host, alone = (optim.AdamW(params, lr=1e-2, **given) for params in (ours, theirs, plain))
    with device(Guarded(memory)):
        hosts = set()
        for step in range(12):
            give_gradients(theirs, plain, step)
            if step == 5 and options.get("nonfinite"):
                plain[0].grad[0] = NAN  # on one process
                theirs[0].grad = distribute_tensor(plain[0].grad, theirs[0].device_mesh, theirs[0].placements)
            for mine, its in zip(ours, theirs, strict=True):
                mine.grad = moved(its.grad, memory)
            for each, place in ((optimizer, memory.tensor), (host, torch.clone), (alone, torch.clone)):
                set_inputs(each, step, options, place)
            if options.get("scaled") and step == 3:
                alone.found_inf.fill_(1.0)
            host.step()
            alone.step()
            with on("cuda"):
                if step == 0:
                    with memory.allowed():
                        optimizer.step()
                    hosts = move_state(optimizer, memory)
                    continue
                with guarded(memory, hosts) as exchanges:
                    optimizer.step()
            assert len(exchanges) == len(expected_exchanges(layout)), (step, exchanges)
            assert optimizer.grad_norm is None or same(optimizer.grad_norm, host.grad_norm), step
        with on("cuda"):
            assert (
                optimizer.skipped_steps
                == host.skipped_steps
                == ("skip" in given.values()) + (kind in ("scaled", "all"))
            )
            assert_whole(optimizer, alone, layout)
    assert_whole(host, alone, layout)
    assert optimizer.grad_norm is None or same(optimizer.grad_norm, alone.grad_norm)


def expected_exchanges(layout):
    """One all-reduce for each dimension of each mesh; of several meshes each is gone through once more."""
    return {"hsdp": range(2), "several meshes": range(2 * 4)}.get(layout, range(1))


CASES = [(2, "fsdp"), (2, "tensor parallel"), (3, "fsdp"), (4, "hsdp"), (4, "several meshes"), (4, "fsdp")]


@pytest.mark.parametrize("kind", OPTIONS.keys())
@pytest.mark.parametrize(("world", "layout"), CASES)
def test_no_host_reads_a_device(ranks, world, layout, kind):
    ranks.run(world, decided_on_devices, layout, kind)


@pytest.mark.parametrize("kind", ["8bit", "bf16", "8bit of bfloat16", "fp32 of float16"])
def test_every_format_on_every_mesh(ranks, kind):
    """With gradients of very different sizes, beside one process."""
    ranks.run(4, clipped, kind, "cuda")


def parts_of_a_group():
    """Plain tensors, of which each process has its own."""
    own, world = distributed.get_rank(), distributed.get_world_size()
    options = {"max_grad_norm": 0.5, "nonfinite": "skip"}
    plain = [torch.nn.Parameter(draw(k, (9 + k,))) for k in range(world)]
    memory = Forbidden()
    mine = torch.nn.Parameter(moved(plain[own], memory))
    ours = optim.AdamW([mine], shard_group=distributed.group.WORLD, **options)
    theirs = optim.AdamW(plain, **options)
    with device(Guarded(memory)), on("cuda"):
        for step in range(6):
            for k, param in enumerate(plain):
                param.grad = draw(10 * step + k, param.shape)
            plain[1].grad[0] = NAN if step == 4 else 1.0
            mine.grad = moved(plain[own].grad, memory)
            with only("cpu"):
                theirs.step()
            if step == 0:
                ours.step()
                hosts = move_state(ours, memory)
            else:
                with guarded(memory, hosts) as exchanges:
                    ours.step()
                assert len(exchanges) == 1
            assert same(ours.grad_norm, theirs.grad_norm)
        assert ours.skipped_steps == theirs.skipped_steps == 1
        assert same(mine.detach(), plain[own].detach())
        assert ours.state[mine]["step"] == 5


@pytest.mark.parametrize("world", [2, 3])
def test_parts_of_a_group(ranks, world):
    ranks.run(world, parts_of_a_group)
