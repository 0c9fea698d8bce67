"""Guards how `lucid inspect` finds each weight: by its name, or by place where the order is the model's,
or by a shape that occurs once; never by an order that a format made. A sound checkpoint is not called stale, and what
was not matched is said in a sentence.
"""

import json
import re

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
    status, states, text = inspected(capsys, tmp_path / "optimizer.pt", "--weights", weights)
    assert (status, [each["oddities"] for each in states]) == (0, [[], []])
    assert ratios(states) == [None, None]
    assert "no update/weight for any parameter: the state was saved without names" in text
    assert "several weights have the same shape; save the optimizer with names" in text
    assert all(each["no_weight"] in text for each in states)


@pytest.mark.parametrize("write", UNORDERED)
def test_names_match_in_any_order(write, capsys, tmp_path):
    model, optimizer = trained(named=True)
    wanted = true_ratios(capsys, tmp_path, model, optimizer)
    weights = write(tmp_path, model.state_dict())
    status, states, text = inspected(capsys, tmp_path / "optimizer.pt", "--weights", weights)
    assert (status, ratios(states)) == (0, wanted)
    assert [each["no_weight"] for each in states] == [None, None]
    assert "not known" not in text


@pytest.mark.parametrize("write", UNORDERED)
def test_a_shape_that_occurs_once_matches_in_any_order(write, capsys, tmp_path):
    model, optimizer = trained(ZBeforeA(bias=True))
    *_, bias = true_ratios(capsys, tmp_path, model, optimizer)
    weights = write(tmp_path, model.state_dict())
    status, states, text = inspected(capsys, tmp_path / "optimizer.pt", "--weights", weights)
    assert (status, ratios(states)) == (0, [None, None, bias])
    assert "no update/weight for parameter 0, parameter 1: the state was saved without names" in text
    assert states[2]["no_weight"] is None


def test_an_overwritten_weight_is_found_by_its_shape(capsys, tmp_path):
    model, optimizer = trained(ZBeforeA(bias=True))
    weights = model.state_dict() | {"a.bias": model.a.bias.detach() + 1}
    status, states, _ = inspected(capsys, saved(tmp_path, optimizer), "--weights", as_safetensors(tmp_path, weights))
    assert status == 1
    assert [len(each["oddities"]) for each in states] == [0, 0, 1]
    assert "stale master" in states[2]["oddities"][0]


def decaying_first(model):
    params = list(model.parameters())
    return [{"params": [p for p in params if p.dim() > 1]}, {"params": [p for p in params if p.dim() == 1]}]


class BiasFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32, bias=False)
        self.linear = nn.Linear(32, 64)


def test_groups_in_another_order_than_the_model_match_by_shape(capsys, tmp_path):
    """As groups of who decays and who does not have them."""
    model, optimizer = trained(BiasFirst(), groups=decaying_first)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    status, states, _ = inspected(capsys, saved(tmp_path, optimizer), "--weights", tmp_path / "model.pt")
    assert (status, [each["shape"] for each in states]) == (0, [[64, 32], [32], [64]])
    assert None not in ratios(states)
    model, optimizer = trained(ZBeforeA(), groups=lambda model: [{"params": [each]} for each in model.parameters()])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    status, states, text = inspected(capsys, saved(tmp_path, optimizer), "--weights", tmp_path / "model.pt")
    assert (status, ratios(states)) == (0, [None, None])
    assert "its groups may have put the parameters into another order" in text


def test_weights_of_another_model_are_not_taken(capsys, tmp_path):
    """Of a part of it, of more than it, of other names, of other shapes under its names."""
    model, optimizer = trained(ZBeforeA(bias=True))
    path = saved(tmp_path, optimizer)
    whole = model.state_dict()
    part = {name: each for name, each in whole.items() if name != "a.bias"}
    for weights, count in ((part, 2), (whole | {"head": torch.ones(3, dtype=torch.float16)}, 4)):
        status, states, text = inspected(capsys, path, "--weights", as_safetensors(tmp_path, weights))
        assert (status, ratios(states)) == (0, [None] * 3)
        assert f"the {count} weights in model.safetensors are not those of its 3 parameters" in text
    path = saved(tmp_path, trained(ZBeforeA(bias=True), named=True)[1])
    weights = {f"module.{name}": each for name, each in whole.items()}
    status, states, text = inspected(capsys, path, "--weights", as_safetensors(tmp_path, weights))
    assert (status, ratios(states)) == (0, [None] * 3)
    assert "no update/weight for any parameter: model.safetensors has no weight of this name" in text
    status, states, text = inspected(capsys, path, "--weights", as_safetensors(tmp_path, {"a.bias": whole["a.bias"]}))
    assert [each["no_weight"] is None for each in states] == [False, False, True]
    assert "no update/weight for z.weight, a.weight: model.safetensors has no weight" in text


def test_models_that_fit_equally_are_told(capsys, tmp_path):
    model, optimizer = trained()
    tree = {"model": model.state_dict(), "mean": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(tree, tmp_path / "a.pt")
    status, states, text = inspected(capsys, tmp_path / "a.pt")
    assert (status, ratios(states)) == (0, [None, None])
    assert "2 models in a.pt fit equally well; give the right one as --weights" in text
    _, _, text = inspected(capsys, saved(tmp_path, optimizer))
    assert "optimizer.pt holds no weights; give them as --weights" in text


@pytest.mark.parametrize("names", [["0", "1"], ["z.weight", "a.weight"]])
def test_numbers_that_became_text_are_no_names_unless_the_model_has_them(names, capsys, tmp_path):
    model, optimizer = trained()
    wanted = true_ratios(capsys, tmp_path, model, optimizer)
    state = optimizer.state_dict()
    state["state"] = {str(key): entry for key, entry in state["state"].items()}
    state["param_groups"][0]["params"] = ["0", "1"]
    torch.save(state, tmp_path / "optimizer.pt")
    weights = dict(zip(names, model.state_dict().values(), strict=True))
    torch.save(weights, tmp_path / "model.pt")
    status, states, _ = inspected(capsys, tmp_path / "optimizer.pt", "--weights", tmp_path / "model.pt")
    assert (status, ratios(states)) == (0, wanted)
    assert [each["name"] for each in states] == ["parameter 0", "parameter 1"]


def test_many_parameters_are_told_in_one_line(capsys, tmp_path):
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(12)), nn.Linear(8, 3, bias=False))
    model, optimizer = trained(model)
    _, _, text = inspected(
        capsys, saved(tmp_path, optimizer), "--weights", as_safetensors(tmp_path, model.state_dict())
    )
    assert (
        "no update/weight for parameter 0, parameter 1, parameter 2 and 9 more: the state was saved without names"
        in text
    )


def test_a_name_in_two_files_of_a_folder_is_refused(capsys, tmp_path):
    """The last file's weight would be taken, and a sound master be called stale."""
    model, optimizer = trained(named=True)
    weights = as_shards(tmp_path, model.state_dict())
    name, weight = next(iter(model.state_dict().items()))
    save_file({name: weight * 9}, weights / "older.safetensors")
    assert main(["inspect", str(saved(tmp_path, optimizer)), "--weights", str(weights)]) == 2
    told = capsys.readouterr().err
    assert re.search(rf"'{name}' is both in \S+\.safetensors and in older\.safetensors; give one", told)
