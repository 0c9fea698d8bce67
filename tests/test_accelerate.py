"""Guards training with Accelerate: one process, DDP, FSDP2; it saves, resumes, schedules, clips, accumulates.

Accelerate takes FSDP2 only on accelerators, see `test_on_cpu_accelerate_leaves_fsdp2_out`. Its FSDP2 code asks for no
GPU anywhere else: told that the processes are on some, it shards, saves and loads on the CPU.
"""

import contextlib
import functools

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch.distributed.tensor import DTensor

import lucid.optim as optim
from frameworks import (  # noqa: F401
    EPOCHS,
    MICRO,
    STEPS,
    Trained,
    alone,
    as_torchrun,
    assert_resumes,
    assert_same_bits,
    forget,
    make_loader,
    make_net,
    of_8_bits,
    outcome,
    that_clips,
    with_ours,
    with_torchs,
)


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
    return Trained(losses, outcome(inner, optimizer), norms=norms, wrapped=type(model).__name__)


def plugin(state_dict_type):
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type=state_dict_type, auto_wrap_policy="size_based_wrap", min_num_params=1000
    )


def assert_trains_as_with_torchs(run):
    plain, theirs = run(with_torchs), run(with_torchs, clip=1.0)
    torch.testing.assert_close(run(with_ours).losses, plain.losses, rtol=1e-4, atol=1e-5)
    for ours in (run(with_ours, clip=1.0), run(that_clips)):
        torch.testing.assert_close(ours.norms, theirs.norms, rtol=1e-4, atol=0)
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-4, atol=1e-5)
    assert min(theirs.norms) > 1
    assert theirs.losses[-1] != pytest.approx(plain.losses[-1], rel=1e-2)


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("state_dict_type", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_fsdp2(ranks, tmp_path, state_dict_type):
    ranks.run(2, shards, str(tmp_path), state_dict_type)
