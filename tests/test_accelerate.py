"""Guards training with Accelerate: one process, DDP, FSDP2; it saves, resumes, schedules, clips, accumulates.

Accelerate takes FSDP2 only on accelerators, see `test_on_cpu_accelerate_leaves_fsdp2_out`. Its FSDP2 code asks for no
GPU anywhere else: told that the processes are on some, it shards, saves and loads on the CPU.
"""

import contextlib
import functools
import os
import warnings
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.tensor import DTensor

import lucid.optim as optim
from bits import canonical

EPOCHS, MICRO = 3, 2
STEPS = 9  # of 18 batches


@contextlib.contextmanager
def as_torchrun():
    """The environment of a process that torchrun has started; libraries take the process group that is there."""
    rank, world = (str(number) for number in (torch.distributed.get_rank(), torch.distributed.get_world_size()))
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": "0",
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
    }
    with mock.patch.dict(os.environ, values), warnings.catch_warnings():
        yield


def local(tensor):
    """What this process holds of a tensor."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def outcome(model, optimizer):
    """The bits of all parameters and their state on this process."""
    found = []
    for param in model.parameters():
        found.append(canonical(local(param)))
        for key, value in optimizer.state[param].items():
            found.append(local(value).view(torch.int16).clone() if key == "residual" else canonical(local(value)))
    return found


def assert_same_bits(left, right):
    assert len(left) == len(right)
    assert all(map(torch.equal, left, right))


def make_net(dtype=torch.float32):
    torch.manual_seed(0)
    layers = torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 96), torch.nn.Tanh()
    return torch.nn.Sequential(*layers, torch.nn.Linear(96, 1)).to(dtype)


def make_loader(dtype, parts=1):
    """Six batches of 8, of which each of `parts` processes is to get its part."""
    x = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(x.to(dtype), x.sum(1, keepdim=True).to(dtype))
    return torch.utils.data.DataLoader(data, batch_size=8 // parts)


@pytest.fixture(autouse=True)
def alone():
    """One thread: two would wait for each other where the machine is busy; and no state of Accelerate's afterwards."""
    torch.set_num_threads(1)
    yield
    forget()


def forget():
    """Accelerate's states are global."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Trained(NamedTuple):
    losses: list
    norms: list
    bits: list
    wrapped: str


def train(make, *, clip=None, dtype=torch.float32, saves=None, resumes=None, fsdp=None):
    """Train three epochs, and save after the first; or go on from there."""
    forget()
    options = {}
    if fsdp is not None:
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
        options["fsdp_plugin"] = plugin(fsdp)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO, **options)
    assert accelerator.distributed_type == DistributedType.FSDP or fsdp is None
    model, loader = make_net(dtype), make_loader(dtype, accelerator.num_processes)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS * accelerator.num_processes)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if resumes is not None:
        accelerator.load_state(resumes)
    losses, norms = [], []
    for epoch in range(0 if resumes is None else 1, EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = (model(x) - y).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients and clip is not None:
                    norm = accelerator.clip_grad_norm_(model.parameters(), clip)
                    norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if accelerator.sync_gradients and getattr(optimizer.optimizer, "grad_norm", None) is not None:
                norms.append(float(optimizer.optimizer.grad_norm))
        if epoch == 0 and saves is not None:
            accelerator.save_state(saves)
    inner = accelerator.unwrap_model(model)
    assert [int(optimizer.state[param]["step"]) for param in inner.parameters()] == [STEPS] * 6
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)  # the schedule has come to its end
    return Trained(losses, norms, outcome(inner, optimizer), type(model).__name__)


def plugin(state_dict_type):
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type=state_dict_type, auto_wrap_policy="size_based_wrap", min_num_params=1000
    )


def with_torchs(params):
    return torch.optim.AdamW(params, lr=1e-2)


def with_ours(params):
    return optim.AdamW(params, lr=1e-2)


def that_clips(params):
    return optim.AdamW(params, lr=1e-2, max_grad_norm=1.0)


def of_8_bits(params):
    return optim.AdamW(params, lr=1e-2, state_format="8bit", max_grad_norm=1.0)


def assert_trains_as_with_torchs(run):
    plain, theirs = run(with_torchs), run(with_torchs, clip=1.0)
    torch.testing.assert_close(run(with_ours).losses, plain.losses, rtol=1e-4, atol=1e-5)
    for ours in (run(with_ours, clip=1.0), run(that_clips)):
        torch.testing.assert_close(ours.norms, theirs.norms, rtol=1e-4, atol=0)
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-4, atol=1e-5)
    assert min(theirs.norms) > 1
    assert theirs.losses[-1] != pytest.approx(plain.losses[-1], rel=1e-2)


def assert_resumes(run, folder):
    for name, make, dtype in (("fp32", that_clips, torch.float32), ("8bit", of_8_bits, torch.bfloat16)):
        whole = run(make, dtype=dtype, saves=f"{folder}/{name}")
        resumed = run(make, dtype=dtype, resumes=f"{folder}/{name}")
        assert resumed.losses == whole.losses[len(whole.losses) // EPOCHS :]
        assert_same_bits(resumed.bits, whole.bits)
        assert any(bits.dtype == torch.uint8 for bits in whole.bits) == (make is of_8_bits)


# One process


def test_one_process_trains_as_with_torchs_adamw():
    assert_trains_as_with_torchs(train)


def test_one_process_resumes_with_the_same_bits(tmp_path):
    assert_resumes(train, tmp_path)


def test_stepping_in_backward_gives_the_same_bits():
    found = []
    for in_backward in (False, True):
        forget()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
        model = make_net()
        own = optim.AdamW(model.parameters(), lr=1e-2)
        own.step_in_backward(in_backward)
        model, optimizer, loader = accelerator.prepare(model, own, make_loader(torch.float32))
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = (model(x) - y).square().mean()
                with contextlib.nullcontext() if accelerator.sync_gradients else own.accumulate():
                    accelerator.backward(loss)
                assert all((p.grad is None) == (in_backward and accelerator.sync_gradients) for p in model.parameters())
                optimizer.step()
                optimizer.zero_grad()
        assert int(own.state[model[0].weight]["step"]) == STEPS // EPOCHS
        found.append(outcome(model, own))
    assert_same_bits(*found)


# DDP


def replicas(folder):
    with as_torchrun():
        try:
            assert_trains_as_with_torchs(train)
            assert_resumes(train, folder)
            run = train(of_8_bits, dtype=torch.bfloat16)
            assert run.wrapped == "DistributedDataParallel"
        finally:
            forget()
    return run.bits


def test_ddp(ranks, tmp_path):
    one, two = ranks.run(2, replicas, str(tmp_path))
    assert_same_bits(one, two)


# FSDP2


def fsdp2_on_cpu():
    with as_torchrun():
        forget()
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin("SHARDED_STATE_DICT"))
        model, _ = accelerator.prepare(make_net(), with_ours([torch.nn.Parameter(torch.ones(1))]))
        found = str(accelerator.distributed_type), type(model).__name__
        forget()
        return found


def test_on_cpu_accelerate_leaves_fsdp2_out(ranks):
    """It says nothing and takes DDP. Once this fails, `train` need not tell it otherwise, nor docs/frameworks.md."""
    assert ranks.run(2, fsdp2_on_cpu) == [("DistributedType.MULTI_CPU", "DistributedDataParallel")] * 2


def shards(folder, state_dict_type):
    with as_torchrun():
        run = functools.partial(train, fsdp=state_dict_type)
        try:
            if state_dict_type == "SHARDED_STATE_DICT":
                assert_trains_as_with_torchs(run)
            assert_resumes(run, folder)
            sharded = run(with_ours)
            torch.testing.assert_close(sharded.losses, train(with_ours).losses, rtol=1e-4, atol=1e-5)
            assert sharded.wrapped == "FSDPSequential"
        finally:
            forget()


@pytest.mark.parametrize("state_dict_type", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_fsdp2(ranks, tmp_path, state_dict_type):
    ranks.run(2, shards, str(tmp_path), state_dict_type)
