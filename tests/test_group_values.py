"""Guards what may stand in a group, and what is saved of it.

Numbers come from numpy, configurations from libraries with lists of their own, and people change groups by hand. What
is saved has to be plain Python and tensors in every key, or `torch.load(weights_only=True)`, `load_optimizer` and the
command refuse a checkpoint of our own.
"""

import collections
import copy
import enum
import fractions
import pickle
import types
from collections.abc import ValuesView

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn import Parameter
from typer.testing import CliRunner

import lucid.optim as optim
from bits import through_a_file
from lucid.cli.app import app
from lucid.engine.values import plain
from lucid.optim.checkpoint import load_optimizer, torch_optimizer_state_dict


class Kind(str, enum.Enum):  # noqa: UP042, whose str() is not its value
    EIGHT = "8bit"


class Level(enum.IntEnum):
    THREE = 3
    FIVE = 5


class Name(str):
    """A string whose repr is not that of its characters."""

    def __repr__(self):
        return f"Name({str(self)!r})"


def trained(**options):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    optimizer = optim.AdamW(net.named_parameters(), **options)
    for _ in range(3):
        net(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    return net, optimizer


PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Tensor, list, tuple, dict)


def assert_plain(value, path=""):
    assert type(value) in PLAIN, f"{path}: {type(value)}"
    if isinstance(value, dict):
        for key, each in value.items():
            assert_plain(key, f"{path}.{key}")
            assert_plain(each, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            assert_plain(each, f"{path}[{index}]")


# Every value, under every key

VALUES = [
    (np.float64(0.5), 0.5),
    (np.float32(0.5), 0.5),
    (np.longdouble("0.5"), 0.5),
    (np.int64(3), 3),
    (np.uint8(3), 3),
    (np.bool_(True), True),
    (np.complex128(1j), 1j),
    (np.str_("a"), "a"),
    (np.bytes_(b"x"), b"x"),
    ({frozenset((1,)): np.int64(2)}, {(1,): 2}),
    ({(np.int64(1), frozenset((2,))): 3}, {(1, (2,)): 3}),
    (np.array(0.5), 0.5),
    (np.array([0.5]), 0.5),
    (np.array([[0.5]]), 0.5),
    (np.array([1, 2]), [1, 2]),
    (np.array([[1.5], [2.5]]), [[1.5], [2.5]]),
    (np.array([np.float64(0.5), "a"], dtype=object), [0.5, "a"]),
    (np.array([], dtype=np.float32), []),
    (fractions.Fraction(1, 2), 0.5),
    (Kind.EIGHT, "8bit"),
    (Level.THREE, 3),
    ([np.float64(0.5), 1], [0.5, 1]),
    ((np.float64(0.5), [np.int64(1)]), (0.5, [1])),
    ({"a": {np.str_("b"): (np.int64(1),)}}, {"a": {"b": (1,)}}),
    (collections.UserList([np.float64(0.5)]), [0.5]),
    (collections.UserDict(a=np.int64(1)), {"a": 1}),
    (collections.deque([np.int64(1)]), [1]),
    (collections.defaultdict(list, a=np.int64(1)), {"a": 1}),
    (types.MappingProxyType({"a": 1}), {"a": 1}),
    (range(3), [0, 1, 2]),
]


@pytest.mark.parametrize(("value", "wanted"), VALUES, ids=repr)
@pytest.mark.filterwarnings("ignore:param_groups")
def test_what_is_saved_is_plain_in_every_key(value, wanted):
    net, optimizer = trained()
    optimizer.param_groups[0] |= {"mine": value, "nested": [{"deep": (value,)}]}
    optimizer.state[net.bias]["mine"] = value
    optimizer.state["of no parameter"] = {"mine": value}
    optimizer.state[np.int64(9)] = "of none either"
    saved = optimizer.state_dict()
    (group,) = saved["param_groups"]
    for found in (group["mine"], group["nested"][0]["deep"][0], saved["state"][1]["mine"]):
        assert found == wanted
        assert type(found) is type(wanted)
    assert_plain(saved)
    again = through_a_file(saved)
    optimizer.load_state_dict(again)
    assert optimizer.param_groups[0]["mine"] == wanted
    theirs = torch.optim.AdamW(net.named_parameters())
    theirs.load_state_dict(through_a_file(optimizer.torch_state_dict()))


def test_what_is_plain_is_saved_as_it_is():
    """Tensors are those of the state, and so are the dicts of parameters; a tensor of the group stays one."""
    for value in (None, True, 3, 0.5, 1j, "a", b"a", [1, [2]], (1,), {"a": {"b": 1}}, {1}, torch.Size([1]), object()):
        assert plain(value) is value
    lr = torch.tensor(0.1)
    net, optimizer = trained(lr=lr)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["lr"] is lr
    assert all(saved["state"][number] is optimizer.state[param] for number, param in enumerate(net.parameters()))
    optimizer.state[net.bias]["step"] = np.int64(3)
    saved = optimizer.state_dict()
    assert saved["state"][1]["step"] == 3
    assert type(saved["state"][1]["step"]) is int
    assert saved["state"][1]["exp_avg"] is optimizer.state[net.bias]["exp_avg"]


NUMPYS = {
    "betas": (np.float64(0.8), np.float32(0.5)),
    "lr": np.array([0.25]),
    "eps": np.float32(0.5),
    "weight_decay": np.array(0.125),
    "initial_lr": np.float64(0.5),
    "max_momentum": np.float64(0.75),
    "amsgrad": np.bool_(False),
    "state_format": Kind.EIGHT,
    "seed": np.int64(7),
}


@pytest.mark.parametrize("way", ["file", "load_optimizer", "torch's", "command"])
def test_a_group_of_numpys_numbers_is_read_by_everyone(way, tmp_path):
    net, optimizer = trained()
    optimizer.param_groups[0].update(NUMPYS)
    optimizer.state[net.bias]["step"] = np.int64(3)
    wanted = {"lr": 0.25, "eps": 0.5, "weight_decay": 0.125, "initial_lr": 0.5, "max_momentum": 0.75}
    twin, target = trained(lr=7.0)
    path = tmp_path / "saved.pt"
    if way in ("file", "command"):
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, path)
    if way == "command":
        result = CliRunner().invoke(app, ["inspect", str(path)])
        assert result.exit_code == 0, result.output
        assert "nothing odd" in result.output
        return
    if way == "file":
        target.load_state_dict(torch.load(path, weights_only=True)["optimizer"])
    elif way == "load_optimizer":
        optimizer.state[net.bias]["step"] = torch.tensor(3.0)  # DCP saves tensors
        with pytest.warns(UserWarning, match="in a single process"):  # torch says so
            dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=path)
        with pytest.warns(UserWarning, match="in a single process"):
            load_optimizer(twin, target, path)
    else:
        assert_plain(torch_optimizer_state_dict(net, optimizer, flatten=True))
        target.load_state_dict(through_a_file(optimizer.torch_state_dict()))
    (group,) = target.param_groups
    assert {key: group[key] for key in wanted} == wanted
    assert group["betas"] == (0.8, 0.5)
    assert [float(entry["step"]) for entry in target.state.values()] == [3, 3]
    target.step()


def test_copies_and_pickles_keep_what_groups_hold():
    _, optimizer = trained()
    optimizer.param_groups[0].update(NUMPYS)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (group,) = twin.param_groups
        assert type(group["lr"]) is np.ndarray
        assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("step", [np.int64(3), np.float32(3), np.uint8(3), fractions.Fraction(3)], ids=repr)
def test_a_step_count_of_any_kind_of_number_is_stepped_and_loaded(step):
    net, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["step"] = step
    optimizer.load_state_dict(saved)
    assert float(optimizer.state[net.bias]["step"]) == 3
    optimizer.state[net.bias]["step"] = step
    optimizer.step()
    assert float(optimizer.state[net.bias]["step"]) == 4


def test_a_step_count_of_numpys_float16_is_doubted():
    _, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["step"] = np.float16(2049)
    with pytest.warns(UserWarning, match="the step count 2048 of parameter 'bias' was saved as float16"):
        optimizer.load_state_dict(saved)


def test_numpys_seed_and_flags_are_taken_for_what_they_are():
    net, _ = trained()
    optimizer = optim.AdamW(net.parameters(), seed=np.int64(5), amsgrad=np.True_, maximize=np.bool_(False))
    optimizer.step()
    assert "max_exp_avg_sq" in optimizer.state[net.bias]
    plainly = optim.AdamW(net.parameters(), seed=5, amsgrad=True, maximize=False)
    assert optimizer.state_dict()["param_groups"] == plainly.state_dict()["param_groups"]
    for seed in (np.int64(-1), np.uint64(2**63), np.float64(1), np.bool_(True)):
        with pytest.raises((TypeError, ValueError), match="seed: expected a whole number"):
            optim.AdamW(net.parameters(), seed=seed)


def test_numpys_names_and_seeds_give_the_draws_of_plain_ones():
    """A parameter that gets state after a resume has to draw as it would have before."""
    streams = []
    for kind, seed in ((str, 5), (np.str_, np.int64(5)), (Name, Level.FIVE)):
        param = Parameter(torch.ones(64, 64))
        optimizer = optim.AdamW([(kind("a"), param)], state_format="8bit", seed=seed)
        optimizer.init_state()
        streams.append(int(optimizer.state[param]["stream"]))
    assert len(set(streams)) == 1


# Betas


class Listlike:
    """As the lists of configuration libraries: no list, not even a Sequence."""

    def __init__(self, *items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


PAIRS = {
    "tuple": lambda: (0.5, 0.75),
    "list": lambda: [0.5, 0.75],
    "UserList": lambda: collections.UserList([0.5, 0.75]),
    "deque": lambda: collections.deque([0.5, 0.75]),
    "a class of its own": lambda: Listlike(0.5, 0.75),
    "numpy's numbers": lambda: (np.float64(0.5), np.float32(0.75)),
    "array": lambda: np.array([0.5, 0.75]),
    "array of float16": lambda: np.array([0.5, 0.75], dtype=np.float16),
    "tensor": lambda: torch.tensor([0.5, 0.75]),
    "tensor of bfloat16": lambda: torch.tensor([0.5, 0.75], dtype=torch.bfloat16),
    "Parameter": lambda: Parameter(torch.tensor([0.5, 0.75])),
    "generator": lambda: (beta for beta in (0.5, 0.75)),
    "values of a dict": lambda: {"beta1": 0.5, "beta2": 0.75}.values(),
}


@pytest.mark.parametrize("where", ["argument", "group", "added", "set", "loaded"])
@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_betas_are_any_two_numbers_in_order(make, where):
    net, _ = trained()
    if where == "argument":
        optimizer = optim.AdamW(net.parameters(), betas=make())
    elif where == "group":
        optimizer = optim.AdamW([{"params": net.parameters(), "betas": make()}])
    elif where == "added":
        optimizer = optim.AdamW([Parameter(torch.ones(1))])
        optimizer.add_param_group({"params": net.parameters(), "betas": make()})
    else:
        optimizer = optim.AdamW(net.parameters())
        if where == "set":
            optimizer.param_groups[0]["betas"] = make()
        else:
            saved = optimizer.state_dict()
            can_be_saved = not isinstance(make(), types.GeneratorType | ValuesView)
            saved["param_groups"][0]["betas"] = make() if can_be_saved else list(make())
            optimizer.load_state_dict(saved)
    group = optimizer.param_groups[-1]
    assert group["betas"] == (0.5, 0.75)
    optimizer.step()
    saved = through_a_file(optimizer.state_dict())["param_groups"][-1]
    assert (saved["betas"], saved["beta1"], saved["beta2"]) == ((0.5, 0.75), 0.5, 0.75)


NO_PAIRS = {
    "a set": {0.5, 0.75},
    "a frozenset": frozenset((0.5, 0.75)),
    "a dict": {"beta1": 0.5, "beta2": 0.75},
    "keys": {0.5: 1, 0.75: 2}.keys(),
    "a string": "ab",
    "bytes": b"ab",
    "a number": 0.5,
    "None": None,
    "one": (0.5,),
    "three": collections.UserList([0.5, 0.75, 0.9]),
    "an array of one": np.array([0.5]),
    "an array without dimensions": np.array(0.5),
    "a tensor of three": torch.ones(3),
    "a tensor of two dimensions": torch.ones(2, 2),
    "endless": iter(int, 1),
}


@pytest.mark.parametrize("betas", NO_PAIRS.values(), ids=NO_PAIRS)
def test_what_is_no_pair_of_betas_is_refused(betas):
    optimizer = optim.AdamW([Parameter(torch.ones(1))])
    before = dict(optimizer.param_groups[0])
    with pytest.raises(TypeError, match=r"betas: expected a pair of numbers in order, such as \(0.9, 0.999\), got "):
        optimizer.param_groups[0]["betas"] = betas
    assert dict(optimizer.param_groups[0]) == before


def test_betas_that_cannot_be_read_are_refused_for_that():
    with pytest.raises(TypeError, match=r"got a Tensor of shape \(2,\) and dtype torch.float32, which cannot be read"):
        optim.AdamW([Parameter(torch.ones(1))], betas=torch.ones(2, device="meta"))


@pytest.mark.parametrize("betas", [collections.UserList([0.5, 1.0]), np.array([0.5, 1.0]), torch.tensor([0.5, 1.0])])
def test_a_beta_out_of_range_is_named(betas):
    with pytest.raises(ValueError, match=r"beta2: expected a number in \[0, 1\), got 1.0"):
        optim.AdamW([Parameter(torch.ones(1))], betas=betas)


# The caller's dicts


def test_the_callers_groups_are_copied_and_param_groups_are_what_counts():
    """Where torch keeps the caller's dict itself, ours stays the caller's: docs/migrate.md says how to set a rate."""
    params = [Parameter(torch.ones(2)) for _ in range(2)]
    for make, shared in ((optim.AdamW, False), (torch.optim.AdamW, True)):
        groups = [{"params": [param], "lr": 0.5} for param in params]
        optimizer = make(groups)
        groups[0]["lr"] = 0.0
        assert optimizer.param_groups[0]["lr"] == (0.0 if shared else 0.5)
        optimizer.param_groups[1]["lr"] = 0.25
        assert groups[1]["lr"] == (0.25 if shared else 0.5)
        for param in params:
            param.grad = torch.ones(2)
        before = [param.detach().clone() for param in params]
        optimizer.step()
        assert torch.equal(params[0].detach(), before[0]) == shared
        assert not torch.equal(params[1].detach(), before[1])


def test_an_added_groups_dict_stays_the_callers_too():
    optimizer = optim.AdamW([Parameter(torch.ones(2))])
    group = {"params": [Parameter(torch.ones(2))], "lr": 0.5}
    optimizer.add_param_group(group)
    group["lr"] = 0.0
    group["params"].clear()
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert len(optimizer.param_groups[1]["params"]) == 1
