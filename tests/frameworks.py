"""What the tests of Accelerate, Lightning and transformers share: a small training, and that it resumes to the bit.

Each trains three epochs of six batches, two batches a step, saves after an epoch, and goes on from there.
"""

import contextlib
import os
import warnings
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.tensor import DTensor

import lucid.optim as optim
from bits import canonical

EPOCHS, MICRO = 3, 2
STEPS = 9  # of 18 batches
# Of Lightning, about itself.
LIGHTNINGS_WARNINGS = [
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
    ("The 'train_dataloader' does not have many workers", UserWarning),
    ("Be aware that when using `ckpt_path`, callbacks used to create the checkpoint", UserWarning),
]


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


def forget():
    """Accelerate's states are global."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def alone():
    """No state of Accelerate's after the tests of the files that import this."""
    yield
    forget()


class Trained(NamedTuple):
    """A run: its losses, gradient norms as the framework tells them, the last as the optimizer does, and its bits."""

    losses: list
    bits: list
    norms: list | None = None
    norm: float | None = None
    wrapped: str | None = None


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


def with_torchs(params):
    return torch.optim.AdamW(params, lr=1e-2)


def with_ours(params):
    return optim.AdamW(params, lr=1e-2)


def that_clips(params):
    return optim.AdamW(params, lr=1e-2, max_grad_norm=1.0)


def of_8_bits(params):
    return optim.AdamW(params, lr=1e-2, state_format="8bit", max_grad_norm=1.0)


def assert_resumes(run, folder, that_clips=that_clips, of_8_bits=of_8_bits, epoch=1):
    """Save and go on, in full and with eight bits; a run that goes on tells the losses from the epoch `epoch` on."""
    for name, make, dtype in (("fp32", that_clips, torch.float32), ("8bit", of_8_bits, torch.bfloat16)):
        whole = run(make, dtype=dtype, saves=f"{folder}/{name}")
        resumed = run(make, dtype=dtype, resumes=f"{folder}/{name}")
        assert resumed.losses == whole.losses[len(whole.losses) // EPOCHS * epoch :]
        assert_same_bits(resumed.bits, whole.bits)
        assert any(bits.dtype == torch.uint8 for bits in whole.bits) == (make is of_8_bits)
