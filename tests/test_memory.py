"""Guards what users are told of memory: `lucid plan` with state on the host, and the tables of docs/memory.md.

Bytes are compared with tensors that exist; the page's figures with the plan's.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lucid.optim as optim
from lucid.bench import machine
from lucid.bench.contenders import FORMATS
from lucid.bench.shapes import MODELS, elements
from lucid.cli import info, main, plan, shapes
from lucid.engine import pinned
from lucid.engine.formats import NAMES, STEP, STREAM
from lucid.engine.sizes import state_bytes

SHAPES = [(100, 128), (64, 64, 3, 3), (1000,), (5, 7), (), (333, 257)]
HOST = plan.Options(state_device="cpu")


@pytest.fixture
def sums(monkeypatch):
    """Pinned memory without what is lost at the ends of its pieces."""
    monkeypatch.setattr(pinned, "bytes_for", sum)


def planned(capsys, *arguments):
    """Return the exit status, and what was found of each choice."""
    status = main(["plan", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)["choices"]


def choice(choices, dtype, state_format, ranks=1):
    (found,) = (
        each for each in choices if (each["dtype"], each["state_format"], each["ranks"]) == (dtype, state_format, ranks)
    )
    return found


# lucid plan


@pytest.mark.parametrize("dtype", shapes.DTYPES)
@pytest.mark.parametrize("state_format", NAMES)
def test_state_on_the_host_is_counted_there_and_only_there(state_format, dtype):
    """Tensors that kernels read are pinned; step counts and random streams are not."""
    params = [nn.Parameter(torch.zeros(shape, dtype=shapes.DTYPES[dtype])) for shape in SHAPES]
    optimizer = optim.AdamW(params, state_format=state_format, state_device="cpu", amsgrad=True)
    optimizer.init_state()
    state = [(key, value.nbytes) for param in params for key, value in optimizer.state[param].items()]
    numbers, slots = ([size for key, size in state if (key in (STEP, STREAM)) == one] for one in (True, False))
    found = plan.need(SHAPES, dtype, state_format, 1, plan.Options(amsgrad=True, state_device="cpu"))
    assert (found.state, found.host) == (0, sum(numbers) + pinned.bytes_for(slots))
    assert found.total == 2 * sum(param.nbytes for param in params)
    assert found.total_in_backward == sum(param.nbytes for param in params) + max(param.nbytes for param in params)


def test_7_billion_parameters_on_one_gpu(sums, capsys):
    """bf16 weights, 8-bit moments and residual on the host, in backward."""
    status, choices = planned(
        capsys, "--parameters", "7B", "--state-device", "cpu", "--step-in-backward", "--memory", "24GB"
    )
    found = choice(choices, "bfloat16", "8bit")
    assert (found["weights"], found["gradients"], found["state"]) == (14_000_000_000, 2 * 4096 * 4096, 0)
    assert found["total"] == found["total_in_backward"] == found["weights"] + found["gradients"]
    assert found["host"] == pytest.approx(7e9 * (2.0625 + 2), rel=1e-4)
    assert found["fits"]
    assert not choice(choices, "float32", "8bit")["fits"]
    assert status == 0
    assert planned(capsys, "--parameters", "7B", "--step-in-backward", "--memory", "24GB")[0] == 1


def test_step_in_backward_counts_the_largest_gradient_on_one_process():
    within, after = plan.Options(step_in_backward=True), plan.Options()
    largest = 4 * 333 * 257
    one, other = plan.need(SHAPES, "float32", "8bit", 1, within), plan.need(SHAPES, "float32", "8bit", 1, after)
    assert (one.gradients, one.total) == (largest, other.total - other.gradients + largest)
    assert plan.need(SHAPES, "float32", "8bit", 2, within) == plan.need(SHAPES, "float32", "8bit", 2, after)


@pytest.mark.parametrize("processes", [2, 3])
def test_shards_have_their_state_on_their_host(sums, processes):
    found = plan.need(SHAPES, "bfloat16", "8bit", processes, HOST)
    beside = plan.need(SHAPES, "bfloat16", "8bit", processes)
    assert (found.host, found.state) == (beside.state, 0)


def test_the_options_are_not_torchs(capsys):
    for options in (["--state-device", "cpu"], ["--step-in-backward"]):
        _, choices = planned(capsys, "--like", "gpt2-small", *options)
        assert {each["state_format"] for each in choices} == set(NAMES)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_moments_alone_leave_master_weights_on_the_device(sums, dtype):
    options = plan.Options(amsgrad=True, state_device="cpu:moments")
    found, whole = (plan.need(SHAPES, dtype, "8bit", 1, each) for each in (options, plan.Options(amsgrad=True)))
    elements = sum(map(math.prod, SHAPES))
    assert found.state == {"bfloat16": 2, "float16": 4, "float32": 0}[dtype] * elements
    assert found.host == whole.state - found.state
    assert found.total == found.weights + found.gradients + found.state


def test_the_table_has_device_and_host_apart(sums, capsys):
    arguments = ["plan", "--parameters", "7B", "--state-device", "cpu", "--ranks", "2", "--memory", "16GB"]
    assert main(arguments) == 0
    header, *rows = capsys.readouterr().out.splitlines()[1:10]
    wanted = "device/param host/param weights gradients state device in backward host each of 2 its host"
    assert " ".join(header.split()[2:]) == wanted
    (row,) = (row for row in rows if row.split()[:2] == ["bfloat16", "8bit"])
    assert (
        "4.00        4.06  13.0 GiB   13.0 GiB    0 B  ✗ 26.1 GiB   ✓ 13.1 GiB  26.5 GiB  ✓ 13.0 GiB  13.2 GiB" in row
    )
    assert main([*arguments, "--step-in-backward"]) == 0
    said = capsys.readouterr().out
    assert "in backward" not in said.splitlines()[1]
    assert "2.00        4.06  13.0 GiB   32.0 MiB    0 B  ✓ 13.1 GiB  26.5 GiB" in said


# docs/memory.md

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "memory.md").read_text()
LARGE = (4096, 4096)
WEIGHTS = {
    "float32": (torch.float32, True),
    "bfloat16 + residual": (torch.bfloat16, True),
    "bfloat16, stochastic": (torch.bfloat16, "stochastic"),
    "float16 + master": (torch.float16, True),
}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


CHOICES = [cells(line) for line in PAGE.split("<!-- end of choices")[0].split("|---|\n")[-1].strip().splitlines()]


def state_of(dtype, state_format, **options):
    """Bytes of state per parameter of a large matrix."""
    return state_bytes(LARGE, dtype, state_format, **options) / math.prod(LARGE)


def shown(values):
    return [f"{value:.2f}".rstrip("0").rstrip(".") for value in values]


MOMENTS = ', `"cpu:moments"`'
WHOLE = [row for row in CHOICES[:-2] if not row[0].endswith(MOMENTS)]
SPLIT = [row for row in CHOICES[:-2] if row[0].endswith(MOMENTS)]


def test_the_page_has_every_choice():
    assert [row[:2] for row in WHOLE] == [[weights, kind] for weights in WEIGHTS for kind in NAMES]
    masters = [f"{weights}{MOMENTS}" for weights in WEIGHTS if "+" in weights]
    assert [row[:2] for row in SPLIT] == [[weights, kind] for weights in masters for kind in NAMES]


@pytest.mark.parametrize("row", WHOLE, ids=lambda row: " ".join(row[:2]))
def test_the_bytes_of_a_choice(sums, row):
    dtype, master = WEIGHTS[row[0]]
    size, state = dtype.itemsize, state_of(dtype, row[1], master_weights=master)
    assert row[2:7] == shown([2 * size + state, size + state, 2 * size, size, state])
    if master is True:
        assert row[2:7] == shown([*planned_for(dtype, row[1])[:2], *planned_for(dtype, row[1], "cpu")])


@pytest.mark.parametrize("row", SPLIT, ids=lambda row: " ".join(row[:2]))
def test_the_bytes_of_a_choice_with_moments_on_the_host(sums, row):
    dtype, _ = WEIGHTS[row[0].removesuffix(MOMENTS)]
    assert row[4:7] == shown(planned_for(dtype, row[1], "cpu:moments"))
    assert row[6] == shown([state_of(dtype, row[1], master_weights=False)])[0]
    assert row[2:4] == ["–", "–"]


def planned_for(dtype, state_format, state_device=None):
    """Bytes per parameter of a large matrix: on the device, there in backward without the gradient, on the host."""
    options = plan.Options(state_device=state_device)
    found = plan.need([LARGE], str(dtype).removeprefix("torch."), state_format, 1, options)
    sizes = found.total, found.total_in_backward - found.in_backward, found.host
    return [size / math.prod(LARGE) for size in sizes]


@pytest.mark.parametrize("row", CHOICES[-2:], ids=lambda row: row[0])
def test_what_is_added_to_any_choice(row):
    option = {"ema" if "ema" in row[0] else "amsgrad": True}
    added = state_of(torch.float32, "8bit", **option) - state_of(torch.float32, "8bit")
    assert row[1:7] == ["any", *(f"+ {each}" for each in shown([added, added, 0, 0, added]))]


def test_the_bytes_of_each_part():
    parts = {row[1]: row[2] for row in map(cells, re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)) if len(row) == 5}
    for kind in NAMES:
        assert parts[f'`"{kind}"`'] == f"{state_of(torch.float32, kind):.4f}".rstrip("0").rstrip(".")
    for called, dtype in (("bfloat16: residual", torch.bfloat16), ("float16: float32 master", torch.float16)):
        (master,) = shown([state_of(dtype, "fp32") - state_of(dtype, "fp32", master_weights=False)])
        assert parts[called] == master


@pytest.mark.parametrize("row", CHOICES, ids=lambda row: " ".join(row[:2]))
def test_the_times_are_those_of_the_results(row):
    """Of steps with state on the GPU; where the results have none, the page says so."""
    results = (ROOT / "benchmarks" / "RESULTS-gpu.md").read_text()
    stochastic = "stochastic" in row[0]
    names = {(kind.dtype, kind.state): kind.name for kind in FORMATS if ("stochastic" in kind.name) == stochastic}
    name = re.escape(names.get((WEIGHTS.get(row[0], (None,))[0], row[1]), "none"))
    found = re.search(rf"^\| llama-1b: {name} +\| +([\d.]+) \|", results, re.MULTILINE)
    missing = "–" if row[0].endswith(MOMENTS) else "not measured"
    assert row[7] == (f"{float(found[1]):.1f} ms" if found else missing)


def test_7_billion_parameters_are_as_the_page_says(sums, capsys):
    found = choice(
        planned(capsys, "--parameters", "7B", "--state-device", "cpu", "--step-in-backward")[1], "bfloat16", "8bit"
    )
    assert f"the GPU holds {found['weights'] / 1e9:.1f} GB" in PAGE
    assert f"({found['gradients'] / 1e6:.0f} MB for a matrix" in PAGE
    assert f"the host {found['host'] / 1e9:.1f} GB of state" in PAGE


@pytest.mark.parametrize("row", CHOICES, ids=lambda row: " ".join(row[:2]))
def test_the_bus_takes_as_long_as_the_page_says(row):
    """50 GB/s in each direction, for the state of Llama 3.2 1B."""
    parameters = elements(MODELS["llama-1b"]())
    if row[1] == "any":
        assert row[8] == f"+ {1e3 * 4 * parameters / 50e9:.0f} ms"
    else:
        dtype, master = WEIGHTS[row[0].removesuffix(MOMENTS)]
        master = False if row[0].endswith(MOMENTS) else master
        assert row[8] == f"{1e3 * state_of(dtype, row[1], master_weights=master) * parameters / 50e9:.0f} ms"


def test_the_page_says_what_pieces_add(capsys):
    _, choices = planned(capsys, "--parameters", "7B", "--state-device", "cpu")
    assert f"{choice(choices, 'bfloat16', '8bit')['host'] / 1e9:.1f} GB for the 28.4 GB above" in PAGE
    _, choices = planned(capsys, "--like", "llama-1b", "--state-device", "cpu")
    more = choice(choices, "float32", "fp32")["host"] / (8 * elements(MODELS["llama-1b"]())) - 1
    assert f"{more:.0%} more for Llama".replace("%", " %") in PAGE


# lucid info


def told(capsys):
    assert main(["info", "--no-measure"]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU's machine memory can be pinned")
def test_without_a_gpu_nothing_can_be_pinned(capsys):
    assert "can be pinned nothing: it needs a CUDA device" in told(capsys)
    found = info.gathered(measure=False)
    assert (found.pinnable_bytes, found.pinnable_missing, found.bus) == (None, "it needs a CUDA device", {})


def test_what_is_free_can_be_pinned_unless_the_driver_refuses(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "free_memory", lambda: 3 * 2.0**30)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: None)
        assert "can be pinned 3.00 GiB that is free" in told(capsys)
        patch.setattr(machine, "free_memory", lambda: math.inf)
        assert "can be pinned all that is free" in told(capsys)

    def refuse(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nmore of it")

    monkeypatch.setattr(torch, "empty", refuse)
    assert "can be pinned nothing: CUDA error: out of memory limit" not in (said := told(capsys))
    assert "can be pinned nothing: CUDA error: out of memory lucid-optim" in said


def test_the_bus_is_told_in_both_units(capsys, monkeypatch):
    found = dataclasses.replace(info.gathered(measure=False), bus={"cuda:0": 40.0})
    monkeypatch.setattr(info, "gathered", lambda measure: found)
    said = told(capsys)
    assert "bus, cuda:0 40.0 GB/s measured, each way with both ways at once" in said
    assert "takes 0.2 ns per parameter at least" in said


GROUP = "sys/fs/cgroup/pods/one/"
TWO = {"proc/self/cgroup": "0::/pods/one\n", "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   4096 kB\n"}
LIMITED = TWO | {GROUP + "memory.max": "3000\n", GROUP + "memory.current": "1000"}
ONE = {"proc/self/cgroup": "9:memory:/job\n", "proc/meminfo": TWO["proc/meminfo"]}
JOB = "sys/fs/cgroup/memory/job/memory."


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, math.inf),
        (TWO, 2**22),
        (TWO | {GROUP + "memory.max": "max\n", GROUP + "memory.current": "7"}, 2**22),
        (LIMITED, 2000),
        (LIMITED | {GROUP + "memory.stat": "anon 700\ninactive_file 300"}, 2300),
        (TWO | {"sys/fs/cgroup/pods/memory.max": "900", "sys/fs/cgroup/pods/memory.current": "1000"}, 0),
        (ONE | {JOB + "limit_in_bytes": "5000", JOB + "usage_in_bytes": "1000"}, 4000),
        (ONE | {JOB + "limit_in_bytes": "9223372036854771712", JOB + "usage_in_bytes": "1000"}, 2**22),
    ],
)  # fmt: skip
def test_a_containers_limit_is_memory_that_is_not_free(files, free, tmp_path):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert machine.free_memory(tmp_path) == free
