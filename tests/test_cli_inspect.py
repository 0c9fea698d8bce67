"""Guards `lucid inspect`: its figures are those of the state, and it finds odd what is odd and nothing else."""

import copy
import json

import pytest
import torch
from torch import nn

import lucid.optim as optim
from commands import KINDS, inspected, run, save, save_folder, train, trained
from golden import make as golden
from lucid.cli.checkpoints import read
from lucid.engine.formats import NAMES
from spiking import Normed, memory

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature"),
]


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


def test_the_memory_of_norms_is_shown(capsys, tmp_path):
    world = Normed(spike_threshold=6.0).steps([1.0, 20.0])
    torch.save(world.optimizer.state_dict(), tmp_path / "a.pt")
    status, out, _ = run(capsys, "inspect", tmp_path / "a.pt")
    assert status == 0
    assert "gradient norms (65 steps): 1 on average, ±0.2, 1 spikes in a row since" in out
    _, out, _ = run(capsys, "inspect", "--json", tmp_path / "a.pt")
    (states,) = json.loads(out).values()
    assert [each["spike_memory"] for each in states] == [memory(world.optimizer)] * 3
    saved = world.optimizer.state_dict()
    saved["param_groups"][0]["spike_memory"] = "many"
    torch.save(saved, tmp_path / "a.pt")
    status, out, _ = run(capsys, "inspect", tmp_path / "a.pt")
    assert status == 1
    assert "spike_memory: expected [mean norm" in out


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
