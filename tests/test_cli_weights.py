"""Guards how `lucid inspect` finds each weight: by its name, or by place where the order is the model's,
or by a shape that occurs once; never by an order that a format made. A sound checkpoint is not called stale, and what
was not matched is said in a sentence.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import checkpoint as dcp

import lucid.optim as optim
from lucid.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class ZBeforeA(nn.Module):
    """Its layers come in another order than their names' alphabet; two are of one shape, the bias is not."""

    def __init__(self, bias=False):
        super().__init__()
        self.z = nn.Linear(64, 64, bias=False)
        self.a = nn.Linear(64, 64, bias=bias)


def trained(model=None, dtype=torch.float16, named=False, groups=None):
    torch.manual_seed(0)
    model = (model or ZBeforeA()).to(dtype)
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.mul_(10.0 ** -(number % 2))  # so that ratios differ
    params = groups(model) if groups else list(model.named_parameters() if named else model.parameters())
    optimizer = optim.AdamW(params, lr=0.001)
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.randn(param.shape).to(dtype)
        optimizer.step()
    return model, optimizer


def as_safetensors(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def as_shards(folder, tensors):
    """Of as many files as tensors, with an index, as Transformers writes them."""
    path = folder / "model"
    path.mkdir()
    names = {name: f"model-{number:05}-of-{len(tensors):05}.safetensors" for number, name in enumerate(tensors, 1)}
    for name, file in names.items():
        save_file({name: tensors[name]}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return path


def as_folder(folder, tensors):
    dcp.save({"model": dict(sorted(tensors.items()))}, checkpoint_id=folder / "model", no_dist=True)
    return folder / "model"


def as_sorted_file(folder, tensors):
    torch.save(dict(sorted(tensors.items())), folder / "model.pt")
    return folder / "model.pt"


def as_converted_file(folder, tensors):
    torch.save(load_file(as_safetensors(folder, tensors)), folder / "model.pt")
    return folder / "model.pt"


UNORDERED = [as_safetensors, as_shards, as_folder, as_sorted_file, as_converted_file]


def inspected(capsys, *arguments):
    """Return the exit status, the states found of the one optimizer, and what people are told."""
    options = [str(argument) for argument in arguments]
    status = main(["inspect", *options, "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    (states,) = json.loads(out).values()
    assert main(["inspect", *options]) == status
    return status, states, " ".join(capsys.readouterr().out.split())


def saved(tmp_path, optimizer):
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    return tmp_path / "optimizer.pt"


def ratios(states):
    return [each["update_ratio"] for each in states]


def true_ratios(capsys, tmp_path, model, optimizer):
    """Those of the weights in the model's own order."""
    torch.save(model.state_dict(), tmp_path / "true.pt")
    status, states, _ = inspected(capsys, saved(tmp_path, optimizer), "--weights", tmp_path / "true.pt")
    assert status == 0
    assert None not in ratios(states)
    return ratios(states)


@pytest.mark.parametrize("write", UNORDERED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_in_another_order_are_not_taken_for_each_other(dtype, write, capsys, tmp_path):
    model, optimizer = trained(dtype=dtype)
    one, two = true_ratios(capsys, tmp_path, model, optimizer)
    assert not 0.5 < one / two < 2
    weights = write(tmp_path, model.state_dict())
    status, states, _ = inspected(capsys, tmp_path / "optimizer.pt", "--weights", weights)
    assert (status, [each["oddities"] for each in states]) == (0, [[], []])
    assert ratios(states) == [None, None]
