"""Guards `lucid inspect` and `lucid convert` from what is no checkpoint, and from state under keys that nobody expects.

Each file, folder, key and value here gets one sentence (what was expected, what came, what to do), nothing of it runs,
nothing is written, and state is never left unused without a word.
"""

import bz2
import copy
import functools
import gzip
import io
import itertools
import json
import lzma
import operator
import os
import pickle
import random
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint as dcp

from asked import inspected, refused, run, state_dict, trained
from lucid.cli import reading

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


class Evil:
    def __reduce__(self):
        return print, ("EVIL",)


# Files that are no checkpoint


def good():
    buffer = io.BytesIO()
    torch.save({"optimizer": state_dict()}, buffer)
    return buffer.getvalue()


def before_torch_1_6():
    buffer = io.BytesIO()
    torch.save(state_dict(), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def archive(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return buffer.getvalue()


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        info = tarfile.TarInfo("model.pt")
        file.addfile(info, io.BytesIO(b""))
    return buffer.getvalue()


def written(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def torchscript():
    return written(lambda file: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file))


def safetensors(tmp_path, change=lambda content: content):
    save_file({"a": torch.ones(100)}, tmp_path / "of.safetensors")
    content = change((tmp_path / "of.safetensors").read_bytes())
    (tmp_path / "of.safetensors").unlink()
    return content


FILES = {
    "nothing": (lambda: b"", "expected a file that torch.save wrote, got an empty file; copy or save it again"),
    "text": (lambda: b"hello, I am text", r"got text \('hello, I am text'\); check the path"),
    "one letter": (lambda: b"e", r"got text \('e'\)"),
    "text of Windows": ("hello".encode("utf-16"), r"got text \('hello'\)"),
    "a web page": (lambda: b"<!DOCTYPE html>" + 90 * b"x", r"got text \('<!DOCTYPE html>x+'\.\.\.\)"),
    "a pointer of LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "got a pointer of Git LFS"),
    "zeros": (lambda: bytes(5000), "got zeros, as a crash leaves"),
    "noise": (lambda: random.Random(3).randbytes(999), r"got unknown bytes \([0-9a-f ]{23} \.\.\.\); check the path"),
    "a picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(99), r"got unknown bytes \(89 50 4e 47"),
    "gzip": (lambda: gzip.compress(good()), "got a file packed by gzip; unpack it first"),
    "bzip2": (lambda: bz2.compress(good()), "got a file packed by bzip2"),
    "xz": (lambda: lzma.compress(good()), "got a file packed by xz"),
    "tar": (tar, "got a tar archive; unpack it"),
    "a zip archive": (lambda: archive(a_dot_txt="hello"), r"got a zip archive \(a\.txt\)"),
    "an empty zip archive": (archive, r"got a zip archive \(with nothing in it\)"),
    "arrays of numpy": (lambda: written(lambda file: np.savez(file, a=np.ones(3))), r"got arrays of numpy \(a\.npy\)"),
    "an array of numpy": (lambda: written(lambda file: np.save(file, np.ones(3))), "got an array of numpy"),
    "a program": (torchscript, "got a program of TorchScript; save state dicts"),
    "a pickle": (lambda: pickle.dumps({"a": 1}), "got a pickle that torch.save did not write; if you trust"),
    "a pickle of state": (lambda: pickle.dumps(state_dict(), 2), "got a pickle that torch.save did not write"),
    "a pickle cut short": (lambda: pickle.dumps({"a": 1}, 2)[:-3], "got a pickle that torch.save did not write"),
    "a pickle of code": (lambda: pickle.dumps(Evil()), "got a pickle that torch.save did not write"),
    "cut in its head": (lambda: good()[:20], "got a zip archive, as torch.save writes, that is damaged or cut short"),
    "cut in the middle": (lambda: good()[: len(good()) // 2], "damaged or cut short; copy or save it again"),
    "cut in its end": (lambda: good()[:-30], "damaged or cut short"),
    "without its start": (lambda: good()[100:], "got unknown bytes"),
    "contents of noise": (lambda: archive(x__data_dot_pkl="hi", x__version="3"), "but it cannot be read .*KeyError"),
    "contents cut short": (
        lambda: archive(x__data_dot_pkl=b"\x80\x02}q", x__version="3"),
        "it is damaged or cut short",
    ),
    "old, cut in its head": (lambda: before_torch_1_6()[:30], "a file that torch.save wrote, but it cannot be read"),
    "old, cut early": (lambda: before_torch_1_6()[:400], "damaged or cut short"),
    "old, cut late": (lambda: before_torch_1_6()[:-400], "damaged or cut short"),
    "code": (
        lambda: written(lambda file: torch.save(Evil(), file)),
        "could run any code .it names print.; if you trust",
    ),
    "a whole model": (lambda: written(lambda file: torch.save(nn.Linear(2, 2), file)), "names torch.nn.modules.linear"),
    "another protocol": (
        lambda: written(lambda file: torch.save({"a": 1}, file, pickle_protocol=4)),
        "expected what torch.save pickles by default, got .* with another pickle_protocol; if you trust",
    ),
    "an array in it": (
        lambda: written(lambda file: torch.save({"a": np.ones(3)}, file)),
        "it holds arrays or other values of numpy .* if you trust whoever made it",
    ),
    "a date of numpy": (
        lambda: written(lambda file: torch.save({"a": np.datetime64(3, "s")}, file)),
        "it holds a numpy value of dtype 'M8', which is not a number",
    ),
    "a tensor": (lambda: written(lambda file: torch.save(torch.ones(2), file)), "expected a dict .* got Tensor; save"),
    "a list": (lambda: written(lambda file: torch.save([1], file)), "expected a dict .* got list"),
    "None": (lambda: written(lambda file: torch.save(None, file)), "expected a dict .* got NoneType"),
    "an empty dict": (lambda: written(lambda file: torch.save({}, file)), "found none .it holds nothing.; save"),
    "weights": (
        lambda: written(lambda file: torch.save(trained()[0].state_dict(), file)),
        "got a model's weights alone; give the file with optimizer.state_dict",
    ),
}


@pytest.mark.parametrize(("make", "message"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_checkpoint_is_told_what_it_is(make, message, capfd, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(make if isinstance(make, bytes) else make())
    sentence = refused(capfd, path, tmp_path)
    assert re.search(message, sentence)
    assert "; " in sentence or "trust" in sentence


def test_a_file_of_safetensors_is_none_of_torchs_and_the_other_way_round(capfd, tmp_path):
    def sentence(name, content):
        (tmp_path / name).write_bytes(content)
        return refused(capfd, tmp_path / name, tmp_path)

    whole = safetensors(tmp_path)
    assert "got a file of safetensors; give it a name that ends in .safetensors" in sentence("a.pt", whole)
    assert "got a file that torch.save wrote; give it a name that ends in .pt" in sentence("a.safetensors", good())
    assert "expected a file of safetensors, got an empty file" in sentence("a.safetensors", b"")
    for cut in (20, len(whole) - 4):
        assert "a file of safetensors, but it cannot be read" in sentence("a.safetensors", whole[:cut])
    assert "expected a file of safetensors, got unknown bytes" in sentence("a.safetensors", whole[:5] + b"\xff" * 9)


def test_weights_are_no_optimizers_state(capfd, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(safetensors(tmp_path))
    for arguments, message in (
        (
            ["inspect", tmp_path / "a.safetensors"],
            "which hold tensors alone; give the file with optimizer.state_dict()",
        ),
        (["convert", tmp_path / "a.safetensors", "b", "--to", "8bit"], "safetensors files hold no optimizer state"),
    ):
        status, _, err = run(capfd, *arguments)
        assert status == 2
        assert message in err


def test_weights_that_are_none_are_refused(capfd, tmp_path):
    torch.save(state_dict(), tmp_path / "a.pt")
    for name, content in (("b.pt", {"lr": 0.1}), ("c.pt", state_dict())):
        torch.save(content, tmp_path / name)
        status, out, err = run(capfd, "inspect", tmp_path / "a.pt", "--weights", tmp_path / name)
        assert (status, out) == (2, "")
        assert err == f"lucid: --weights {tmp_path / name}: expected a model's weights in it, found none\n"


def test_who_may_not_read_is_told_so(capfd, tmp_path, monkeypatch):
    """Of torch's reader, and of a link that leads in a circle."""
    (tmp_path / "a.pt").write_bytes(good())

    def closed(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "a.pt"))

    monkeypatch.setattr(reading.weights_only, "load", closed)
    assert "Permission denied" in refused(capfd, tmp_path / "a.pt", tmp_path)
    (tmp_path / "circle.pt").symlink_to("circle.pt")
    assert refused(capfd, tmp_path / "circle.pt", tmp_path)
    os.mkfifo(tmp_path / "pipe.pt")
    assert "got a device or pipe; copy it" in refused(capfd, tmp_path / "pipe.pt", tmp_path)


# Folders that are no checkpoint


def folder(path):
    dcp.save({"optimizer": state_dict()}, checkpoint_id=path, no_dist=True)


def contents(content):
    def make(path):
        folder(path)
        (path / ".metadata").write_bytes(content)

    return make


def parts(change):
    def make(path):
        folder(path)
        for part in path.glob("*.distcp"):
            change(part)

    return make


def file_in(name):
    def make(path):
        path.mkdir()
        (path / name).write_bytes(good())

    return make


FOLDERS = {
    "nothing": (lambda path: path.mkdir(), "got one with neither$"),
    "a file in it": (file_in("x.pt"), r"got one with neither; give one of its files, like .*x\.pt$"),
    "an index": (file_in("model.safetensors.index.json"), "got one with neither$"),
    "not saved to the end": (
        lambda path: folder(path) or (path / ".metadata").unlink(),
        "its saving did not end, so take an earlier checkpoint",
    ),
    "no contents": (contents(b""), "cannot be read as a checkpoint's folder: .*copy or save it again"),
    "contents of text": (contents(b"hello"), "cannot be read as a checkpoint's folder"),
    "contents cut short": (contents(b"\x80\x04\x95"), "cannot be read as a checkpoint's folder"),
    "contents of code": (
        contents(pickle.dumps(Evil())),
        r"names builtins\.print, which does not belong in a checkpoint",
    ),
    "a part is missing": (parts(lambda part: part.unlink()), r"No such file or directory \(__0_0\.distcp\)"),
    "a part is empty": (parts(lambda part: part.write_bytes(b"")), "damaged, cut short or missing"),
    "a part of noise": (
        parts(lambda part: part.write_bytes(random.Random(1).randbytes(part.stat().st_size))),
        "damaged, cut short or missing",
    ),
}


@pytest.mark.parametrize(("make", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_is_no_checkpoint_is_told_why(make, message, capfd, tmp_path):
    make(tmp_path / "a")
    sentence = refused(capfd, tmp_path / "a", tmp_path)
    assert re.search(message, sentence)


# State under keys that nobody expects


def rekeyed(change, **options):
    saved = state_dict(**options)
    saved["state"] = {change(key): entry for key, entry in saved["state"].items()}
    return saved


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("to", ["8bit", "torch"])
def test_numbers_as_text_are_the_numbers(to, groups, capsys, tmp_path):
    """As a conversion to safetensors or JSON leaves them, in the state or in the groups."""
    saved = state_dict() if groups else rekeyed(str)
    if groups:
        saved["param_groups"][0]["params"] = ["0", "1", "2", "3"]
    torch.save(saved, tmp_path / "a.pt")
    torch.save(state_dict(), tmp_path / "b.pt")
    (status, found, _), (_, wanted, _) = (inspected(capsys, tmp_path / name) for name in ("a.pt", "b.pt"))
    assert (status, len(found)) == (0, 4)
    assert found == {name: each | {"no_weight": found[name]["no_weight"]} for name, each in wanted.items()}
    for name in ("a", "b"):
        assert run(capsys, "convert", tmp_path / f"{name}.pt", tmp_path / f"{name}2.pt", "--to", to)[0] == 0
    one, two = (torch.load(tmp_path / f"{name}2.pt", weights_only=True)["state"] for name in ("a", "b"))
    assert list(one) == (["0", "1", "2", "3"] if groups else [0, 1, 2, 3])
    for entry, other in zip(one.values(), two.values(), strict=True):
        assert entry.keys() == other.keys()
        assert all(torch.equal(entry[key], other[key]) for key in entry)


def test_what_is_there_twice_is_that_of_the_groups_own_key(capsys, tmp_path):
    saved = state_dict()
    wrong = {str(key): {name: value + 1 for name, value in entry.items()} for key, entry in saved["state"].items()}
    for name, state in (("a", saved["state"] | wrong), ("b", wrong | saved["state"])):
        torch.save(saved | {"state": state}, tmp_path / f"{name}.pt")
        status, out, _ = run(capsys, "inspect", tmp_path / f"{name}.pt", "--json")
        states = json.loads(out)["the optimizer"]
        assert (status, len(states)) == (1, 8)
        assert [each["step"] for each in states[:4]] == [2.0] * 4
        assert [each["oddities"] for each in states[4:]] == [["it has state and is in no group"]] * 4


UNKNOWN_KEYS = {
    "names": (lambda key: f"state.{key}", "key 'state.0'", "'state.0', 'state.1'"),
    "padded": (lambda key: f"0{key}", "parameter 00", "'00', '01'"),
    "addresses": (lambda key: 140_000_000 + key, "parameter 140000000", "140000000, 140000001"),
    "tuples": (lambda key: (key,), "key (0,)", "(0,), (1,)"),
    "bytes": (lambda key: str(key).encode(), "key b'0'", "b'0', b'1'"),
    "tensors": (torch.tensor, "key tensor(0)", "tensor(0), tensor(1)"),
    "half numbers": (lambda key: key + 0.5, "key 0.5", "0.5, 1.5"),
}


@pytest.mark.parametrize(("change", "name", "listed"), UNKNOWN_KEYS.values(), ids=UNKNOWN_KEYS)
def test_state_that_no_group_knows_is_not_left_without_a_word(change, name, listed, capsys, tmp_path):
    torch.save(rekeyed(change), tmp_path / "a.pt")
    status, found, text = inspected(capsys, tmp_path / "a.pt")
    assert status == 1
    assert len(found) == 4
    assert f"{name}: it has state and is in no group" in text
    status, _, err = run(capsys, "convert", tmp_path / "a.pt", tmp_path / "b.pt", "--to", "8bit")
    assert status == 2
    assert "expected state under the keys that the groups of the optimizer have (0, 1, 2, 3), got " + listed in err
    assert "rename them" in err
    assert not (tmp_path / "b.pt").exists()


def test_state_of_which_some_belongs_to_no_parameter_is_refused_as_loading_does(capsys, tmp_path):
    saved = rekeyed(lambda key: key if key < 3 else 4)
    torch.save(saved, tmp_path / "a.pt")
    status, _, err = run(capsys, "convert", tmp_path / "a.pt", tmp_path / "b.pt", "--to", "8bit")
    assert (status, "of the optimizer have (0, 1, 2, 3), got 4; rename" in err) == (2, True)
    with pytest.raises(ValueError, match=r"expected the keys that groups have .* got state of 4"):
        trained()[1].load_state_dict(saved)


def change_of(**changes):
    return lambda saved: saved["param_groups"][0].update(changes)


KEYS = {
    "numbers with a point": (change_of(params=[0.0, 1.0, 2.0, 3.0]), r"got 0\.0 of type float; save optimizer"),
    "tensors": (change_of(params=[torch.tensor(0), 1, 2, 3]), r"got tensor\(0\) of type Tensor"),
    "a tensor": (
        change_of(params=torch.arange(4)),
        "got one that cannot be used .in the optimizer.: 'state' has to be",
    ),
    "a number and its text": (change_of(params=[0, "0", 1, 2]), "once in 'params', got '0' twice"),
    "state of another kind": (lambda saved: saved.update(state=3), "got one that cannot be used"),
    "groups of another kind": (lambda saved: saved.update(param_groups={}), "got one that cannot be used"),
}


@pytest.mark.parametrize(("spoil", "message"), KEYS.values(), ids=KEYS)
def test_keys_of_odd_kinds_are_refused(spoil, message, capfd, tmp_path):
    saved = state_dict()
    spoil(saved)
    torch.save(saved, tmp_path / "a.pt")
    assert re.search(message, refused(capfd, tmp_path / "a.pt", tmp_path))


def test_a_parameter_in_two_groups_is_one(capsys, tmp_path):
    """It has the number of its first place; those of later ones stay theirs, with which draws are keyed."""

    def with_one_twice(**options):
        _, optimizer = trained(**options)
        first = optimizer.param_groups[0]
        optimizer.param_groups.insert(0, copy.copy(first) | {"params": first["params"][:1]})
        return optimizer

    saved, other = with_one_twice().state_dict(), with_one_twice(state_format="bf16")
    torch.save(saved, tmp_path / "a.pt")
    status, found, _ = inspected(capsys, tmp_path / "a.pt")
    assert (status, list(found)) == (0, ["parameter 0", "parameter 2", "parameter 3", "parameter 4"])
    assert run(capsys, "convert", tmp_path / "a.pt", tmp_path / "b.pt", "--to", "bf16")[0] == 0
    converted = torch.load(tmp_path / "b.pt", weights_only=True)
    assert [group["params"] for group in converted["param_groups"]] == [[0], [0, 2, 3, 4]]
    other.load_state_dict(saved)
    for key, entry in other.state_dict()["state"].items():
        assert all(torch.equal(converted["state"][key][name], value) for name, value in entry.items())


def test_odd_keys_and_names_beside_the_state_do_no_harm(capsys, tmp_path):
    saved = state_dict()
    saved["param_groups"][0] |= {1: 2, None: 3, "param_names": [None, 1, b"x", "name"]}
    saved["state"][0] |= {1: 2, None: 3}
    saved[None] = {1.5: {2: {(): 3}}}
    torch.save(saved, tmp_path / "a.pt")
    status, found, _ = inspected(capsys, tmp_path / "a.pt")
    assert (status, list(found)) == (0, ["parameter 0", "parameter 1", "parameter 2", "name"])
    assert run(capsys, "convert", tmp_path / "a.pt", tmp_path / "b.pt", "--to", "8bit")[0] == 0


def test_optimizers_whose_places_read_alike_are_told_apart(capsys, tmp_path):
    torch.save({"a": {"b": state_dict()}, "a.b": state_dict(), 1: state_dict(), "1": state_dict()}, tmp_path / "a.pt")
    status, out, _ = run(capsys, "inspect", tmp_path / "a.pt", "--json")
    assert (status, [len(states) for states in json.loads(out).values()]) == (0, [4, 4, 4, 4])


# Values


ENDLESS = torch.zeros(1).expand(10**13)


def values():
    dense = torch.zeros(64, 128)
    return [
        *(None, True, 10**400, -(10**400), float("nan"), "x", b"x", [], {}, {1}, 1 + 2j, torch.float32, ENDLESS),
        *(torch.tensor([]), torch.tensor(float("nan")), torch.tensor(1j), torch.tensor(2**62), torch.zeros(3, 64, 128)),
        *(dense.to(kind) for kind in (torch.int8, torch.bool, torch.complex128, torch.float8_e4m3fn)),
        *(dense.to_sparse(), dense.to_sparse_csr(), torch.quantize_per_tensor(dense, 0.1, 0, torch.quint8)),
        *(dense.to("meta"), nn.Parameter(dense)),
    ]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("third", "dtype", "state_format"),
    [(0, torch.float16, "fp32"), (1, torch.bfloat16, "8bit"), (2, torch.float32, "fp32")],
)
def test_values_of_every_kind_in_every_place_get_a_table_or_a_sentence(third, dtype, state_format, capsys, tmp_path):
    model, optimizer = trained(dtype, state_format=state_format)
    places = [("optimizer", "state", 0, key) for key in optimizer.state_dict()["state"][0]]
    options = ("lr", "betas", "beta1", "seed", "param_names", "state_version")
    places += [("optimizer", "param_groups", 0, key) for key in options]
    places += [
        ("optimizer", "state", 0),
        ("optimizer", "param_groups", 0),
        ("optimizer", "state"),
        ("model", "0.weight"),
    ]
    for number, (place, value) in enumerate(itertools.product(places, values())):
        if number % 3 != third:
            continue
        tree = {"model": dict(model.state_dict()), "optimizer": copy.deepcopy(optimizer.state_dict())}
        *way, last = place
        node = functools.reduce(operator.getitem, way, tree)
        node[last] = value
        torch.save(tree, tmp_path / "a.pt")
        for arguments in (
            ["inspect", tmp_path / "a.pt"],
            ["convert", tmp_path / "a.pt", tmp_path / "b.pt", "--to", "fp32"],
        ):
            status, out, err = run(capsys, *arguments)
            assert (status == 2) == (out == ""), (place, value)
            assert len(err.splitlines()) == (status == 2), (place, value)


def test_moments_that_ask_for_more_memory_than_there_is(capfd, tmp_path):
    entry = {"step": torch.tensor(1.0), "exp_avg": ENDLESS, "exp_avg_sq": ENDLESS}
    torch.save({"state": {0: entry}, "param_groups": [{"params": [0]}]}, tmp_path / "a.pt")
    assert "allocate memory" in refused(capfd, tmp_path / "a.pt", tmp_path)


# Step counts that were rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [300.0, 10_001.0])
def test_a_count_in_a_16_bit_float_is_odd(step, dtype, capsys, tmp_path):
    saved = state_dict()
    saved["state"][1]["step"] = torch.tensor(step).to(dtype)
    torch.save(saved, tmp_path / "a.pt")
    status, found, text = inspected(capsys, tmp_path / "a.pt")
    count = float(saved["state"][1]["step"])
    sentence = f"parameter 1: step is {count:,.0f}, saved as {dtype}, which rounds counts above 256: "
    assert status == 1
    assert sentence in text
    assert [name for name, each in found.items() if each["oddities"]] == ["parameter 1"]
    status, out, _ = run(capsys, "convert", tmp_path / "a.pt", tmp_path / "b.pt", "--to", "fp32")
    assert status == 0
    assert sentence in " ".join(out.split())
    _, out, _ = run(capsys, "convert", tmp_path / "a.pt", tmp_path / "b.pt", "--to", "fp32", "--json")
    (note,) = json.loads(out)["notes"]
    assert note.startswith(sentence)


@pytest.mark.parametrize(
    "step",
    [
        *(torch.tensor(256.0).to(dtype) for dtype in (torch.bfloat16, torch.float16)),
        *(torch.tensor(10_001.0).to(dtype) for dtype in (torch.float32, torch.float64, torch.int16, torch.int64)),
        *(10_001, 10_001.0),
    ],
)
def test_a_count_that_is_exact_is_not_odd(step, capsys, tmp_path):
    saved = state_dict()
    saved["state"][1]["step"] = step
    torch.save(saved, tmp_path / "a.pt")
    assert inspected(capsys, tmp_path / "a.pt")[0] == 0


def test_the_hostile_values_of_the_test_are_dangerous(capfd):
    """Else the tests above prove nothing."""
    pickle.loads(pickle.dumps(Evil()))
    assert capfd.readouterr().out == "EVIL\n"
