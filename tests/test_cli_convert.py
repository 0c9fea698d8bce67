"""Guards `lucid convert`: a converted state is what loading would have made of it, and a crash keeps what was there."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import lucid.optim as optim
from bits import assert_same, results
from commands import KINDS, inspected, make_model, run, save, save_folder, train, trained
from golden import make as golden
from lucid.cli import writing
from lucid.engine.formats import NAMES
from lucid.optim.checkpoint import load_optimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature"),
]


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_a_conversion_in_place_that_is_killed_leaves_the_file(part, capsys, tmp_path):
    path = save(tmp_path / "a.pt", *trained())
    before = path.read_bytes()
    killed(part, path, path, tmp_path / "torn")
    assert path.read_bytes() == before
    assert run(capsys, "convert", path, path, "--to", "8bit")[0] == 0
    assert inspected(capsys, path)[1]["parameter 0"]["format"] == "8bit"


@pytest.mark.slow
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
