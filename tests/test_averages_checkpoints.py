"""Guards that averages of weights are saved, loaded, converted and copied as the rest of the state is.

And what is their own: who loads a checkpoint without them begins at the weights, and torch's AdamW has no place for
them.
"""

import copy
import json
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import lucid.optim as optim
from averaging import KINDS, master_of, params_of, world
from bits import assert_same, in_child, peek, results, same, through_a_file
from commands import inspected, run, save, train, trained
from lucid.engine.formats import NAMES
from lucid.optim.checkpoint import load_optimizer, torch_optimizer_state_dict
from resumed import make, sharded
from resumed import train as train_sharded
from sharded import whole

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature"),
]


def anew(source, **options):
    """A `World` like `source` before training, with its weights."""
    found = world(source.kind, steps=0, **options)
    with torch.no_grad():
        for param, value in zip(found.params, source.params, strict=True):
            param.copy_(value)
    found.done = source.done
    return found


def of(kind, **options):
    found = world(kind, **options)
    found.kind = kind
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_training_resumes_to_the_bit(kind):
    source = of(kind)
    saved = through_a_file(source.optimizer.state_dict())
    resumed = anew(source)
    resumed.optimizer.load_state_dict(saved)
    assert_same(results(resumed.optimizer), results(source.optimizer))
    assert_same(results(resumed.run(3).optimizer), results(source.run(3).optimizer))


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_that_is_switched_off_goes_on_after_a_load(kind):
    source = of(kind)
    source.optimizer.param_groups[0]["ema_decay"] = None
    source.run(2)
    resumed = anew(source, ema_decay=None)
    resumed.optimizer.load_state_dict(through_a_file(source.optimizer.state_dict()))
    assert_same(results(resumed.run(2).optimizer), results(source.run(2).optimizer))
    for each in (source, resumed):
        each.optimizer.param_groups[0]["ema_decay"] = 0.75
    assert_same(results(resumed.run(2).optimizer), results(source.run(2).optimizer))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_and_pickles_keep_them(way):
    source = of("bfloat16")
    twin = way(source.optimizer)
    for ours, theirs in zip(twin.averages().values(), source.optimizer.averages().values(), strict=True):
        assert same(ours, theirs)
    with twin.averaged():
        pass
    assert_same(results(twin), results(source.optimizer))


@pytest.mark.parametrize("to", NAMES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_another_format_keeps_them_to_the_bit(kind, to):
    source = of(kind)
    other = anew(source, state_format=to)
    other.optimizer.load_state_dict(source.optimizer.state_dict())
    for ours, theirs in zip(params_of(other.optimizer), source.params, strict=True):
        assert same(peek(other.optimizer)[ours]["ema"], peek(source.optimizer)[theirs]["ema"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_averages_begins_them_at_the_weights(kind):
    source = of(kind, ema_decay=None)
    other = anew(source, ema_decay=0.75)
    other.optimizer.load_state_dict(source.optimizer.state_dict())
    assert not any("ema" in entry for entry in peek(other.optimizer).values())
    masters = [master_of(param, peek(other.optimizer)[param]).clone() for param in other.params]
    for found, master in zip(other.optimizer.averages().values(), masters, strict=True):
        assert same(found, master)
    other.run(1)
    for param, master in zip(other.params, masters, strict=True):
        average = 0.75 * master + 0.25 * master_of(param, peek(other.optimizer)[param])
        assert torch.allclose(peek(other.optimizer)[param]["ema"], average, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("own", "saved", "wanted"), [(0.5, 0.9, 0.5), (None, 0.9, 0.9), (0.5, None, 0.5)])
def test_the_optimizers_own_decay_counts_and_else_the_saved_one(own, saved, wanted):
    source, other = of("float32", ema_decay=saved), of("float32", ema_decay=own)
    other.optimizer.load_state_dict(source.optimizer.state_dict())
    assert [group["ema_decay"] for group in other.optimizer.param_groups] == [wanted] * 2
    assert len(other.optimizer.averages()) == len(other.params)


@pytest.mark.parametrize(("own", "kept"), [((0.5, 0.9), (0.5, 0.9)), ((0.5, None), (0.5, 0.7))])
def test_groups_of_one_saved_group_keep_their_own_decay(own, kept, recwarn):
    named = [(str(number), torch.nn.Parameter(torch.ones(2))) for number in range(2)]
    optimizer = optim.AdamW([{"params": [each], "ema_decay": decay} for each, decay in zip(named, own, strict=True)])
    optimizer.load_state_dict(optim.AdamW(named, ema_decay=0.7).state_dict())
    assert tuple(group["ema_decay"] for group in optimizer.param_groups) == kept
    assert ["groups that differ in ema_decay here" in str(told.message) for told in recwarn] == [True] * (own != kept)


def test_torch_loads_what_has_averages_and_we_load_what_has_none():
    source = of("float32")
    saved = source.optimizer.torch_state_dict()
    assert not any("ema" in entry for entry in saved["state"].values())
    assert not any("ema_decay" in group for group in saved["param_groups"])
    theirs = torch.optim.AdamW([{"params": source.params[:2]}, {"params": source.params[2:]}])
    theirs.load_state_dict(saved)
    other = anew(source)
    other.optimizer.load_state_dict(theirs.state_dict())
    assert_same(
        [{key: row[key] for key in row.keys() - {"ema", "stream"}} for row in results(other.optimizer)],
        [{key: row[key] for key in row.keys() - {"ema", "stream"}} for row in results(source.optimizer)],
    )


# Distributed checkpoints

OPTIONS = {"state_format": "8bit", "ema_decay": 0.75}


def averages_of(optimizer):
    return {name: whole(value) for name, value in optimizer.averages().items()}


def uninterrupted(steps):
    net = sharded(torch.bfloat16)
    optimizer = make(net, OPTIONS)
    train_sharded(net, optimizer, range(steps))
    return net, optimizer


def saves(folder):
    net, optimizer = uninterrupted(3)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def loads(folder, way):
    net = sharded(torch.bfloat16)
    optimizer = make(net, OPTIONS | ({"state_format": "fp32"} if way == "load_optimizer" else {}))
    if way == "load_optimizer":
        model_state = get_model_state_dict(net)
        dcp.load({"model": model_state}, checkpoint_id=folder)
        set_model_state_dict(net, model_state)
        load_optimizer(net, optimizer, folder)
    else:
        model_state, optimizer_state = get_state_dict(net, optimizer)
        both = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(both, checkpoint_id=folder)
        set_model_state_dict(net, both["model"])
        set_optimizer_state_dict(net, optimizer, both["optimizer"])
    for param in params_of(optimizer):
        assert peek(optimizer)[param]["ema"].placements == param.placements
    _, twin = uninterrupted(3)
    for ours, theirs in zip(averages_of(optimizer).values(), averages_of(twin).values(), strict=True):
        assert same(ours, theirs)
    if way == "torch":
        train_sharded(net, optimizer, range(3, 5))
        _, twin = uninterrupted(5)
        for ours, theirs in zip(averages_of(optimizer).values(), averages_of(twin).values(), strict=True):
            assert same(ours, theirs)
    torchs = torch_optimizer_state_dict(net, optimizer)
    assert not any("ema" in entry for entry in torchs["state"].values())
    distributed.barrier()


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("averages")
    ranks.run(2, saves, folder / "2")
    return folder / "2"


@pytest.mark.parametrize("way", ["torch", "load_optimizer"])
@pytest.mark.parametrize("world", [1, 3])
def test_what_two_processes_save_others_load(ranks, saved, world, way):
    ranks.run(world, loads, saved, way)


# The command line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_inspect_shows_them(dtype, capsys, tmp_path):
    model, optimizer = trained(dtype, named=True, ema_decay=0.9)
    path = save(tmp_path / "a.pt", model, optimizer)
    status, found = inspected(capsys, path)
    assert (status, [each["oddities"] for each in found.values()]) == (0, 4 * [[]])
    for name, param in model.named_parameters():
        average = optimizer.averages()[name]
        distance = (average - param.detach()).norm() / param.detach().to(average.dtype).norm()
        assert found[name]["format"].endswith("ema")
        assert found[name]["ema_bytes"] == average.nbytes
        assert found[name]["ema_distance"] == pytest.approx(float(distance), rel=1e-4)
    assert sum(each["state_bytes"] for each in found.values()) == sum(
        value.nbytes for entry in optimizer.state.values() for value in entry.values()
    )
    _, out, _ = run(capsys, "inspect", path)
    assert "ema − weight" in out
    assert "of it averages of weights" in out
    assert "ema" not in run(capsys, "inspect", save(tmp_path / "b.pt", *trained(dtype)))[1]


def test_inspect_finds_odd_averages(capsys, tmp_path):
    model, optimizer = trained(named=True, ema_decay=0.9)
    optimizer.state[model[0].weight]["ema"][0, 0] = torch.nan
    optimizer.state[model[0].bias]["ema"] = torch.ones(5)
    optimizer.state[model[1].bias]["ema"] = torch.ones(3, dtype=torch.int64)
    status, found = inspected(capsys, save(tmp_path / "a.pt", model, optimizer))
    assert status == 1
    assert found["0.weight"]["oddities"] == ["ema is NaN or infinite in 1 of 8,192"]
    assert found["0.bias"]["oddities"] == ["ema has shape 5, exp_avg 64"]
    assert found["1.bias"]["oddities"][0].startswith("it could not be loaded: state 'ema' of ")


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("master_weights", [True, "stochastic"])
def test_convert_keeps_them_and_what_weights_are_drawn_from(master_weights, target, capsys, tmp_path):
    options = {"state_format": "8bit", "master_weights": master_weights, "named": True}
    for ema_decay in (0.9, None):
        model, optimizer = trained(torch.bfloat16, ema_decay=ema_decay, **options)
        path = save(tmp_path / "a.pt", model, optimizer)
        optimizer.param_groups[0]["param_names"] = ["a", "b", "c", "d"]  # a new key of draws would be another
        assert run(capsys, "convert", path, tmp_path / "b.pt", "--to", target)[0] == 0
        before, after = (torch.load(tmp_path / name, weights_only=True)["optimizer"] for name in ("a.pt", "b.pt"))
        for number, entry in before["state"].items():
            new = after["state"][number]
            if ema_decay is not None:
                assert same(new["ema"], entry["ema"])
            if "stream" in entry and (master_weights == "stochastic" or ema_decay is not None):
                assert new["stream"] == entry["stream"]


def test_convert_to_torch_leaves_them_out_and_says_so(capsys, tmp_path):
    model, optimizer = trained(ema_decay=0.9)
    path = save(tmp_path / "a.pt", model, optimizer)
    status, out, _ = run(capsys, "convert", path, tmp_path / "b.pt", "--to", "torch")
    assert status == 0
    assert "averages of the weights of 4 parameters are left out: torch.optim.AdamW keeps none" in " ".join(out.split())
    theirs = torch.optim.AdamW(model.parameters())
    theirs.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True)["optimizer"])
    train(model, theirs)
    assert set(theirs.state[model[0].weight]) == {"step", "exp_avg", "exp_avg_sq"}
    path = save(tmp_path / "c.pt", *trained())
    assert "averages" not in run(capsys, "convert", path, tmp_path / "d.pt", "--to", "torch")[1]


def test_the_plan_of_averages_and_of_drawn_weights(capsys):
    def choices(*arguments):
        status, out, _ = run(capsys, "plan", "--like", "gpt2-small", *arguments, "--json")
        assert status == 0
        found = json.loads(out)
        return {(each["dtype"], each["state_format"]): each["state"] for each in found["choices"]}, found["parameters"]

    plain, count = choices()
    averaged, _ = choices("--ema")
    numbers = 8 * 148  # what draws are keyed with
    for (dtype, state_format), size in averaged.items():
        more = size - plain[dtype, state_format]
        if state_format == "torch":
            assert more == (4 if dtype == "float32" else 2) * count
        else:
            assert 4 * count <= more <= 4 * count + numbers
    drawn, _ = choices("--master-weights", "stochastic")
    assert plain.keys() - drawn.keys() == {("float16", name) for name in NAMES}
    assert 2 * count - numbers <= plain["bfloat16", "8bit"] - drawn["bfloat16", "8bit"] <= 2 * count
    alone, _ = choices("--master-weights", "false")
    assert plain["bfloat16", "fp32"] - alone["bfloat16", "fp32"] == 2 * count
    assert plain["float16", "fp32"] - alone["float16", "fp32"] == 4 * count


# Memory that is gone


@pytest.mark.parametrize("way", ["first step", "switched on", "residual", "init_state", "averages", "of state"])
def test_weights_without_memory_are_refused(way):
    """Their storage was freed, so an average that began at them would end the process."""

    def act():
        later = way in ("switched on", "residual")
        steps = 0 if way in ("first step", "init_state", "averages") else 2
        found = world("bfloat16", steps=steps, **({"ema_decay": None} if later else {}))
        param = found.params[0]
        entry = peek(found.optimizer).get(param, {})
        {"residual": entry.get("residual"), "of state": entry.get("ema")}.get(way, param).untyped_storage().resize_(0)
        for group in found.optimizer.param_groups:
            group["ema_decay"] = 0.9
        found.set_gradients()
        acts = {"init_state": found.optimizer.init_state, "averages": found.optimizer.averages}
        with pytest.raises(ValueError, match="parameter 0 of group 0 has no memory"):
            acts.get(way, found.optimizer.averages if way == "of state" else found.optimizer.step)()

    in_child(act)
