"""The command asked about a small optimizer's checkpoint, and what it says."""

import copy
import json

import torch
from torch import nn

import lucid.optim as optim
from lucid.cli import main


def trained(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 3)).to(dtype)
    optimizer = optim.AdamW(model.parameters(), lr=0.01, **options)
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.randn(param.shape).to(dtype)
        optimizer.step()
    return model, optimizer


def state_dict(**options):
    return copy.deepcopy(trained(**options)[1].state_dict())


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def inspected(capsys, path):
    """Return the exit status, what was found by name, and what people read."""
    status, out, err = run(capsys, "inspect", path, "--json")
    assert err == ""
    (states,) = json.loads(out).values()
    return status, {each["name"]: each for each in states}, " ".join(run(capsys, "inspect", path)[1].split())


def refused(capfd, path, tmp_path):
    """Return the sentence with which both commands refuse a file or folder, leaving no trace of it."""
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    sentences = set()
    for arguments in (["inspect", path], ["convert", path, tmp_path / "out.pt", "--to", "8bit"]):
        status, out, err = run(capfd, *arguments)
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1
        sentences.add(err.removeprefix("lucid: ").rstrip("\n"))
    assert sorted(tmp_path.rglob("*")) == before
    (sentence,) = sentences
    assert sentence.startswith(f"{path}: ")
    return sentence.removeprefix(f"{path}: ")
