"""Guards that checkpoints move to and from `torch.optim.AdamW`, and through torch's checkpoint tools."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

import lucid.optim as optim
from bits import assert_same, draw, peek, through_a_file
from converted import FORMATS, MOMENTS, bits_of, encoded, keys_of, made, moments, raw, train, trained

# To and from torch.optim.AdamW


WAYS = [{}, {"foreach": True}, {"fused": True}]


def of_torch(params, **options):
    return torch.optim.AdamW(params, **options)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("way", WAYS, ids=["default", "foreach", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_torch_saved_loads_into_every_format(dtype, way, amsgrad):
    theirs, their_params = trained(dtype, of_torch, amsgrad=amsgrad, betas=(0.8, 0.95), weight_decay=0.1, **way)
    saved = through_a_file(theirs.state_dict())
    for state_format, own_dtype in itertools.product(FORMATS, {torch.float32, dtype}):
        ours, params = made(own_dtype, state_format=state_format, lr=9.0, seed=4)
        ours.load_state_dict(saved)
        (group,) = ours.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"], group["amsgrad"]) == (
            0.01,
            (0.8, 0.95),
            0.1,
            amsgrad,
        )
        assert (group["state_format"], group["seed"]) == (state_format, 4)
        for name, param in params.items():
            entry, before = peek(ours)[param], theirs.state[their_params[name]]
            assert entry.keys() == keys_of(own_dtype, state_format, name, amsgrad)
            assert int(entry["step"]) == 3
            for key, value in encoded(before["exp_avg"].float(), before["exp_avg_sq"].float(), entry).items():
                assert torch.equal(raw(entry)[key], raw({key: value})[key]), key
            if amsgrad:
                assert torch.equal(entry["max_exp_avg_sq"], before["max_exp_avg_sq"].float())
        train(ours, params, 3, 4)


@pytest.mark.parametrize("way", WAYS, ids=["default", "foreach", "fused"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_goes_on_in_torch(dtype, state_format, amsgrad, way):
    ours, params = trained(dtype, state_format=state_format, amsgrad=amsgrad, weight_decay=0.1, steps=10)
    theirs, their_params = made(torch.float32, of_torch, lr=9.0, **way)
    forgetful, forgetful_params = made(torch.float32, of_torch, weight_decay=0.1, amsgrad=amsgrad, **way)
    for name, param in params.items():
        their_params[name].data.copy_(param.detach())
        forgetful_params[name].data.copy_(param.detach())
    saved = ours.torch_state_dict()
    assert {key for entry in saved["state"].values() for key in entry} <= MOMENTS | {"step", "max_exp_avg_sq"}
    assert not saved["param_groups"][0].keys() & {"state_format", "master_weights", "seed", "beta1"}
    theirs.load_state_dict(through_a_file(saved))
    (group,) = theirs.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["amsgrad"]) == (0.01, (0.9, 0.999), 0.1, amsgrad)
    for name, param in params.items():
        entry = theirs.state[their_params[name]]
        for key, value in zip(("exp_avg", "exp_avg_sq"), moments(peek(ours)[param]), strict=True):
            assert entry[key].dtype == torch.float32
            assert torch.equal(entry[key], value)
        assert int(entry["step"]) == 10
    train(ours, params, 10, 15)
    train(theirs, their_params, 10, 15)
    train(forgetful, forgetful_params, 10, 15)
    for name in ("matrix", "transposed", "vector"):
        off = (their_params[name] - params[name].float()).norm() / (0.01 * math.sqrt(params[name].numel()))
        forgotten = (forgetful_params[name] - params[name].float()).norm() / (0.01 * math.sqrt(params[name].numel()))
        # In units of a step of lr: what formats and bfloat16 lose, against what a lost state costs.
        assert off < (0.5 if dtype == torch.bfloat16 else {"fp32": 1e-4, "bf16": 0.05, "8bit": 0.3}[state_format])
        assert forgotten > 2 * off
        assert forgotten > 0.8


def test_torch_state_dict_of_an_optimizer_without_all_of_its_state():
    ours, params = made(state_format="8bit")
    theirs, _ = made(make=of_torch)
    theirs.load_state_dict(ours.torch_state_dict())
    assert not theirs.state
    params["matrix"].grad = torch.ones(64, 80)
    ours.step()
    theirs, their_params = made(make=of_torch)
    theirs.load_state_dict(ours.torch_state_dict())
    assert [name for name, param in their_params.items() if param in theirs.state] == ["matrix"]
    train(theirs, their_params, 1, 2)


def test_fp32_state_loads_into_torch_as_it_is():
    """Without torch_state_dict: what every tool does with a checkpoint."""
    ours, params = trained()
    theirs, their_params = made(make=of_torch)
    theirs.load_state_dict(ours.state_dict())
    for name, param in params.items():
        for key in MOMENTS:
            assert torch.equal(theirs.state[their_params[name]][key], peek(ours)[param][key])


# torch's checkpoint tools


WORLDS = {
    "8bit": (torch.float32, {"state_format": "8bit"}),
    "bf16": (torch.float32, {"state_format": "bf16"}),
    "fp32, bf16 parameters": (torch.bfloat16, {"state_format": "fp32"}),
    "bf16, bf16 parameters": (torch.bfloat16, {"state_format": "bf16"}),
    "8bit, bf16 parameters": (torch.bfloat16, {"state_format": "8bit", "amsgrad": True}),
    "8bit, fp16 parameters": (torch.float16, {"state_format": "8bit"}),
}
DCP_OPTIONS = {
    "plain": {},
    "full": {"full_state_dict": True},
    "full, offloaded": {"full_state_dict": True, "cpu_offload": True},
    "flattened": {"flatten_optimizer_state_dict": True},
}


def model_and_optimizer(dtype, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 64), nn.Linear(64, 64), nn.Linear(64, 3)).to(dtype)
    return model, optim.AdamW(model.parameters(), lr=0.02, **options)


def train_model(model, optimizer, start, stop):
    for step in range(start, stop):
        for index, param in enumerate(model.parameters()):
            param.grad = draw(1000 + 10 * step + index, param.shape).to(param.dtype)
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("options", DCP_OPTIONS.values(), ids=DCP_OPTIONS.keys())
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_checkpoints_by_dcp(world, options, steps):
    dcp_options = dcp.StateDictOptions(**options)
    model, optimizer = model_and_optimizer(*world)
    train_model(model, optimizer, 0, steps)
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=dcp_options)
    assert [int(entry["step"]) for entry in optimizer.state.values()] == [steps] * 6
    twin, resumed = model_and_optimizer(*world)
    twin.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(twin, resumed, copy.deepcopy(saved), options=dcp_options)
    assert [int(entry["step"]) for entry in resumed.state.values()] == [steps] * 6
    train_model(model, optimizer, steps, steps + 3)
    train_model(twin, resumed, steps, steps + 3)
    assert_same(bits_of(resumed), bits_of(optimizer))
    never, unsaved = model_and_optimizer(*world)  # neither saving nor loading has cost a step or moved a weight
    train_model(never, unsaved, 0, steps + 3)
    assert_same(bits_of(unsaved), bits_of(optimizer))


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_torchs_dummy_step_makes_state_and_counts_nothing(world):
    model, optimizer = model_and_optimizer(*world)
    before = copy.deepcopy(model.state_dict())
    dcp._init_optim_state(optimizer)
    for param in model.parameters():
        entry = optimizer.state[param]
        assert not any(raw(entry)[key].any() for key in entry if key != "stream")
        assert ("stream" in entry) is ("exp_avg_code" in entry or entry["exp_avg"].dtype == torch.bfloat16)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
