"""Guards `lucid inspect` and `lucid convert`: what they read, and refuse to; what they find odd, and nothing else; that
a converted state is what loading would have made of it; and that a crash leaves what was there.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import pty
import re
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import lucid.optim as optim
from bits import assert_same, results
from golden import make as golden
from lucid.cli import checkpoints, main, writing
from lucid.cli.checkpoints import CommandError, read
from lucid.optim import distributed_files
from lucid.optim.checkpoint import load_optimizer
from lucid.optim.formats import NAMES

KINDS = [
    (dtype, state_format, amsgrad)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)
    for state_format, amsgrad in (("fp32", False), ("bf16", True), ("8bit", False), ("8bit", True))
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature"),
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


# What is read


class Evil:
    """Would print when it is unpickled as pickle does."""

    def __reduce__(self):
        return print, ("EVIL",)


def hostile_file(path):
    torch.save({"optimizer": Evil()}, path)


def hostile_contents(path):
    save_folder(path, *trained())
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))


def hostile_value(path):
    dcp.save({"model": {"a": torch.ones(2)}, "other": Evil()}, checkpoint_id=path, no_dist=True)


def file_elsewhere(path):
    save_folder(path, *trained())
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def other_contents(path):
    save_folder(path, *trained())
    (path / ".metadata").write_bytes(pickle.dumps({"a": 1}))


def changed_classes(path):
    """Would give every path of the process the same name: then the check of file names would pass, too."""
    save_folder(path, *trained())
    metadata = pickle.loads((path / ".metadata").read_bytes())
    name = b"(N}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xstb0"  # state of the class: (None, {"name": "x"})
    (path / ".metadata").write_bytes(b"\x80\x02cpathlib\nPurePosixPath\n" + name + pickle.dumps(metadata, 2)[2:])


def changed_dataclass(path):
    state = b"(N}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xstb."
    path.mkdir()
    (path / ".metadata").write_bytes(b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n" + state)


def part_of_a_process(path):
    """What a process of FSDP2 has, saved by torch.save; a group of one process is enough for it."""
    code = f"""
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
moment = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
entry = {{"step": torch.tensor(1.0), "exp_avg": moment, "exp_avg_sq": moment}}
torch.save({{"state": {{0: entry}}, "param_groups": [{{"params": [0]}}]}}, {str(path)!r})
dist.destroy_process_group()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


def changed_function(path):
    save_folder(path, *trained())
    contents = b"\x80\x02ctorch.serialization\n_get_layout\n}X\x05\x00\x00\x00cache}sb."
    (path / ".metadata").write_bytes(contents)


def long_list(path):
    """A few bytes that ask for a list of millions."""
    dcp.save({"a": [torch.ones(2)]}, checkpoint_id=path, no_dist=True)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = dict.fromkeys(metadata.planner_data, ("a", 10**7))
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def no_places(path):
    save_folder(path, *trained())
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.storage_data = dict.fromkeys(metadata.storage_data, "x")
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def later_version(path):
    _, optimizer = trained()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["state_version"] = 2
    torch.save({"optimizer": saved}, path)


def later_version_flat(path):
    model, optimizer = trained()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    versions = dict.fromkeys((key for key in saved if key.endswith("state_version")), 2)
    assert versions
    torch.save({"optimizer": saved | versions}, path)


def dict_within_itself(path):
    tree = {"optimizer": trained()[1].state_dict()}
    tree["more"] = [tree]
    torch.save(tree, path)


def dicts_of_the_same_dicts(path):
    tree = {}
    for _ in range(60):
        tree = {"a": tree, "b": tree}
    torch.save({"optimizer": trained()[1].state_dict(), "more": tree}, path)


def change_of_state(change):
    def make(path):
        saved = trained()[1].state_dict()
        change(saved)
        torch.save({"optimizer": saved}, path)

    return make


def cut_file(path):
    save(path, *trained())
    path.write_bytes(path.read_bytes()[:1000])


def cut_folder(path):
    save_folder(path, *trained())
    for part in path.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])


def folder_without_a_file(path):
    save_folder(path, *trained())
    for part in path.glob("*.distcp"):
        part.unlink()


def safetensors_of_nothing(path):
    path.with_suffix(".safetensors").write_bytes(b"nothing")
    path.mkdir()
    (path / "x.safetensors").write_bytes(b"nothing")


UNREADABLE = {
    "code in a file": (hostile_file, "it names print"),
    "code in a folder's contents": (hostile_contents, r"names builtins\.print"),
    "code in a folder's values": (hostile_value, "print"),
    "files elsewhere": (file_elsewhere, "names a file elsewhere"),
    "a class changed by a folder's contents": (changed_classes, "its list of contents changes"),
    "a dataclass changed by a folder's contents": (changed_dataclass, "its list of contents changes"),
    "a process's part": (part_of_a_process, "is one process's part of tensors"),
    "a function changed by a folder's contents": (changed_function, "its list of contents changes"),
    "a list without end": (long_list, r"checkpoint: its list of contents has a list of more than [\d,]+ values$"),
    "no places in files": (no_places, "has str for a place in a file"),
    "state of a later version": (later_version, "its state is of version 2"),
    "flat state of a later version": (later_version_flat, "its state is of version 2"),
    "a dict within itself": (dict_within_itself, "almost without end"),
    "dicts without number": (dicts_of_the_same_dicts, "almost without end"),
    "a parameter twice": (
        change_of_state(lambda saved: saved["param_groups"][0].update(params=[0, 0, 1, 2])),
        "expected each parameter's number or name once",
    ),
    "a parameter's number that is none": (
        change_of_state(lambda saved: saved["param_groups"][0].update(params=[[0], 1, 2, 3])),
        "expected each parameter's number or name once",
    ),
    "state that is no dict": (
        change_of_state(lambda saved: saved["state"].update({0: torch.ones(3)})),
        "state of parameter 0: expected a dict, got Tensor",
    ),
    "another folder's contents": (other_contents, "is dict, expected Metadata"),
    "a file cut short": (cut_file, "got a zip archive, as torch.save writes, that is damaged or cut short"),
    "a folder's file cut short": (cut_folder, "cannot be read as a checkpoint's folder"),
    "a folder without its file": (folder_without_a_file, "cannot be read as a checkpoint's folder"),
    "nothing in a file": (lambda path: path.write_bytes(b""), "got an empty file"),
    "text": (lambda path: path.write_text("hello"), r"got text \('hello'\)"),
    "a list": (lambda path: torch.save([1, 2], path), "expected a dict of state dicts"),
    "a model alone": (lambda path: torch.save(make_model().state_dict(), path), "expected an optimizer's state dict"),
    "an empty folder": (lambda path: path.mkdir(), "expected a folder of torch.distributed.checkpoint"),
    "broken safetensors": (safetensors_of_nothing, "expected a file of safetensors, got text"),
}


@pytest.mark.parametrize(("make", "message"), UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_what_cannot_be_read_is_refused_with_a_sentence(command, make, message, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_MOST_NODES", 10_000)
    path = tmp_path / "checkpoint"
    make(path)
    capfd.readouterr()
    with pytest.raises(CommandError, match=message):
        read(path).optimizers()
    arguments = [command, str(path)] + (["OUT", "--to", "fp32"] if command == "convert" else [])
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert "EVIL" not in out
    assert out == ""
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("key", ["optimizer", "optim_state", None])
@pytest.mark.parametrize("old", [False, True], ids=["", "before torch 1.6"])
def test_states_are_found_wherever_they_are(key, old, capsys, tmp_path):
    _, optimizer = trained()
    saved = optimizer.state_dict() if key is None else {"epoch": 3, "trainer": [{key: optimizer.state_dict()}]}
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    status, found = inspected(capsys, tmp_path / "a.pt")
    assert (status, len(found)) == (0, 4)


def test_a_folder_is_read_once_and_tells_how_far_it_is(tmp_path, monkeypatch):
    path = save_folder(tmp_path / "a", *trained())
    told, opened = [], []
    contents = distributed_files._Contents
    monkeypatch.setattr(distributed_files, "_Contents", lambda stream: opened.append(stream) or contents(stream))
    distributed_files.read_whole(path, lambda *numbers: told.append(numbers))
    assert len(opened) == 1
    assert [there for there, _ in told] == list(range(1, len(told) + 1))
    assert {of for _, of in told} == {len(told)}


def test_who_waits_at_a_terminal_sees_how_far_it_is(tmp_path):
    save_folder(tmp_path / "a", *trained())
    seen = ""
    for source, target in (("a", "b/"), ("b", "c.pt")):
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        command = [sys.executable, "-m", "lucid", "convert", source, target, "--to", "8bit"]
        subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=theirs, check=True, timeout=120)
        os.set_blocking(ours, False)
        with contextlib.suppress(BlockingIOError):
            while part := os.read(ours, 4096):
                seen += part.decode()
        os.close(ours)
        os.close(theirs)
    for bar in ("read a", "write b", "read b", "write c.pt"):
        assert f"{bar}:" in seen


def test_several_optimizers_are_told_apart(capsys, tmp_path):
    one, two = trained()[1], trained(make=torch.optim.AdamW)[1]
    torch.save({"generator": one.state_dict(), "discriminator": two.state_dict()}, tmp_path / "gan.pt")
    _, out, _ = run(capsys, "inspect", tmp_path / "gan.pt", "--json")
    assert list(json.loads(out)) == ["generator", "discriminator"]
    assert run(capsys, "convert", tmp_path / "gan.pt", tmp_path / "new.pt", "--to", "8bit")[0] == 0
    _, out, _ = run(capsys, "inspect", tmp_path / "new.pt", "--json")
    assert [states[0]["format"] for states in json.loads(out).values()] == ["8bit", "8bit"]


# What is found


@pytest.mark.parametrize(("dtype", "state_format", "amsgrad"), KINDS)
def test_nothing_is_odd_about_a_training(dtype, state_format, amsgrad, capsys, tmp_path):
    model, optimizer = trained(dtype, state_format=state_format, amsgrad=amsgrad, named=True)
    status, found = inspected(capsys, save(tmp_path / "a.pt", model, optimizer))
    assert (status, [each["oddities"] for each in found.values()]) == (0, 4 * [[]])
    assert {each["step"] for each in found.values()} == {3}
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert all(each["update_ratio"] > 0 for each in found.values())
    held = sum(value.nbytes for entry in optimizer.state.values() for value in entry.values())
    assert sum(each["state_bytes"] for each in found.values()) == held


@pytest.mark.parametrize("name", golden.KINDS)
def test_nothing_is_odd_about_old_checkpoints(name, tmp_path, capsys):
    saved = torch.load(golden.HERE / f"{name}.pt", weights_only=True)
    torch.save({"optimizer": saved["optimizer"], "model": saved["params"]}, tmp_path / "a.pt")
    status, found = inspected(capsys, tmp_path / "a.pt")
    assert (status, set(found)) == (0, set(golden.SHAPES))


@pytest.mark.parametrize("flat", [False, True])
def test_folders_are_inspected_too(flat, capsys, tmp_path):
    model, optimizer = trained(state_format="8bit")
    status, found = inspected(capsys, save_folder(tmp_path / "a", model, optimizer, flat=flat))
    assert status == 0
    assert {name: each["format"] for name, each in found.items()} == {
        "0.weight": "8bit",
        "0.bias": "fp32",
        "1.weight": "fp32",
        "1.bias": "fp32",
    }


@pytest.mark.parametrize("make", [optim.AdamW, torch.optim.AdamW])
def test_figures_are_those_of_the_moments(make, capsys, tmp_path):
    model, optimizer = trained(make=make, weight_decay=0.1)
    path, weights = tmp_path / "optimizer.pt", tmp_path / "weights.pt"
    torch.save(optimizer.state_dict(), path)
    torch.save(model.state_dict(), weights)
    _, found = inspected(capsys, path, "--weights", weights)
    (alone,) = (each for each in inspected(capsys, path)[1].values() if each["shape"] == [64, 128])
    assert alone["update_ratio"] is None
    each, theta = found["parameter 0"], model[0].weight.detach().double()
    entry = optimizer.state[model[0].weight]
    m, v = entry["exp_avg"].double(), entry["exp_avg_sq"].double()
    update = 0.01 * (m / (1 - 0.9**3) / ((v / (1 - 0.999**3)).sqrt() + 1e-8) + 0.1 * theta)
    assert each["m_norm"] == pytest.approx(float(m.norm()))
    assert each["root_v_norm"] == pytest.approx(float(v.sum().sqrt()))
    assert each["max_m_over_sqrt_v"] == pytest.approx(float((m.abs() / v.sqrt()).max()))
    assert each["update_ratio"] == pytest.approx(float(update.norm() / theta.norm()))


def change(key, index, value):
    def act(entry, weight):
        entry[key].view(-1)[index] = value

    return act


def replace(key, make):
    def act(entry, weight):
        entry[key] = make(entry)

    return act


def overwrite_weight(entry, weight):
    with torch.no_grad():
        weight[0, :2] = 0.0
    entry["residual"].view(torch.int16)[0, :2] = -5


def overwrite_half(entry, weight):
    with torch.no_grad():
        weight[0, :3] += 1.0


ODD = {
    "NaN in m": (torch.float32, "fp32", change("exp_avg", 5, float("nan")), "exp_avg is NaN or infinite in 1 of 8,192"),
    "infinity in v": (
        torch.float32,
        "fp32",
        change("exp_avg_sq", 5, float("inf")),
        "exp_avg_sq is NaN or infinite in 1",
    ),
    "v below zero": (torch.float32, "fp32", change("exp_avg_sq", 5, -1e-9), "exp_avg_sq is negative in 1"),
    "v frozen at zero": (
        torch.float32,
        "fp32",
        change("exp_avg_sq", 5, 0.0),
        "exp_avg_sq is 0 where exp_avg is not, in 1",
    ),
    "NaN in a block": (torch.float32, "8bit", change("exp_avg_scale", 3, float("nan")), "exp_avg_scale is NaN"),
    "a block of v gone": (
        torch.float32,
        "8bit",
        change("exp_avg_sq_scale", 3, 0.0),
        "exp_avg_sq is 0 where exp_avg is not",
    ),
    "scales missing": (torch.float32, "8bit", lambda entry, _: entry.pop("exp_avg_scale"), "exp_avg_scale missing"),
    "scales of others": (
        torch.float32,
        "8bit",
        replace("exp_avg_scale", lambda e: e["exp_avg_scale"][:, :0]),
        "expected one scale",
    ),
    "codes as floats": (
        torch.float32,
        "8bit",
        replace("exp_avg_code", lambda e: e["exp_avg_code"].float()),
        "is torch.float32",
    ),
    "moments twice": (torch.float32, "8bit", replace("exp_avg", lambda e: torch.zeros(64, 128)), "moments twice"),
    "v missing": (torch.float32, "fp32", lambda entry, _: entry.pop("exp_avg_sq"), "exp_avg_sq missing"),
    "shapes": (
        torch.float32,
        "fp32",
        replace("exp_avg_sq", lambda e: e["exp_avg_sq"][:5]),
        "exp_avg_sq has shape 5x128, exp_avg 64x128",
    ),
    "the weight's shape": (
        torch.float32,
        "fp32",
        lambda entry, _: entry.update({k: entry[k][:5] for k in ("exp_avg", "exp_avg_sq")}),
        "the weight has shape 64x128, its state 5x128",
    ),
    "no step": (torch.float32, "fp32", lambda entry, _: entry.pop("step"), "step is 'missing', no count"),
    "half a step": (torch.float32, "fp32", replace("step", lambda e: torch.tensor(2.5)), "no count"),
    "step 0": (torch.float32, "fp32", replace("step", lambda e: torch.tensor(0.0)), "step is 0, yet there are moments"),
    "a NaN weight": (
        torch.float32,
        "fp32",
        lambda entry, weight: weight.data.view(-1)[3:4].fill_(float("nan")),
        "the weight is NaN or infinite in 1",
    ),
    "a stale residual": (torch.bfloat16, "fp32", overwrite_weight, "stale residual in 2"),
    "a cast residual": (
        torch.bfloat16,
        "8bit",
        replace("residual", lambda e: e["residual"].float()),
        "residual is torch.float32",
    ),
    "a residual of others": (
        torch.bfloat16,
        "fp32",
        replace("residual", lambda e: e["residual"][:5]),
        "residual has shape 5x128",
    ),
    "a stale master": (torch.float16, "fp32", overwrite_half, "stale master in 3"),
    "whole numbers as moments": (
        torch.float32,
        "fp32",
        replace("exp_avg", lambda e: e["exp_avg"].long()),
        "could not be loaded: state 'exp_avg' of 0.weight is torch.int64",
    ),
    "complex moments": (
        torch.float32,
        "fp32",
        replace("exp_avg", lambda e: e["exp_avg"].cfloat()),
        "could not be loaded",
    ),
    "sparse moments": (torch.float32, "fp32", replace("exp_avg", lambda e: e["exp_avg"].to_sparse()), "layout torch.s"),
    "no values": (torch.float32, "fp32", replace("exp_avg", lambda e: e["exp_avg"].to("meta")), "on the meta device"),
    "truths as scales": (
        torch.float32,
        "8bit",
        replace("exp_avg_sq_scale", lambda e: e["exp_avg_sq_scale"] > 0),
        "could not be loaded",
    ),
    "a stream that is none": (torch.float32, "8bit", replace("stream", lambda e: "a"), "could not be loaded"),
    "a residual that is none": (torch.bfloat16, "fp32", replace("residual", lambda e: "a"), "could not be loaded"),
    "a step too far": (torch.float32, "fp32", replace("step", lambda e: torch.tensor(1e30)), "could not be loaded"),
    "a maximum below zero": (
        torch.float32,
        "amsgrad",
        change("max_exp_avg_sq", slice(2), -1.0),
        "max_exp_avg_sq is negative in 2",
    ),
}


@pytest.mark.parametrize(("dtype", "state_format", "spoil", "message"), ODD.values(), ids=ODD)
def test_what_is_odd_is_said_and_is_the_exit_status(dtype, state_format, spoil, message, capsys, tmp_path):
    amsgrad = state_format == "amsgrad"
    options = {"amsgrad": True} if amsgrad else {"state_format": state_format}
    model, optimizer = trained(dtype, named=True, **options)
    path = save(tmp_path / "a.pt", model, optimizer)
    saved = torch.load(path, weights_only=True)
    spoil(saved["optimizer"]["state"][0], saved["model"]["0.weight"])
    torch.save(saved, path)
    status, out, _ = run(capsys, "inspect", path)
    assert status == 1
    assert message in " ".join(out.split())
    assert "0.weight: " in out
    assert "nothing odd" not in out
    status, found = inspected(capsys, path)
    assert status == 1
    assert [name for name, each in found.items() if each["oddities"]] == ["0.weight"]


def test_state_of_no_parameter_is_odd(capsys, tmp_path):
    saved = copy.deepcopy(trained()[1].state_dict())
    saved["state"][7] = saved["state"].pop(3)
    saved["state"]["of a tool"] = {"a": 1}
    torch.save(saved, tmp_path / "a.pt")
    status, found = inspected(capsys, tmp_path / "a.pt")
    assert status == 1
    assert {name: each["oddities"] for name, each in found.items() if each["oddities"]} == {
        "parameter 7": ["it has state and is in no group"]
    }
    assert run(capsys, "convert", tmp_path / "a.pt", tmp_path / "a.pt", "--to", "8bit")[0] == 2  # as loading refuses it
    del saved["state"][7]
    torch.save(saved, tmp_path / "a.pt")
    assert run(capsys, "convert", tmp_path / "a.pt", tmp_path / "a.pt", "--to", "8bit")[0] == 0
    assert set(torch.load(tmp_path / "a.pt", weights_only=True)["state"]) == {0, 1, 2, "of a tool"}  # as loading does


@pytest.mark.parametrize("state_format", NAMES)
@pytest.mark.parametrize("size", [1e-30, 1e-23, 1e-12, 1e6])
def test_gradients_of_any_size_are_not_odd(size, state_format, capsys, tmp_path):
    """Squares of the smallest are 0 in float32, so that v is; and a row that is not used has none at all."""
    weight = nn.Parameter(torch.ones(64, 128))
    optimizer = optim.AdamW([("weight", weight)], state_format=state_format)
    for number in range(5):
        weight.grad = size * torch.randn(64, 128, generator=torch.Generator().manual_seed(number))
        weight.grad[7] = 0.0
        optimizer.step()
    torch.save({"model": {"weight": weight.detach()}, "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    status, found = inspected(capsys, tmp_path / "a.pt")
    assert (status, found["weight"]["oddities"]) == (0, [])


@pytest.mark.parametrize("named", [False, True])
def test_weights_of_others_are_not_taken_for_the_parameters(named, capsys, tmp_path):
    """Of a mean of weights beside the weights, of a larger model, of groups in another order than the model's."""
    one, two = trained(torch.float16, named=named), (nn.Linear(9, 3).half(), None)
    train(two[0], optimizer := optim.AdamW(two[0].named_parameters() if named else two[0].parameters()))
    mean = {name: each + 1 for name, each in one[0].state_dict().items()}
    tree = {"one": one[0].state_dict(), "two": two[0].state_dict(), "a": one[1].state_dict()}
    torch.save(tree | {"b": optimizer.state_dict()}, tmp_path / "a.pt")
    _, out, _ = run(capsys, "inspect", tmp_path / "a.pt", "--json")
    for states in json.loads(out).values():
        assert all(each["update_ratio"] > 0 and not each["oddities"] for each in states)
    torch.save({"mean": mean} | tree, tmp_path / "b.pt")
    assert run(capsys, "inspect", tmp_path / "b.pt")[0] == 0

    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(2))).half()
    last_first = [{"params": [layer.weight], "lr": 0.1} for layer in reversed(model)]
    train(model, optimizer := optim.AdamW(last_first))
    status, found = inspected(capsys, save(tmp_path / "c.pt", model, optimizer))
    assert (status, [each["update_ratio"] for each in found.values()]) == (0, [None, None])


def test_moments_are_not_taken_for_weights(tmp_path):
    _, optimizer = trained(torch.float64)
    torch.save({"optimizer": optimizer.state_dict(), "model": {"a": torch.ones(2)}}, tmp_path / "a.pt")
    assert [list(model) for model in read(tmp_path / "a.pt").models()] == [["a"]]


def test_the_version_is_of_what_is_saved_not_of_the_optimizer():
    _, optimizer = trained()
    optimizer.load_state_dict(optimizer.state_dict())
    assert "state_version" not in optimizer.param_groups[0]


def test_buffers_and_tied_weights_are_left_out_in_order(capsys, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    train(model, optimizer := optim.AdamW(model.parameters(), lr=0.1))
    _, found = inspected(capsys, save(tmp_path / "a.pt", model, optimizer))
    assert len(found) == 5
    assert all(each["update_ratio"] > 0 for each in found.values())


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}])
@pytest.mark.parametrize("make", [optim.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_the_largest_ratio_is_of_what_the_update_divides_by(dtype, make, options, capsys, tmp_path):
    weight = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = make([weight], lr=0.1, betas=(0.9, 0.9), **options)
    for size in (100.0, 1.0, 1.0, 1.0):
        weight.grad = torch.full((4,), size, dtype=dtype)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    (each,) = inspected(capsys, tmp_path / "a.pt")[1].values()
    entry = optimizer.state[weight]
    v = entry["max_exp_avg_sq" if options else "exp_avg_sq"]
    wanted = float((entry["exp_avg"].real / v.real.sqrt()).max())
    assert each["max_m_over_sqrt_v"] == pytest.approx(wanted)


@pytest.mark.parametrize("betas", [None, (0.9, 0.9, 0.9), (0.9, 1.0), ("a", 0.9)])
def test_without_betas_there_is_no_ratio(betas, capsys, tmp_path):
    model, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["betas"] = betas
    torch.save({"model": model.state_dict(), "optimizer": saved}, tmp_path / "a.pt")
    status, found = inspected(capsys, tmp_path / "a.pt")
    assert (status, {each["update_ratio"] for each in found.values()}) == (0, {None})


def test_a_picture(tmp_path, capsys):
    model, optimizer = trained(state_format="8bit", named=True)
    path = save(tmp_path / "a.pt", model, optimizer)
    assert run(capsys, "inspect", path, "--plot", tmp_path / "a.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# What is converted


def loaded_anew(dtype, saved, **options):
    """An optimizer of a new model that has loaded a state."""
    model = make_model(dtype)
    optimizer = optim.AdamW(model.named_parameters(), **options)
    optimizer.load_state_dict(saved)
    return model, optimizer


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize(("dtype", "state_format", "amsgrad"), KINDS)
def test_a_converted_state_is_what_loading_makes_of_it(dtype, state_format, amsgrad, target, capsys, tmp_path):
    model, optimizer = trained(dtype, state_format=state_format, amsgrad=amsgrad, named=True, weight_decay=0.3, seed=5)
    path = save(tmp_path / "a.pt", model, optimizer, epoch=7)
    assert run(capsys, "convert", path, tmp_path / "b.pt", "--to", target)[0] == 0
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert after["epoch"] == 7
    assert all(torch.equal(after["model"][key], value) for key, value in before["model"].items())
    (group,) = after["optimizer"]["param_groups"]
    assert group == before["optimizer"]["param_groups"][0] | {"state_format": target}
    one = loaded_anew(dtype, before["optimizer"], state_format=target, amsgrad=amsgrad)
    two = loaded_anew(dtype, after["optimizer"], state_format=target, amsgrad=amsgrad)
    assert_same(results(two[1]), results(one[1]), "loaded")
    entries = [one[1].state[param] for param in one[0].parameters()]
    assert [set(entry) for entry in after["optimizer"]["state"].values()] == [set(entry) for entry in entries]
    for model, optimizer in (one, two):
        train(model, optimizer, seed=1)
    assert_same(results(two[1]), results(one[1]), "trained on")
    assert inspected(capsys, tmp_path / "b.pt")[0] == 0


@pytest.mark.parametrize("name", golden.KINDS)
@pytest.mark.parametrize("target", [*NAMES, "torch"])
def test_old_checkpoints_are_converted(name, target, capsys, tmp_path):
    status, _, err = run(capsys, "convert", golden.HERE / f"{name}.pt", tmp_path / "a.pt", "--to", target)
    assert (status, err) == (0, "")
    assert inspected(capsys, tmp_path / "a.pt")[0] == 0


@pytest.mark.parametrize(("dtype", "state_format", "amsgrad"), KINDS)
def test_torch_loads_what_was_converted_for_it(dtype, state_format, amsgrad, capsys, tmp_path):
    model, optimizer = trained(dtype, state_format=state_format, amsgrad=amsgrad)
    path = save(tmp_path / "a.pt", model, optimizer)
    assert run(capsys, "convert", path, tmp_path / "b.pt", "--to", "torch")[0] == 0
    saved = torch.load(tmp_path / "b.pt", weights_only=True)["optimizer"]
    assert not {"beta1", "state_format", "state_version", "seed"} & saved["param_groups"][0].keys()
    models, optimizers = [], []
    for state in (saved, optimizer.torch_state_dict()):
        models.append(copy.deepcopy(model))
        optimizers.append(torch.optim.AdamW(models[-1].parameters(), amsgrad=amsgrad))
        optimizers[-1].load_state_dict(state)
        train(models[-1], optimizers[-1], seed=1)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, two)
    assert optimizers[0].param_groups[0]["lr"] == 0.01


def test_torchs_state_becomes_ours(capsys, tmp_path):
    model, theirs = trained(make=torch.optim.AdamW, betas=(0.8, 0.95), weight_decay=0.2)
    path = save(tmp_path / "a.pt", model, theirs)
    assert run(capsys, "convert", path, path, "--to", "8bit")[0] == 0
    saved = torch.load(path, weights_only=True)["optimizer"]
    (group,) = saved["param_groups"]
    assert (group["beta1"], group["beta2"], group["weight_decay"], group["state_version"]) == (0.8, 0.95, 0.2, 1)
    models = [copy.deepcopy(model), copy.deepcopy(model)]
    optimizers = [optim.AdamW(each.parameters(), state_format="8bit") for each in models]
    for each, state in zip(optimizers, (saved, theirs.state_dict()), strict=True):
        each.load_state_dict(state)
    assert_same(results(optimizers[0]), results(optimizers[1]))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("target", [*NAMES, "torch"])
def test_a_converted_folder_is_loaded_by_torchs_own_functions(target, flat, capsys, tmp_path):
    model, optimizer = trained(state_format="bf16")
    source = save_folder(tmp_path / "a", model, optimizer, flat=flat)
    assert run(capsys, "convert", source, tmp_path / "b", "--to", target)[0] == 0
    other = make_model()
    if target == "torch":
        theirs = torch.optim.AdamW(other.parameters())
    else:
        theirs = optim.AdamW(other.parameters(), state_format=target)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    room = {"optimizer": get_optimizer_state_dict(other, theirs, options=options)}
    dcp.load(room, checkpoint_id=tmp_path / "b", no_dist=True)
    set_optimizer_state_dict(other, theirs, room["optimizer"], options=options)
    wanted = optimizer.torch_state_dict()["state"]
    found = theirs.state_dict()["state"] if target == "torch" else theirs.torch_state_dict()["state"]
    for number, entry in wanted.items():
        assert found[number]["step"] == entry["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            exact = target in ("bf16", "fp32", "torch")
            torch.testing.assert_close(
                found[number][key], entry[key], rtol=0 if exact else 0.2, atol=0 if exact else 1e-3
            )


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_converted_folder_is_what_loading_makes_of_it(named, flat, capsys, tmp_path):
    """What draws are keyed with, too: of 8-bit state, small parameters have none yet."""
    model, optimizer = trained(state_format="8bit", named=named, seed=5)
    source = save_folder(tmp_path / "a", model, optimizer, flat=flat)
    assert run(capsys, "convert", source, tmp_path / "b", "--to", "bf16")[0] == 0
    loaded = []
    for folder in ("a", "b"):
        other = make_model()
        optimizer = optim.AdamW(other.named_parameters() if named else other.parameters(), state_format="bf16")
        load_optimizer(other, optimizer, tmp_path / folder)
        loaded.append(results(optimizer))
    assert_same(*loaded)


def test_a_folder_becomes_a_file_and_a_file_a_folder(capsys, tmp_path):
    model, optimizer = trained(state_format="8bit", named=True)
    source = save_folder(tmp_path / "a", model, optimizer)
    assert run(capsys, "convert", source, tmp_path / "b.pt", "--to", "fp32")[0] == 0
    saved = torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(saved["optimizer"]["state"]) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert run(capsys, "convert", tmp_path / "b.pt", f"{tmp_path / 'c'}/", "--to", "8bit")[0] == 0
    one, two = (inspected(capsys, tmp_path / name)[1] for name in ("a", "c"))
    assert one == two

    numbered = save(tmp_path / "d.pt", *trained())
    assert run(capsys, "convert", numbered, f"{tmp_path / 'e'}/", "--to", "8bit")[0] == 0
    assert run(capsys, "convert", tmp_path / "e", tmp_path / "f.pt", "--to", "fp32")[0] == 0
    other = optim.AdamW(make_model().parameters())
    other.load_state_dict(torch.load(tmp_path / "f.pt", weights_only=True)["optimizer"])
    assert float(other.state_dict()["state"][3]["step"]) == 3.0


def test_what_is_said_of_a_conversion(capsys, tmp_path):
    path = save(tmp_path / "a.pt", *trained())
    status, out, err = run(capsys, "convert", path, tmp_path / "b.pt", "--to", "8bit")
    assert (status, err) == (0, "")
    assert "b.pt: 8bit state of 4 parameters, 18.5 KiB" in " ".join(out.split())
    status, out, _ = run(capsys, "convert", path, tmp_path / "b.pt", "--to", "8bit", "--json")
    assert json.loads(out) == {
        "source": str(path),
        "target": str(tmp_path / "b.pt"),
        "to": "8bit",
        "parameters": 4,
        "bytes_before": 2 * 4 * (64 * 129 + 3 * 65) + 4 * 4,
        "bytes_after": 64 * 128 * 2 + 64 * 8 + 2 * 4 * (64 + 3 * 65) + 4 * 4 + 8,
        "notes": [],
    }


# What is written


NOT_CONVERTED = {
    "another optimizer's": (lambda path: save(path, *trained(make=torch.optim.SGD, momentum=0.9)), "exp_avg"),
    "a wrong shape": (
        lambda path: torch.save(
            {
                "state": {0: {"step": 1, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(4)}},
                "param_groups": [{"params": [0], "lr": 0.1, "betas": (0.9, 0.99)}],
            },
            path,
        ),
        r"exp_avg_sq.*\(4,\)",
    ),
    "safetensors": (lambda path: save_file({"a": torch.ones(2)}, path), "safetensors"),
}


@pytest.mark.parametrize(("make", "message"), NOT_CONVERTED.values(), ids=NOT_CONVERTED)
def test_what_cannot_be_converted_leaves_no_file(make, message, capsys, tmp_path):
    path = tmp_path / ("a.safetensors" if message == "safetensors" else "a.pt")
    make(path)
    status, _, err = run(capsys, "convert", path, tmp_path / "b.pt", "--to", "8bit")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert re.search(message, err)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("target", ["there/", "there", "nowhere/b.pt"])
def test_where_nothing_can_be_written_is_said_before_the_work(target, capsys, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    path = save(tmp_path / "a.pt", *trained())
    monkeypatch.setattr("lucid.cli.convert.converted", None)
    status, _, err = run(capsys, "convert", path, f"{tmp_path}/{target}", "--to", "8bit")
    assert status == 2
    assert "expected" in err or "name another" in err


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("when", ["save", "fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(when, there, capsys, tmp_path, monkeypatch):
    path, target = save(tmp_path / "a.pt", *trained()), tmp_path / "b.pt"
    if there:
        target.write_bytes(b"what was there")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    where = {"save": (torch, "save"), "fsync": (writing.os, "fsync"), "replace": (writing.Path, "replace")}
    monkeypatch.setattr(*where[when], full)
    status, _, err = run(capsys, "convert", path, target, "--to", "8bit")
    assert status == 2
    assert "No space left on device" in err
    assert sorted(each.name for each in tmp_path.iterdir()) == (["a.pt", "b.pt"] if there else ["a.pt"])
    assert not there or target.read_bytes() == b"what was there"


@pytest.mark.parametrize("target", ["b.pt", "b/"])
def test_a_file_that_may_not_grow_is_a_full_disk(target, tmp_path):
    """A real one: torch's writers make errors of their own of it."""
    path = save(tmp_path / "a.pt", *trained())
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))\n"
    code += "from lucid.cli import main\nsys.exit(main(sys.argv[1:]))"
    arguments = ["convert", str(path), f"{tmp_path}/{target}", "--to", "fp32"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("nothing was changed: [Errno 27] File too large")
    assert "Traceback" not in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("there", [False, True])
def test_what_a_link_leads_to_is_written(there, capsys, tmp_path):
    source = save(tmp_path / "a.pt", *trained())
    (tmp_path / "run").mkdir()
    real, link = tmp_path / "run" / "real.pt", tmp_path / "link.pt"
    link.symlink_to("run/real.pt")
    if there:
        real.write_bytes(source.read_bytes())
        source = link
    assert run(capsys, "convert", source, link, "--to", "8bit")[0] == 0
    assert link.is_symlink()
    assert inspected(capsys, real)[1]["parameter 0"]["format"] == "8bit"
    link.unlink()
    link.symlink_to("nowhere/real.pt")
    assert run(capsys, "convert", real, link, "--to", "8bit")[0] == 2


def test_a_pipe_is_not_replaced(capsys, tmp_path):
    path = save(tmp_path / "a.pt", *trained())
    os.mkfifo(tmp_path / "pipe.pt")
    status, _, err = run(capsys, "convert", path, tmp_path / "pipe.pt", "--to", "8bit")
    assert status == 2
    assert "a device or pipe" in err
    assert (tmp_path / "pipe.pt").is_fifo()


@pytest.mark.parametrize("target", ["8bit", "torch"])
def test_groups_without_parameters_are_converted_too(target, capsys, tmp_path):
    model = make_model()
    optimizer = optim.AdamW([{"params": []}, {"params": model.parameters(), "lr": 0.1}])
    train(model, optimizer)
    path = save(tmp_path / "a.pt", model, optimizer)
    assert run(capsys, "convert", path, path, "--to", target)[0] == 0
    empty, full = torch.load(path, weights_only=True)["optimizer"]["param_groups"]
    assert (empty["params"], empty["lr"], full["lr"]) == ([], 0.001, 0.1)
    assert empty.keys() == full.keys()
    assert empty.get("state_format") == (None if target == "torch" else target)


def test_a_tuple_stays_one(capsys, tmp_path):
    optimizers = ({"optimizer": trained()[1].state_dict()}, 3)
    torch.save({"all": optimizers}, tmp_path / "a.pt")
    assert run(capsys, "convert", tmp_path / "a.pt", tmp_path / "b.pt", "--to", "8bit")[0] == 0
    assert type(torch.load(tmp_path / "b.pt", weights_only=True)["all"]) is tuple


KILLED = """
import io, pathlib, sys, time
import torch
from torch.distributed.checkpoint import state_dict_saver
from lucid.cli import main

part, source, target, torn = float(sys.argv[1]), *sys.argv[2:]
whole = torch.save
whole_folder = state_dict_saver.save

def save(value, file, **options):
    if hasattr(file, "getbuffer"):  # of a folder's value
        return whole(value, file, **options)
    buffer = io.BytesIO()
    whole(value, buffer)
    file.write(buffer.getvalue()[: int(part * buffer.tell())])
    file.flush()
    pathlib.Path(torn).touch()
    time.sleep(100)

def save_folder(tree, checkpoint_id, **options):
    whole_folder(tree, checkpoint_id=checkpoint_id, **options)
    contents = pathlib.Path(checkpoint_id) / ".metadata"
    if part < 1:
        contents.unlink()
    pathlib.Path(torn).touch()
    time.sleep(100)

torch.save = save
state_dict_saver.save = save_folder
main(["convert", source, target, "--to", "8bit"])
"""


def killed(part, source, target, torn):
    """Kill a conversion that has written a part of what it writes."""
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(part), str(source), str(target), str(torn)]
    )
    deadline = time.monotonic() + 120
    try:
        while not torn.exists():
            assert time.monotonic() < deadline, "nothing was written within two minutes"
            assert child.poll() is None, "it ended by itself"
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    torn.unlink()


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_a_conversion_in_place_that_is_killed_leaves_the_file(part, capsys, tmp_path):
    path = save(tmp_path / "a.pt", *trained())
    before = path.read_bytes()
    killed(part, path, path, tmp_path / "torn")
    assert path.read_bytes() == before
    assert run(capsys, "convert", path, path, "--to", "8bit")[0] == 0
    assert inspected(capsys, path)[1]["parameter 0"]["format"] == "8bit"


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_a_folder_whose_conversion_is_killed_is_not_there(part, capsys, tmp_path):
    source, target = save_folder(tmp_path / "a", *trained()), tmp_path / "b"
    killed(part, source, target, tmp_path / "torn")
    assert not target.exists()
    assert inspected(capsys, source)[0] == 0
    assert run(capsys, "convert", source, target, "--to", "8bit")[0] == 0


def test_a_written_file_may_be_read_by_those_who_could_before(capsys, tmp_path):
    path = save(tmp_path / "a.pt", *trained())
    path.chmod(0o640)
    assert run(capsys, "convert", path, path, "--to", "8bit")[0] == 0
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(("target", "mode"), [("b.pt", 0o640), ("b/", 0o750)])
def test_what_is_new_has_the_mode_of_the_umask_and_outlives_a_power_cut(target, mode, capsys, tmp_path, monkeypatch):
    path = save(tmp_path / "a.pt", *trained())
    synced = []
    monkeypatch.setattr(writing, "_sync_folder", synced.append)
    before = os.umask(0o027)
    try:
        assert run(capsys, "convert", path, f"{tmp_path}/{target}", "--to", "8bit")[0] == 0
    finally:
        os.umask(before)
    assert (tmp_path / target).stat().st_mode & 0o777 == mode
    assert synced == [tmp_path]


def test_values_that_are_no_tensors_are_read_as_cautiously_by_load_optimizer(tmp_path, capfd):
    model, optimizer = trained()
    folder = save_folder(tmp_path / "a", model, optimizer)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    capfd.readouterr()
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print"):
        load_optimizer(model, optimizer, folder)
    assert capfd.readouterr().out == ""


def test_pickles_of_the_test_are_dangerous(capfd):
    """Else the tests above prove nothing."""
    pickle.load(io.BytesIO(pickle.dumps(Evil())))
    assert capfd.readouterr().out == "EVIL\n"
