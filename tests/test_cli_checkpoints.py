"""Guards what `lucid inspect` and `lucid convert` read: checkpoints wherever states are in them, and nothing that runs
code.

What cannot be read, cut, hostile or of a later version, is refused with a sentence. What is found in a checkpoint is
in test_cli_inspect.py, what is made of it in test_cli_convert.py.
"""

import contextlib
import io
import json
import os
import pickle
import pty
import subprocess
import sys
import termios

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
)

from commands import inspected, make_model, run, save, save_folder, trained
from lucid.cli import checkpoints, main
from lucid.cli.checkpoints import CommandError, read
from lucid.optim import distributed_files
from lucid.optim.checkpoint import load_optimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature"),
]


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
    "a class changed by a folder's contents": (changed_classes, "its .metadata changes"),
    "a dataclass changed by a folder's contents": (changed_dataclass, "its .metadata changes"),
    "a process's part": (part_of_a_process, "is one process's part of tensors"),
    "a function changed by a folder's contents": (changed_function, "its .metadata changes"),
    "a list without end": (long_list, r"checkpoint: its \.metadata has a list of more than [\d,]+ values$"),
    "no places in files": (no_places, "has str for a place in a file"),
    "state of a later version": (later_version, "its state has version 2"),
    "flat state of a later version": (later_version_flat, "its state has version 2"),
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


@pytest.mark.slow
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


# What is written


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
