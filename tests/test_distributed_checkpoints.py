"""Guards that what N processes save, M load, and that training goes on to the bits of a run that was not interrupted.

By torch's own ways: distributed checkpoints of sharded state, and whole state in one file, flattened and not.
"""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import lucid.optim as optim
from bits import assert_same, results
from lucid.optim.checkpoint import load_optimizer, torch_optimizer_state_dict
from resumed import Net, make, sharded, train, uninterrupted
from sharded import KINDS, assert_whole

WAYS = {
    "sharded": (False, False),
    "sharded, flattened": (False, True),
    "whole": (True, False),  # flattened as well, torch 2.13 does not load the state of its own AdamW
}


WHOLE = ("fp32", "8bit of bfloat16")  # saved whole as well: every kind of tensor that state is made of


def save(folder):
    world = distributed.get_world_size()
    for name, (dtype, options) in KINDS.items():
        net = sharded(dtype)
        optimizer = make(net, options)
        train(net, optimizer, range(3))
        for way, (full, flat) in WAYS.items():
            if full and name not in WHOLE:
                continue
            chosen = StateDictOptions(full_state_dict=full, flatten_optimizer_state_dict=flat, cpu_offload=full)
            model_state, optimizer_state = get_state_dict(net, optimizer, options=chosen)
            path = folder / f"{world} {name} {way}"
            if full and distributed.get_rank() == 0:
                torch.save({"model": model_state, "optimizer": optimizer_state}, path)
            elif not full:
                dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
        assert_whole(optimizer, uninterrupted(name, 3), f"after saving {name}")
    distributed.barrier()


def load_and_go_on(folder, saved_by):
    for name, (dtype, options) in KINDS.items():
        whole = uninterrupted(name, 5)
        for way, (full, flat) in WAYS.items():
            if full and name not in WHOLE:
                continue
            for from_rank0 in (False, True) if full else (False,):
                net = sharded(dtype)
                optimizer = make(net, options)
                chosen = StateDictOptions(
                    full_state_dict=full, flatten_optimizer_state_dict=flat, broadcast_from_rank0=from_rank0
                )
                path = folder / f"{saved_by} {name} {way}"
                if full:
                    both = {"model": {}, "optimizer": {}}
                    if not from_rank0 or distributed.get_rank() == 0:
                        both = torch.load(path, weights_only=True)
                else:
                    model_state, optimizer_state = get_state_dict(net, optimizer, options=chosen)
                    both = {"model": model_state, "optimizer": optimizer_state}
                    dcp.load(both, checkpoint_id=path)
                set_model_state_dict(net, both["model"], options=chosen)
                set_optimizer_state_dict(net, optimizer, both["optimizer"], options=chosen)
                train(net, optimizer, range(3, 5))
                assert_whole(optimizer, whole, f"{way} {name}, saved by {saved_by}, from rank 0: {from_rank0}")


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for world in (1, 2, 3, 4):
        ranks.run(world, save, folder)
    return folder


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("saved_by", [1, 2, 3, 4])
def test_what_some_processes_save_others_load(ranks, saved, saved_by, world):
    ranks.run(world, load_and_go_on, saved, saved_by)


# Another optimizer's, or in another format


def whole_state(net, optimizer, folder, name):
    """Save all that there is on rank 0, to be loaded without any process group."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state, optimizer_state = get_state_dict(net, optimizer, options=options)
    if distributed.get_rank() == 0:
        torch.save({"model": model_state, "optimizer": optimizer_state}, folder / f"{name} whole")


def save_others(folder):
    kinds = {"torch": (torch.float32, {}, torch.optim.AdamW)}
    kinds |= {name: (dtype, options, optim.AdamW) for name, (dtype, options) in KINDS.items()}
    for name, (dtype, options, kind) in kinds.items():
        net = sharded(dtype)
        optimizer = make(net, options, kind)
        train(net, optimizer, range(3))
        optimizer.param_groups[0]["betas"] = (0.85, 0.995)
        for flat in (False, True):
            chosen = StateDictOptions(flatten_optimizer_state_dict=flat)
            model_state, optimizer_state = get_state_dict(net, optimizer, options=chosen)
            dcp.save({"model": model_state, "app": {"adamw": optimizer_state}}, checkpoint_id=folder / f"{name} {flat}")
            if kind is optim.AdamW:
                for_torch = torch_optimizer_state_dict(net, optimizer, flatten=flat)
                dcp.save({"model": model_state, "optimizer": for_torch}, checkpoint_id=folder / f"{name} {flat} torch")
        whole_state(net, optimizer, folder, name)


def in_order(net, optimizer_state):
    """A whole state dict by the parameters' names as one by their numbers, for an optimizer of `make`."""
    names = {
        name: number
        for number, name in enumerate(name for g in optimizer_state["param_groups"] for name in g["params"])
    }
    groups = [g | {"params": [names[name] for name in g["params"]]} for g in optimizer_state["param_groups"]]
    return {"state": {names[name]: entry for name, entry in optimizer_state["state"].items()}, "param_groups": groups}


def load_others(folder):
    for source in ("torch", "fp32", "bf16", "8bit"):
        for target in ("fp32", "bf16", "8bit"):
            _, options = KINDS[target]
            options = options | {"amsgrad": False}
            saved = torch.load(folder / f"{source} whole", weights_only=True)
            plain = Net()
            plain.load_state_dict(saved["model"])
            theirs = make(plain, options)
            theirs.load_state_dict(in_order(plain, saved["optimizer"]))
            train(plain, theirs, range(3, 5))
            for flat in (False, True):
                net = sharded()
                model_state = get_model_state_dict(net)
                dcp.load({"model": model_state}, checkpoint_id=folder / f"{source} {flat}")
                ours = make(net, options)
                load_optimizer(net, ours, folder / f"{source} {flat}", prefix="app.adamw")
                assert ours.param_groups[0]["betas"] == (0.85, 0.995)
                assert ours.param_groups[1]["lr"] == 3e-3
                train(net, ours, range(3, 5))
                assert_whole(ours, theirs, f"{source} to {target}, flattened: {flat}")


def torch_loads_ours(folder):
    for source, (dtype, _) in KINDS.items():
        saved = torch.load(folder / f"{source} whole", weights_only=True)
        plain = Net(dtype)
        plain.load_state_dict(saved["model"])
        whole = make(plain, KINDS[source][1])
        whole.load_state_dict(in_order(plain, saved["optimizer"]))
        expected = whole.torch_state_dict()
        for flat in (False, True):
            net = sharded(dtype)
            theirs = make(net, {"amsgrad": source == "fp32"}, torch.optim.AdamW)
            chosen = StateDictOptions(flatten_optimizer_state_dict=flat)
            model_state, optimizer_state = get_state_dict(net, theirs, options=chosen)
            dcp.load(
                {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / f"{source} {flat} torch"
            )
            set_optimizer_state_dict(net, theirs, optimizer_state, options=chosen)
            assert theirs.param_groups[0]["betas"] == (0.85, 0.995)
            params = [param for group in theirs.param_groups for param in group["params"]]
            for number, param in enumerate(params):
                for key, value in expected["state"][number].items():
                    found = theirs.state[param][key]
                    found = found.full_tensor() if hasattr(found, "full_tensor") else found
                    assert torch.equal(found, value.to(found.dtype)), (source, flat, number, key)
            train(net, theirs, range(3, 5))


@pytest.fixture(scope="module")
def others(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    ranks.run(3, save_others, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_format_loads_every_format_and_torchs(ranks, others, world):
    ranks.run(world, load_others, others)


@pytest.mark.parametrize("world", [1, 2])
def test_torch_loads_every_format(ranks, others, world):
    ranks.run(world, torch_loads_ours, others)


def sharded_by_columns(dtype=torch.float32):
    """As tensor parallelism does: rows of codes are cut, and their scales too."""
    mesh = init_device_mesh("cpu", (2,))
    return fully_shard(Net(dtype), mesh=mesh, shard_placement_fn=lambda param: Shard(int(param.shape[-1] == 130)))


def cut_blocks(folder):
    saved = torch.load(folder / "8bit whole", weights_only=True)
    for target in ("fp32", "bf16"):
        options = KINDS[target][1] | {"amsgrad": False}
        plain = Net()
        plain.load_state_dict(saved["model"])
        theirs = make(plain, options)
        theirs.load_state_dict(in_order(plain, saved["optimizer"]))
        optimizers = []
        for load in ("checkpoint", "state_dict"):
            net = sharded_by_columns()
            dcp.load({"model": get_model_state_dict(net)}, checkpoint_id=folder / "8bit True")
            optimizers.append((net, make(net, options)))
            if load == "checkpoint":
                load_optimizer(net, optimizers[-1][1], folder / "8bit True", prefix="app.adamw")
            else:
                optimizers[-1][1].load_state_dict(in_order(net, saved["optimizer"]))
        train(plain, theirs, range(3, 5))
        for net, ours in optimizers:
            train(net, ours, range(3, 5))
            assert_whole(ours, theirs, target)


def test_codes_are_loaded_where_blocks_are_cut(ranks, others):
    ranks.run(2, cut_blocks, others)


class Counted(FileSystemReader):
    """Counts what it reads."""

    read = 0

    def read_data(self, plan, planner):
        self.read += len(plan.items)
        return super().read_data(plan, planner)


def one_of_two_loads(folder):
    """By a reader of one's own, in a group of one process."""
    own = distributed.get_rank()
    groups = [distributed.new_group([rank]) for rank in range(2)]
    if own == 1:
        net, reader = Net(), Counted(folder / "fp32 True")
        optimizer = make(net, {"state_format": "bf16"})
        load_optimizer(
            net, optimizer, folder / "bf16 True", storage_reader=reader, prefix="app.adamw", process_group=groups[1]
        )
        assert reader.read
        assert float(optimizer.state[net.last.bias]["step"]) == 3
        assert optimizer.state[net.last.bias]["stream"] != 0
    distributed.barrier()


def test_one_process_of_a_group_loads(ranks, others):
    ranks.run(2, one_of_two_loads, others)


# A parameter that never gets a gradient


def with_one_unused(init, folder):
    """Torch makes state for it where it loads, and asks the checkpoint for that."""

    def made():
        net = Net()
        for layer in (*net.layers, net.first, net.last):
            fully_shard(layer)
        optimizer = make(fully_shard(net), {})
        if init:
            optimizer.init_state()
        return net, optimizer

    def train_but_one(net, optimizer, steps):
        for _ in range(steps):
            net.last(net.layers[0](net.first(torch.ones(2, 130)))).square().sum().backward()  # layers[1] is not used
            optimizer.step()
            optimizer.zero_grad()

    net, optimizer = made()
    train_but_one(net, optimizer, 3)
    unused = list(net.layers[1].parameters())
    assert [param in optimizer.state for param in unused] == [init, init]
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    train_but_one(net, optimizer, 2)
    for load in ("dcp.load", "load_optimizer"):
        twin, resumed = made()
        model_state, optimizer_state = get_state_dict(twin, resumed)
        saved = {"model": model_state} | ({"optimizer": optimizer_state} if load == "dcp.load" else {})
        if load == "dcp.load" and not init:
            with pytest.raises(dcp.api.CheckpointException, match=r"Missing key .*optimizer\.state\.layers\.1"):
                dcp.load(saved, checkpoint_id=folder)
            continue
        dcp.load(saved, checkpoint_id=folder)
        set_model_state_dict(twin, model_state)
        if load == "dcp.load":
            set_optimizer_state_dict(twin, resumed, optimizer_state)
        else:
            load_optimizer(twin, resumed, folder)
        train_but_one(twin, resumed, 2)
        counts = [float(resumed.state.get(param, {"step": 0.0})["step"]) for param in twin.parameters()]
        assert counts == [0.0 if name.startswith("layers.1") else 5.0 for name, _ in twin.named_parameters()]
        for left, right in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(left.full_tensor(), right.full_tensor())
    distributed.barrier()


@pytest.mark.parametrize("init", [True, False], ids=["init_state()", "without"])
def test_a_parameter_without_a_gradient_wants_init_state(ranks, tmp_path, init):
    ranks.run(2, with_one_unused, init, tmp_path / "saved")


# What does not fit


def snapshot_of(optimizer):
    return [
        {key: value.full_tensor() if hasattr(value, "full_tensor") else value.clone() for key, value in entry.items()}
        for entry in optimizer.state.values()
    ] + [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def refused(folder):
    source = folder / "8bit True"

    def case(said, change=lambda net: net, groups=None, kind=(TypeError, ValueError), **arguments):
        net = change(sharded())
        optimizer = make(net, {}) if groups is None else optim.AdamW(groups(net))
        before = snapshot_of(optimizer)
        with pytest.raises(kind, match=said):
            load_optimizer(net, optimizer, **({"checkpoint_id": source, "prefix": "app.adamw"} | arguments))
        assert repr(snapshot_of(optimizer)) == repr(before)

    case("expected a checkpoint_id or a storage_reader", checkpoint_id=None)
    case(r"prefix: expected one of the checkpoint's keys \(app, model\), got 'optimizer'", prefix="optimizer")
    case("saved with different beta1, beta2, betas, lr, weight_decay", groups=lambda net: net.parameters())
    (folder / "nothing").mkdir(exist_ok=True)
    case("no complete checkpoint there", kind=FileNotFoundError, checkpoint_id=folder / "nothing")
    case("no parameter of shape", groups=lambda net: [torch.nn.Parameter(torch.ones(3))])

    def with_another(net):
        net.more = torch.nn.Linear(3, 2)
        return net

    case("has no parameter 'more.weight'", with_another, lambda net: net.more.parameters())

    def with_other_shape(net):
        net.last = fully_shard(torch.nn.Linear(67, 4), mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
        return net

    case(r"shape \(3, 67\) in the checkpoint, the parameter \(4, 67\)", with_other_shape)


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_that_does_not_fit_changes_nothing(ranks, others, world):
    ranks.run(world, refused, others)


def test_without_processes(others):
    """What three processes saved, one loads that knows of no process group."""
    saved = torch.load(others / "bf16 whole", weights_only=True)
    nets, optimizers = [Net(), Net()], []
    for net in nets:
        net.load_state_dict(saved["model"])
        optimizers.append(make(net, {"state_format": "bf16"}))
    optimizers[0].load_state_dict(in_order(nets[0], saved["optimizer"]))
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):  # torch says so
        load_optimizer(nets[1], optimizers[1], others / "bf16 False", prefix="app.adamw")
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, range(3, 5))
    assert_same(*map(results, optimizers))
