"""Guards what users are told of memory: `lucid plan` with state on the host, and the tables of docs/memory.md.

Bytes are compared with tensors that exist; the page's figures with the plan's.
"""

import json

import pytest
import torch
from torch import nn

import lucid.optim as optim
from lucid.cli import main, plan, shapes
from lucid.engine.formats import NAMES

SHAPES = [(100, 128), (64, 64, 3, 3), (1000,), (5, 7), (), (333, 257)]
HOST = plan.Options(state_device="cpu")


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
    params = [nn.Parameter(torch.zeros(shape, dtype=shapes.DTYPES[dtype])) for shape in SHAPES]
    optimizer = optim.AdamW(params, state_format=state_format, state_device="cpu", amsgrad=True)
    optimizer.init_state()
    sizes = [value.nbytes for param in params for value in optimizer.state[param].values()]
    found = plan.need(SHAPES, dtype, state_format, 1, plan.Options(amsgrad=True, state_device="cpu"))
    assert (found.state, found.host) == (0, plan.host_bytes(sizes))
    assert found.total == 2 * sum(param.nbytes for param in params)
    assert found.total_in_backward == sum(param.nbytes for param in params) + max(param.nbytes for param in params)


def test_7_billion_parameters_on_one_gpu(capsys):
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
def test_shards_have_their_state_on_their_host(processes):
    found = plan.need(SHAPES, "bfloat16", "8bit", processes, HOST)
    beside = plan.need(SHAPES, "bfloat16", "8bit", processes)
    assert (found.host, found.state) == (plan.host_bytes([beside.state]), 0)


def test_the_options_are_not_torchs(capsys):
    for options in (["--state-device", "cpu"], ["--step-in-backward"]):
        _, choices = planned(capsys, "--like", "gpt2-small", *options)
        assert {each["state_format"] for each in choices} == set(NAMES)


def test_the_table_has_device_and_host_apart(capsys):
    arguments = ["plan", "--parameters", "7B", "--state-device", "cpu", "--ranks", "2", "--memory", "16GB"]
    assert main(arguments) == 0
    header, *rows = capsys.readouterr().out.splitlines()[1:10]
    assert header.split()[2:] == (
        "device/param host/param weights gradients device in backward host each of 2 its host".split()
    )
    (row,) = (row for row in rows if row.split()[:2] == ["bfloat16", "8bit"])
    assert "4.00        4.06  13.0 GiB   13.0 GiB  ✗ 26.1 GiB   ✓ 13.1 GiB  26.5 GiB  ✓ 13.0 GiB  13.2 GiB" in row
    assert main([*arguments, "--step-in-backward"]) == 0
    said = capsys.readouterr().out
    assert "in backward" not in said.splitlines()[1]
    assert "2.00        4.06  13.0 GiB   32.0 MiB  ✓ 13.1 GiB  26.5 GiB" in said
