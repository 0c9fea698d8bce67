"""Guards what a checkpoint becomes where it does not stand as the optimizer does.

Groups in another order, more of them or fewer, lists of parameters that someone has changed by hand, keys that a file
has made strings, step counts that have lost bits: each parameter gets its own moments and its own hyperparameters, or
one sentence says why not and nothing is changed. Training that goes on with another parameter's is noticed late.
"""

import copy
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import Parameter

import lucid.optim as optim
from bits import through_a_file
from lucid.optim.checkpoint import load_optimizer

LIKE = (4, 4)  # the shape of every parameter here: a shape tells none from another


class Net(torch.nn.Module):
    """Parameters of one shape, registered in the order of `names`."""

    def __init__(self, names="abcd"):
        super().__init__()
        for name in names:
            generator = torch.Generator().manual_seed(ord(name))
            self.register_parameter(name, Parameter(torch.randn(LIKE, generator=generator)))


def groups_of(net, *groups):
    """Groups like ("ab", {"lr": 0.1}), with names."""
    return [{"params": [(name, getattr(net, name)) for name in names], **options} for names, options in groups]


def without_names(groups):
    return [{**group, "params": [param for _, param in group["params"]]} for group in groups]


def train(net, optimizer, steps=2):
    for step in range(steps):
        for name, param in net.named_parameters():
            param.grad = torch.full(LIKE, float(ord(name) - 96 + step))
        optimizer.step()


def trained(*groups, make=optim.AdamW, names="abcd", named=True):
    net = Net(names)
    made = groups_of(net, *groups)
    optimizer = make(made if named else without_names(made))
    train(net, optimizer)
    return net, optimizer


def made(*groups, make=optim.AdamW, names="abcd", named=True):
    net = Net(names)
    groups = groups_of(net, *groups)
    return net, make(groups if named else without_names(groups))


def of(net, optimizer, name, *keys):
    """What `optimizer` has for a parameter: values of its group, and which parameter's moments."""
    param = getattr(net, name)
    (group,) = [group for group in optimizer.param_groups if any(each is param for each in group["params"])]
    return [group[key] for key in keys]


def assert_own_moments(source, target):
    """Every parameter of `target` has the moments of the one with its name in `source`: (net, optimizer) both."""
    for name, param in target[0].named_parameters():
        wanted, found = source[1].state[getattr(source[0], name)], target[1].state[param]
        assert found.keys() == wanted.keys(), name
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


def snapshot(optimizer):
    state = {
        id(param): {key: value.clone() for key, value in entry.items()} for param, entry in optimizer.state.items()
    }
    return repr([state, optimizer.param_groups])


def refused(said, optimizer, saved):
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=said) as raised:
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before
    return str(raised.value)


def alone():
    """Where there is one process, torch says so."""
    return pytest.warns(UserWarning, match="in a single process")


def save(saved, folder):
    with alone():
        dcp.save({"optimizer": saved}, checkpoint_id=folder, no_dist=True)


W, B = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9)}, {"lr": 1e-3, "weight_decay": 0.0}
TWO = ("ab", W), ("cd", B)


# Hyperparameters follow the names


@pytest.mark.parametrize("make", [optim.AdamW, torch.optim.AdamW], ids=["ours", "torch's"])
@pytest.mark.parametrize("groups", [("cd", "ab"), ("dc", "ba"), ("c", "ab", "d"), ("c", "d", "b", "a")], ids=str)
def test_hyperparameters_follow_the_names(groups, make):
    source = trained(*TWO, make=make)
    for group in source[1].param_groups:
        group["initial_lr"] = 2 * group["lr"]  # a key of others
    target = made(*((names, {"lr": 7.0}) for names in groups), names="dbca")
    target[1].load_state_dict(through_a_file(source[1].state_dict()))
    assert_own_moments(source, target)
    for name in "abcd":
        keys = ("lr", "betas", "weight_decay", "initial_lr")
        assert of(*target, name, *keys) == of(*source, name, *keys), name
    assert [group["param_names"] for group in target[1].param_groups] == [list(names) for names in groups]
    target[0].load_state_dict(source[0].state_dict())
    train(*source)
    train(*target)
    for name in "abcd":
        assert make is not optim.AdamW or torch.equal(getattr(source[0], name), getattr(target[0], name))


def test_groups_with_the_same_hyperparameters_may_be_put_together():
    source = trained(("a", W), ("b", W), ("cd", B))
    target = made(("dc", {}), ("ba", {}))
    target[1].load_state_dict(source[1].state_dict())
    assert_own_moments(source, target)
    assert [of(*target, name, "lr", "weight_decay") for name in "ac"] == [[1e-2, 0.1], [1e-3, 0.0]]


MOVED = {"together": ("abcd",), "one moved": ("a", "bcd"), "another moved": ("abc", "d")}


@pytest.mark.parametrize("groups", MOVED.values(), ids=MOVED)
def test_a_parameter_that_has_moved_to_a_group_of_other_settings_is_named(groups):
    _, source = trained(*TWO)
    _, target = made(*((names, {}) for names in groups))
    text = refused(
        "in one group here, but were saved with different beta1, beta2, betas, lr, weight_decay",
        target,
        source.state_dict(),
    )
    assert {"parameter 'a'", "parameter 'b'", "parameter 'c'"} & set(re.findall(r"parameter '\w'", text))


def test_both_ways_of_loading_say_the_same(tmp_path):
    net, source = trained(*TWO)
    other, target = made(("abcd", {}))
    said = refused("saved with different", target, source.state_dict())
    for flat in (False, True):
        saved = get_optimizer_state_dict(net, source, options=StateDictOptions(flatten_optimizer_state_dict=flat))
        save(saved, tmp_path / str(flat))
        before = snapshot(target)
        with (
            pytest.raises(ValueError, match="saved with different") as raised,
            alone(),
        ):
            load_optimizer(other, target, tmp_path / str(flat))
        assert str(raised.value) == said
        assert snapshot(target) == before


def test_a_group_without_parameters_keeps_what_it_has():
    source = trained(*TWO)
    target = made(("cd", {}), ("", {"lr": 5.0, "param_names": []}), ("ab", {}))
    target[1].load_state_dict(source[1].state_dict())
    assert [group["lr"] for group in target[1].param_groups] == [1e-3, 5.0, 1e-2]


# One group becomes several


@pytest.mark.parametrize("make", [optim.AdamW, torch.optim.AdamW], ids=["ours", "torch's"])
def test_a_checkpoint_of_one_group_loads_into_the_groups_of_decay_groups(make):
    """The upgrade to decay_groups: all from the checkpoint, but who decays, which the groups were made for."""
    torch.manual_seed(0)
    nets = [torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 5)) for _ in range(2)]
    source = make(nets[0].named_parameters(), lr=0.02, weight_decay=0.1, betas=(0.8, 0.9))
    source.param_groups[0]["initial_lr"] = 0.5
    for _ in range(3):
        nets[0](torch.randn(2, 5)).square().sum().backward()
        source.step()
    target = optim.AdamW(optim.decay_groups(nets[1], 0.3), lr=7.0)
    target.load_state_dict(through_a_file(source.state_dict()))
    assert [group["weight_decay"] for group in target.param_groups] == [0.3, 0.0]
    for group in target.param_groups:
        assert (group["lr"], group["betas"], group["initial_lr"]) == (0.02, (0.8, 0.9), 0.5)
    for name, param in nets[1].named_parameters():
        wanted = source.state[nets[0].get_parameter(name)]
        assert all(torch.equal(target.state[param][key], wanted[key]) for key in wanted), name


def test_groups_that_do_not_differ_in_decay_take_the_saved_one():
    _, source = trained(("abcd", {"weight_decay": 0.1}))
    _, target = made(("ab", {"weight_decay": 0.3}), ("cd", {"weight_decay": 0.3}))
    target.load_state_dict(source.state_dict())
    assert [group["weight_decay"] for group in target.param_groups] == [0.1, 0.1]


def test_decay_is_kept_where_layers_were_groups_of_the_same_settings():
    source = trained(("ab", W), ("cd", W))
    target = made(("ac", {"weight_decay": 0.5}), ("bd", {"weight_decay": 0.0}))
    target[1].load_state_dict(source[1].state_dict())
    assert [group["weight_decay"] for group in target[1].param_groups] == [0.5, 0.0]
    assert_own_moments(source, target)


def test_other_settings_that_are_lost_are_told():
    _, source = trained(("abcd", {"lr": 0.5}))
    _, target = made(("ab", {"lr": 1.0, "eps": 1.0, "weight_decay": 0.0}), ("cd", {"lr": 2.0}))
    with pytest.warns(UserWarning, match="that differ in eps, lr here were saved as one group") as told:
        target.load_state_dict(source.state_dict())
    assert told[0].filename == __file__
    assert [(group["lr"], group["eps"], group["weight_decay"]) for group in target.param_groups] == [
        (0.5, 1e-8, 0.0),
        (0.5, 1e-8, 0.01),
    ]


@pytest.mark.parametrize("flat", [False, True], ids=["groups", "flattened"])
def test_load_optimizer_keeps_the_decay_of_the_groups_too(flat, tmp_path):
    net, source = trained(("abcd", {"weight_decay": 0.1, "lr": torch.tensor(0.5)}), named=False)
    saved = get_optimizer_state_dict(net, source, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    save(saved, tmp_path / "saved")
    other, target = made(("db", {"weight_decay": 0.3}), ("ac", {"weight_decay": 0.0}), named=False)
    with alone():
        load_optimizer(other, target, tmp_path / "saved")
    assert [(float(group["lr"]), group["weight_decay"]) for group in target.param_groups] == [(0.5, 0.3), (0.5, 0.0)]
    assert_own_moments((net, source), (other, target))


# Names and positions


def test_without_names_position_and_sizes_decide():
    _, source = trained(*TWO, named=False)
    _, target = made(("ab", {}), ("cd", {}))
    target.load_state_dict(source.state_dict())
    assert [group["lr"] for group in target.param_groups] == [1e-2, 1e-3]
    _, target = made(("abc", {}), ("d", {}))
    refused(r"expected groups of \[3, 1\] parameters like the optimizer's, got \[2, 2\]", target, source.state_dict())


def test_names_that_contradict_the_positions_are_refused():
    """One layer renamed, the rest in another order: neither name nor position would give each its own."""
    _, source = trained(("abcd", {}))
    _, target = made(("bace", {}), names="abce")
    refused("parameter 'a' is number 1 in the optimizer and was saved as number 0", target, source.state_dict())
    _, target = made(("abce", {}), names="abce")
    with pytest.warns(UserWarning, match="by position"):
        target.load_state_dict(source.state_dict())


@pytest.mark.parametrize("flat", [False, True], ids=["groups", "flattened"])
@pytest.mark.parametrize("order", ["abcd", "cadb"])
def test_torchs_functions_load_names_in_another_order(order, flat):
    """set_optimizer_state_dict puts 'params' in the order here and leaves 'param_names' in that of the checkpoint."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    source = trained(("abcd", {"lr": 0.5}))
    saved = get_optimizer_state_dict(*source, options=options)
    for named in (True, False):
        target = made((order, {}), names=order, named=named)
        if flat and not named:
            for group in source[1].param_groups:
                group.pop("param_names", None)
            saved = get_optimizer_state_dict(*source, options=options)
        set_optimizer_state_dict(*target, copy.copy(saved), options=options)
        assert_own_moments(source, target)
        (group,) = target[1].param_groups
        assert group["lr"] == 0.5
        assert group.get("param_names", list(order)) == list(order)


def test_what_torchs_functions_lose_of_groups_is_refused():
    """They give one of the groups here nothing, where the parameters were spread otherwise."""
    for named in (True, False):
        source = trained(("abcd", {"lr": 0.5}), named=named)
        target = made(("ab", {}), ("cd", {}), named=named)
        before = [copy.copy(group) for group in target[1].param_groups]
        with pytest.raises(ValueError, match=r"'param_groups'\]\[0\].*use lucid.optim.checkpoint.load_optimizer"):
            set_optimizer_state_dict(*target, get_optimizer_state_dict(*source))
        assert target[1].param_groups == before


def test_names_and_keys_that_give_two_orders_are_refused():
    """Keys that are names, as torch's functions make them, and other names: whose is whose is not known."""
    _, source = trained(("abcd", {}))
    saved = source.state_dict()
    saved["state"] = {f"wrapped.{'abcd'[number]}": entry for number, entry in saved["state"].items()}
    saved["param_groups"][0]["params"] = list(saved["state"])
    _, target = made(("dcba", {}))
    refused(
        "calls a parameter 'wrapped.a', 'param_names' calls it 'a', and the optimizer has them in another order",
        target,
        saved,
    )
    _, target = made(("abcd", {}))
    target.load_state_dict(saved)
    assert torch.equal(list(target.state.values())[3]["exp_avg"], saved["state"]["wrapped.d"]["exp_avg"])


# Lists of parameters that someone has changed by hand

BY_HAND = {
    "appended": lambda params, more: params.append(more),
    "inserted": lambda params, more: params.insert(0, more),
    "removed": lambda params, more: params.pop(0),
    "emptied": lambda params, more: params.clear(),
}


@pytest.mark.parametrize("change", BY_HAND.values(), ids=BY_HAND)
@pytest.mark.parametrize("make", [optim.AdamW, torch.optim.AdamW], ids=["ours", "torch's"])
def test_what_a_group_changed_by_hand_has_saved_loads(make, change):
    """Into one made and changed the same way, one with all names, one with none; torch takes it as well."""

    def changed(make, steps):
        net, optimizer = made(("abc", {}), make=make)
        if steps:
            net.d.grad = None
            optimizer.zero_grad()
        change(optimizer.param_groups[0]["params"], net.d)
        if steps:
            train(net, optimizer)
        return net, optimizer

    source = changed(make, 2)
    saved = through_a_file(source[1].state_dict())
    name_of = {param: name for name, param in source[0].named_parameters()}
    order = [name_of[param] for param in source[1].param_groups[0]["params"]]
    targets = [changed(optim.AdamW, 0)]
    targets += [made(("".join(order), {}), named=named) for named in (True, False) if order]
    for net, optimizer in targets:
        optimizer.load_state_dict(saved)
        for name in order:
            assert torch.equal(
                optimizer.state[getattr(net, name)]["exp_avg"], source[1].state[getattr(source[0], name)]["exp_avg"]
            )
        train(net, optimizer)
        again = optimizer.state_dict()
        optimizer.load_state_dict(through_a_file(again))
    if make is optim.AdamW:
        changed(torch.optim.AdamW, 0)[1].load_state_dict(saved)


def test_names_are_saved_where_there_is_one_for_each_parameter():
    """Of a list that was changed, a name may be another parameter's; the other groups keep theirs."""
    net, optimizer = made(("ab", {}), ("c", {}))
    optimizer.param_groups[0]["params"].append(net.d)
    saved = optimizer.state_dict()["param_groups"]
    assert "param_names" not in saved[0]
    assert saved[1]["param_names"] == ["c"]


@pytest.mark.parametrize("names", [None, 3, "ab", [], {0: "a"}, ["a", "b", "c"]], ids=repr)
def test_whatever_stands_for_names_what_is_saved_loads(names):
    net, optimizer = trained(("ab", {}), names="ab")
    optimizer.param_groups[0]["param_names"] = names
    for saved in (optimizer.state_dict(), get_optimizer_state_dict(net, optimizer)):
        target = made(("ab", {}), names="ab")
        target[1].load_state_dict(saved)
        assert_own_moments((net, optimizer), target)


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]], ids=["fewer", "more"])
def test_names_that_are_not_as_many_as_parameters_match_nothing(names):
    """In a checkpoint of torch's, or of ours from before: matched by position, and not taken over."""
    _, source = trained(("ab", {}), names="ab")
    saved = source.state_dict()
    saved["param_groups"][0]["param_names"] = names
    _, target = made(("ab", {}), names="ab", named=False)
    target.load_state_dict(saved)
    assert [float(entry["step"]) for entry in target.state.values()] == [2, 2]
    assert "param_names" not in target.param_groups[0]


def test_a_group_changed_by_hand_is_loaded_by_position_only_where_the_other_names_stand_there():
    def changed(*groups):
        net, optimizer = made(*groups)
        optimizer.param_groups[0]["params"].append(net.d)
        return net, optimizer

    source = changed(("a", {}), ("bc", {}))
    train(*source)
    target = changed(("a", {}), ("bc", {}))
    target[1].load_state_dict(source[1].state_dict())
    assert_own_moments(source, target)
    target = changed(("a", {}), ("cb", {}))
    refused("parameter 'b' is number 3 in the optimizer and was saved as number 2", target[1], source[1].state_dict())


def test_a_parameter_in_two_groups_has_the_number_of_its_first_place():
    optimizers = [made(("ab", {}), make=make, names="ab") for make in (optim.AdamW, torch.optim.AdamW)]
    for net, optimizer in optimizers:
        train(net, optimizer)
        once = optimizer.state_dict()
        optimizer.param_groups.extend(optimizer.param_groups)
        twice = optimizer.state_dict()
        assert [group["params"] for group in twice["param_groups"]] == [[0, 1], [0, 1]]
        assert twice["param_groups"][-1] == once["param_groups"][-1]
        assert twice["state"].keys() == once["state"].keys() == {0, 1}
    net, ours = optimizers[0]
    before = {key: value.clone() for key, value in ours.state[net.b].items()}
    ours.load_state_dict(through_a_file(ours.state_dict()))
    assert all(torch.equal(ours.state[net.b][key], value) for key, value in before.items())
    _, once = made(("ab", {}), ("cd", {}))
    refused("each parameter's number or name exactly once", once, twice)


@pytest.mark.parametrize("places", [("ab", "bc"), ("bc", "ab"), ("cb", "ba"), ("ba", "cb")], ids=str)
def test_a_parameter_in_two_groups_is_found_by_its_name(places):
    """By position, the moments of two parameters would change places, and nobody would say so."""

    def overlapping(first, second, **options):
        net, optimizer = made((first, options), names="abc")
        optimizer.param_groups.append(optimizer.param_groups[0] | {"lr": 0.25})
        optimizer.param_groups[1]["params"] = [getattr(net, name) for name in second]
        optimizer.param_groups[1]["param_names"] = list(second)
        return net, optimizer

    source = overlapping("ab", "bc", lr=0.5)
    for number, param in enumerate((source[0].a, source[0].b, source[0].c), 1):
        source[1].state[param] = {key: torch.full_like(param, number) for key in ("exp_avg", "exp_avg_sq")}
        source[1].state[param]["step"] = torch.tensor(float(number))
    target = overlapping(*places)
    target[1].load_state_dict(through_a_file(source[1].state_dict()))
    assert_own_moments(source, target)
    assert {frozenset(group["param_names"]): group["lr"] for group in target[1].param_groups} == {
        frozenset("ab"): 0.5,
        frozenset("bc"): 0.25,
    }


# Keys and step counts that a file has changed


@pytest.mark.parametrize("which", ["state", "groups", "both"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "nameless"])
def test_numbers_that_have_become_strings_are_numbers(which, named):
    """As JSON, or a conversion to safetensors and back, makes them."""
    source = trained(*TWO, named=named)
    saved = source[1].state_dict()
    if which != "groups":
        saved["state"] = {str(number): entry for number, entry in saved["state"].items()}
    if which != "state":
        for group in saved["param_groups"]:
            group["params"] = list(map(str, group["params"]))
    target = made(*TWO, named=named)
    target[1].load_state_dict(saved)
    assert_own_moments(source, target)
    assert len(target[1].state) == 4


def test_numbers_that_are_there_as_strings_too_are_refused():
    _, source = trained(("ab", {}), names="ab")
    saved = source.state_dict()
    saved["state"]["1"] = saved["state"][0]
    _, target = made(("ab", {}), names="ab")
    refused("expected the state of parameter 1 once, got it as 1 and '1'", target, saved)


@pytest.mark.parametrize("key", [7, -1, "7", "01", "a", "module.a"], ids=repr)
def test_state_of_no_parameter_is_refused(key):
    """It was somebody's: without it training would begin anew, and nobody would say so."""
    _, source = trained(("ab", {}), names="ab")
    saved = source.state_dict()
    saved["state"][key] = saved["state"].pop(0)
    _, target = made(("ab", {}), names="ab")
    refused(rf"expected the keys that groups have in 'params' \(\[0, 1\]\), got state of {key!r};", target, saved)


SMALL = [(torch.bfloat16, 10_001), (torch.bfloat16, 258), (torch.float16, 2049), (torch.float16, 300)]
SURE = [
    (torch.bfloat16, 256),
    (torch.float16, 7),
    (torch.float32, 10_001),
    (torch.float64, 10_001),
    (torch.int64, 10_001),
]


@pytest.mark.parametrize(("dtype", "step"), SMALL + SURE, ids=str)
def test_a_step_count_of_16_bits_is_doubted_by_name(dtype, step):
    _, source = trained(("abcd", {}))
    saved = copy.deepcopy(source.state_dict())
    for number in (1, 2):
        saved["state"][number]["step"] = torch.tensor(step, dtype=torch.int64).to(dtype)
    _, target = made(("dcba", {}))
    if (dtype, step) in SMALL:
        with pytest.warns(UserWarning, match=rf"of parameter '[bc]' and of 1 more was saved as {dtype}") as told:
            target.load_state_dict(saved)
        assert len(told) == 1
        assert told[0].filename == __file__
        assert f"the step count {float(torch.tensor(step).to(dtype)):g} " in str(told[0].message)
    else:
        target.load_state_dict(saved)
    held = {float(entry["step"]) for entry in target.state.values()}
    assert held == {2.0, float(torch.tensor(step).to(dtype))}
    assert {entry["step"].dtype for entry in target.state.values()} == {torch.float32}
