"""Guards steps of sharded parameters on a GPU: the whole path of several processes, in a group of one, never waits.

Run by `make test-gpu`. More processes run on interpreted kernels (tests/test_device_ranks.py).
"""

import math

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lucid.optim as optim
from bits import draw, same

GPU = torch.device("cuda", 0)
OPTIONS = [
    {"max_grad_norm": 0.05},
    {"nonfinite": "skip"},
    {"max_grad_norm": 0.05, "nonfinite": "skip", "state_format": "8bit"},
    {"max_grad_norm": 0.05, "ema_decay": 0.99, "cautious_decay": True, "weight_decay_schedule": "independent"},
]


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """A group of one process, whose collectives run on the GPU."""
    torch.cuda.set_device(GPU)
    store = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(96, 96) for _ in range(3)))


def sharded(model, dims):
    """FSDP2 over a mesh of one process, of one dimension, or of two as HSDP has."""
    names = ("replicate", "shard")[-dims:]
    mesh = init_device_mesh("cuda", (1,) * dims, mesh_dim_names=names)
    model.to(GPU)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return model


def local(tensor):
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def give_gradients(ours, theirs, step, bad):
    for number, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
        its.grad = draw(100 * step + number, its.shape) * 1e-2
        if bad and number == 1:
            its.grad[3] = math.nan
        mine.grad = DTensor.from_local(its.grad.to(GPU), mine.device_mesh, mine.placements, run_check=False)


@pytest.mark.parametrize("dims", [1, 2], ids=["FSDP2", "HSDP"])
@pytest.mark.parametrize("tensors", [False, True], ids=["", "tensors"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_of_sharded_parameters_never_waits(options, tensors, dims):
    """And has the bits of the CPU engine; `tensors`: GradScaler's values and the learning rate are on the GPU."""
    ours, theirs = list(sharded(network(), dims).parameters()), list(network().parameters())
    rate = torch.tensor(1e-2)
    optimizer = optim.AdamW(ours, lr=rate.to(GPU) if tensors else 1e-2, **options)
    twin = optim.AdamW(theirs, lr=rate if tensors else 1e-2, **options)
    scale, found_inf = torch.tensor(2.0), [torch.tensor(float(step == 4)) for step in range(14)]
    on_gpu = scale.to(GPU), [each.to(GPU) for each in found_inf]
    for step in range(14):
        give_gradients(ours, theirs, step, bad=step == 6 and "nonfinite" in options)
        if tensors:
            twin.grad_scale, twin.found_inf = scale, found_inf[step]
            optimizer.grad_scale, optimizer.found_inf = on_gpu[0], on_gpu[1][step]
        twin.step()
        torch.cuda.synchronize()
        if step > 1:  # the first creates the state
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if twin.grad_norm is not None:  # else its host knew without measuring
            assert same(optimizer.grad_norm.cpu(), twin.grad_norm), step
    assert optimizer.skipped_steps == twin.skipped_steps == tensors + ("nonfinite" in options)
    for mine, its in zip(ours, theirs, strict=True):
        assert same(local(mine), its.detach())
        assert all(same(local(optimizer.state[mine][key]), value) for key, value in twin.state[its].items())


def test_training_under_fsdp2_with_a_norm():
    """Gradients that FSDP2 makes; forward and backward are ordered with the step by streams alone."""
    model, twin = sharded(network(), 1), network().to(GPU)
    ours = optim.AdamW(model.parameters(), max_grad_norm=0.1, nonfinite="skip")
    theirs = optim.AdamW(twin.parameters(), max_grad_norm=0.1, nonfinite="skip")
    for step in range(10):
        x = draw(step, (16, 96)).to(GPU)
        for each, optimizer in ((model, ours), (twin, theirs)):
            each(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(ours.grad_norm.cpu(), theirs.grad_norm.cpu())
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert same(local(mine), its.detach().cpu())


def test_parts_of_a_group_never_wait():
    params = [torch.nn.Parameter(draw(k, (200,)).to(GPU)) for k in range(3)]
    optimizer = optim.AdamW(params, max_grad_norm=0.1, shard_group=distributed.group.WORLD)
    for step in range(12):
        for number, param in enumerate(params):
            param.grad = draw(10 * step + number, param.shape).to(GPU)
        torch.cuda.synchronize()
        if step > 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.state[params[0]]["step"] == 12


def test_a_step_of_sharded_parameters_cannot_be_captured():
    params = list(sharded(network(), 1).parameters())
    optimizer = optim.AdamW(params, max_grad_norm=0.1)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="not sharded"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    optimizer.step()
    assert all(entry["step"] == 2 for entry in optimizer.state.values())
