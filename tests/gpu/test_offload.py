"""Guards state on the host that is staged and updated by the host's CPU, with parameters on a real GPU."""

import copy
import math

import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, draw, results
from lucid.engine import choice, offload

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def staged(monkeypatch):
    monkeypatch.setattr(choice, "IN_PLACE", False)


SHAPES = [(1000, 257), (64, 32, 3, 3), (5000,), (), (0, 3), (4, 4096)]
KINDS = [
    (dtype, options)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for options in ({}, {"state_format": "8bit"}, {"state_format": "bf16", "amsgrad": True})
]


def run(steps, state_device, dtype=torch.float32, **options):
    params = [Parameter((draw(number, shape) * 0.02).to(dtype).to(GPU)) for number, shape in enumerate(SHAPES)]
    optimizer = optim.AdamW(params, 1e-2, state_device=state_device, **options)
    for step in range(steps):
        for number, param in enumerate(params):
            param.grad = draw(100 * step + number, param.shape).to(dtype).to(GPU)
            if step == 3 and number == 1 and "nonfinite" in options:
                param.grad.view(-1)[7] = math.inf
        optimizer.step()
    _ = optimizer.state
    return optimizer, [{key: value.cpu() for key, value in row.items()} for row in results(optimizer)]


@pytest.mark.parametrize("chunk", [1 << 12, 16 << 20])
@pytest.mark.parametrize(("dtype", "options"), KINDS, ids=str)
def test_the_bits_of_an_ordinary_step(dtype, options, chunk, monkeypatch):
    monkeypatch.setattr(offload, "PIECE_BYTES", chunk)
    optimizer, ours = run(20, "cpu", dtype, **options)
    _, theirs = run(20, None, dtype, **options)
    assert_same(ours, theirs)
    param = optimizer.param_groups[0]["params"][0]
    assert {value.device.type for value in optimizer.state[param].values()} == {"cpu"}
    assert optimizer.engine_for(param) == "cpu"


def test_clipping_and_skipping():
    ours, bits = run(8, "cpu", max_grad_norm=0.5, nonfinite="skip")
    theirs, wanted = run(8, None, max_grad_norm=0.5, nonfinite="skip")
    assert ours.skipped_steps == theirs.skipped_steps == 1
    assert torch.equal(ours.grad_norm, theirs.grad_norm.cpu())
    assert_same(bits, wanted)


def test_in_a_training_loop():
    """Gradients are made while copies of the step before are on their way; then stepping in backward."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 64)).to(GPU)
    twin = copy.deepcopy(model)
    optimizers = [optim.AdamW(model.parameters(), 1e-3, state_device="cpu"), optim.AdamW(twin.parameters(), 1e-3)]
    x = torch.randn(64, 512, device=GPU)
    for step in range(20):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.step_in_backward(step >= 10)
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_moves_between_them():
    optimizer, _ = run(5, "cpu", torch.bfloat16, state_format="8bit")
    saved = optimizer.state_dict()
    params = optimizer.param_groups[0]["params"]
    twins = [Parameter(param.detach().clone()) for param in params]
    other = optim.AdamW(twins, 1e-2, state_format="8bit")
    other.load_state_dict(saved)
    for own, its in ((params, optimizer), (twins, other)):
        for number, param in enumerate(own):
            param.grad = draw(1000 + number, param.shape).bfloat16().to(GPU)
        its.step()
    assert {value.device.type for key, value in other.state[twins[0]].items() if "exp" in key} == {"cuda"}
    for one, another in zip(params, twins, strict=True):
        assert torch.equal(one, another)
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.state[params[0]]["exp_avg_code"].device.type == "cpu"
