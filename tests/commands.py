"""The `lucid` command run on checkpoints of small models: how these are trained and saved, and what it says."""

import json

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

import lucid.optim as optim
from lucid.cli import main

KINDS = [
    (dtype, state_format, amsgrad)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)
    for state_format, amsgrad in (("fp32", False), ("bf16", True), ("8bit", False), ("8bit", True))
]


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 3)).to(dtype)


def train(model, optimizer, steps=3, seed=0):
    for number in range(steps):
        generator = torch.Generator().manual_seed(100 * seed + number)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float32).to(param.dtype)
        optimizer.step()


def trained(dtype=torch.float32, make=optim.AdamW, named=False, **options):
    model = make_model(dtype)
    optimizer = make(model.named_parameters() if named else model.parameters(), lr=0.01, **options)
    train(model, optimizer)
    return model, optimizer


def save(path, model, optimizer, **more):
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more}, path)
    return path


def save_folder(path, model, optimizer, *, flat=False):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    tree = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.save(tree, checkpoint_id=path, no_dist=True)
    return path


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def inspected(capsys, *arguments):
    """Return the exit status, and what was found of each parameter."""
    status, out, err = run(capsys, "inspect", *arguments, "--json")
    assert err == ""
    return status, {each["name"]: each for states in json.loads(out).values() for each in states}
