"""Guards saving and loading: to and from ourselves, `torch.optim.AdamW`, torch's checkpoint tools.

A checkpoint that loads wrongly costs days and is noticed late, so: resuming changes no bit; what
does not fit is refused with nothing changed; nothing loaded shares memory with its source; and
whoever comes from torch or goes back to it keeps moments and step counts.
"""

import copy
import fractions
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn import Parameter

import lucid.optim as optim
from bits import tensors_in, through_a_file
from lucid.optim.groups import ParamGroup
from quick import examples

SHAPES = [(3, 5), (7,), ()]


def make_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(optimizer, params, start, stop):
    """Steps number `start` to `stop`, each with the gradients of its number, on every parameter."""
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(1000 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def bits(value):
    """All that `value` holds, in a form that `==` compares to the bit."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.shape, value.detach().numpy().tobytes())
    if isinstance(value, dict):
        return {id(k) if isinstance(k, torch.Tensor) else k: bits(v) for k, v in value.items()}
    return [bits(item) for item in value] if isinstance(value, list | tuple) else value


def everything(optimizer):
    groups = optimizer.param_groups
    return bits([[id(g) for g in groups], groups, dict(optimizer.state), optimizer.defaults])


def trained(steps=3, params=None, make=optim.AdamW, **options):
    params = make_params() if params is None else params
    optimizer = make(params, **{"lr": 0.01, **options})
    train(optimizer, params, 0, steps)
    return optimizer, params


# To and from a file


def test_state_dict_is_plain_and_documented():
    optimizer, _ = trained(betas=(0.8, 0.95), amsgrad=True)
    saved = optimizer.state_dict()
    assert type(saved["state"]) is dict
    assert list(saved["state"]) == [0, 1, 2]
    for entry in saved["state"].values():
        assert type(entry) is dict
        assert list(entry) == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
        assert {type(x) for x in entry.values()} == {torch.Tensor}
        step = entry["step"]
        assert (step.dtype, step.shape, step.item()) == (torch.float32, (), 3.0)
    (group,) = saved["param_groups"]
    assert type(group) is dict
    assert group == {
        "lr": 0.01,
        "beta1": 0.8,
        "beta2": 0.95,
        "betas": (0.8, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "amsgrad": True,
        "maximize": False,
        "state_format": "fp32",
        "master_weights": True,
        "seed": 0,
        "weight_decay_schedule": "lr",
        "reference_lr": None,
        "cautious_decay": False,
        "ema_decay": None,
        "state_version": 1,
        "params": [0, 1, 2],
    }
    assert "betas" not in optimizer.param_groups[0].keys()  # noqa: SIM118, the stored keys


@pytest.mark.parametrize("version", [2, 100])
def test_state_of_a_later_version_is_refused_and_changes_nothing(version):
    optimizer, _ = trained()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["state_version"] = version
    target, _ = trained(1)
    before = everything(target)
    with pytest.raises(ValueError, match=f"state has version {version}, but this lucid-optim reads versions up to 1"):
        target.load_state_dict(saved)
    assert everything(target) == before


@pytest.mark.parametrize("version", [0, -1, 1.0, "1", None, True])
def test_what_is_no_version_is_refused(version):
    optimizer, _ = trained()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["state_version"] = version
    with pytest.raises(ValueError, match="expected a whole number of at least 1 as state_version"):
        optimizer.load_state_dict(saved)


def test_state_without_a_version_is_of_the_first():
    optimizer, _ = trained()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["state_version"]
    other, _ = trained(1)
    other.load_state_dict(saved)
    assert bits(other.state_dict()) == bits(optimizer.state_dict())
    assert "state_version" not in other.param_groups[0]


@settings(max_examples=examples(30), deadline=None)
@given(
    k=st.integers(0, 6),
    rest=st.integers(1, 4),
    amsgrad=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.complex64]),
    way=st.sampled_from(["file", "torch file", "pickle", "deepcopy", "DCP"]),
)
def test_resuming_at_any_step_changes_no_bit(k, rest, amsgrad, dtype, way):
    options = {"amsgrad": amsgrad, "betas": (0.8, 0.95)}
    optimizer, params = trained(k, make_params(dtype), **options)
    if way in ("pickle", "deepcopy"):
        pair = (optimizer, params)
        resumed, twins = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    else:
        twins = [Parameter(param.detach().clone()) for param in params]
        resumed = optim.AdamW(twins)
        saved = optimizer.state_dict()
        if way == "torch file":
            theirs = torch.optim.AdamW([Parameter(param.detach().clone()) for param in params])
            theirs.load_state_dict(saved)
            saved = theirs.state_dict()
        if way == "DCP":
            saved = dcp.get_optimizer_state_dict(nn.ParameterList(params), optimizer)
            dcp.set_optimizer_state_dict(nn.ParameterList(twins), resumed, saved)
        else:
            resumed.load_state_dict(through_a_file(saved))
    train(optimizer, params, k, k + rest)
    train(resumed, twins, k, k + rest)
    assert bits(params) == bits(twins)
    ours, its = optimizer.state_dict(), resumed.state_dict()
    assert bits(ours["state"]) == bits(its["state"])
    assert ours["param_groups"][0].items() <= its["param_groups"][0].items()


def test_nothing_loaded_is_shared_with_its_source():
    optimizer, params = trained(lr=torch.tensor(0.01), amsgrad=True)
    saved = optimizer.state_dict()
    saved["state"][0] |= {"mine": torch.ones(3), "nested": {"deep": [torch.ones(2)]}}
    saved["state"][99] = torch.ones(2)
    saved["param_groups"][0]["mine"] = [torch.ones(3)]
    other = optim.AdamW([Parameter(param.detach().clone()) for param in params])
    other.load_state_dict(saved)
    before = everything(other)
    held = tensors_in([dict(other.state), [{**g, "params": []} for g in other.param_groups]])
    given_tensors = tensors_in(saved)
    assert len(held) == len(given_tensors) == 3 * 4 + 5
    addresses = {tensor.data_ptr() for tensor in given_tensors}
    assert not addresses & {tensor.data_ptr() for tensor in held}
    for tensor in given_tensors:
        tensor.fill_(77)
    saved["param_groups"][0]["mine"].append(1)
    assert everything(other) == before


@pytest.mark.parametrize("lr", [np.float64(0.5), np.float32(0.5), fractions.Fraction(1, 2), 1])
def test_every_lr_that_is_allowed_can_be_saved_and_read_with_weights_only(lr):
    optimizer, params = trained()
    for group in optimizer.param_groups:
        group["lr"] = lr  # as a schedule made with numpy does
    train(optimizer, params, 3, 4)
    other = optim.AdamW(make_params())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == lr


def test_an_optimizer_loads_its_own_state_dict():
    optimizer, params = trained()
    twin, twins = copy.deepcopy((optimizer, params))
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, params, 3, 5)
    train(twin, twins, 3, 5)
    assert bits(params) == bits(twins)


def test_keys_that_are_not_ours_are_kept():
    optimizer, _ = trained()
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= {"initial_lr": 0.5, "max_momentum": 0.95, "fused": None, "x": [1]}
    saved["state"][0]["mine"] = torch.arange(3)
    saved["state"][99] = {"of": "no parameter"}
    other = optim.AdamW(make_params())
    other.load_state_dict(saved)
    again = other.state_dict()
    assert bits(again) == bits(saved)
    assert type(other.param_groups[0]) is ParamGroup


@pytest.mark.parametrize("given_betas", [(0.5, 0.75), [0.5, 0.75]])
def test_betas_win_and_what_is_missing_comes_from_defaults(given_betas):
    optimizer, _ = trained()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["betas"] = given_betas
    for key in ("eps", "weight_decay", "amsgrad", "maximize", "lr"):
        del saved["param_groups"][0][key]
    defaults = {"eps": 0.1, "weight_decay": 0.2, "amsgrad": True, "maximize": True, "lr": 0.3}
    other = optim.AdamW([{"params": make_params(), "lr": 7.0, "eps": 7.0}], **defaults)
    other.load_state_dict(saved)
    (group,) = other.param_groups
    assert {key: group[key] for key in defaults} == defaults
    assert (group["beta1"], group["beta2"]) == (0.5, 0.75)


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor([3.0]), torch.tensor(3, dtype=torch.int64)])
def test_step_counts_of_older_torch_become_ours(step):
    optimizer, params = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = step
    twins = [Parameter(param.detach().clone()) for param in params]
    other = optim.AdamW(twins)
    other.load_state_dict(saved)
    train(optimizer, params, 3, 5)
    train(other, twins, 3, 5)
    assert bits(params) == bits(twins)
    assert bits(other.state_dict()["state"]) == bits(optimizer.state_dict()["state"])


def test_moments_of_another_dtype_are_converted():
    optimizer, params = trained(params=make_params(torch.float64))
    twins = make_params()
    other = optim.AdamW(twins)
    other.load_state_dict(optimizer.state_dict())
    for param, twin in zip(params, twins, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert other.state[twin][key].dtype == torch.float32
            assert torch.equal(other.state[twin][key], optimizer.state[param][key].float())


@pytest.mark.parametrize("key", ["exp_avg", "step"])
def test_a_saved_tensor_with_a_gradient_loads_as_plain_state(key):
    optimizer, params = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry[key] = Parameter(entry[key])
    twins = [Parameter(param.detach().clone()) for param in params]
    other = optim.AdamW(twins)
    other.load_state_dict(saved)
    assert not any(t.requires_grad for t in tensors_in(dict(other.state)))
    train(optimizer, params, 3, 5)
    train(other, twins, 3, 5)
    assert bits(params) == bits(twins)


# To and from torch.optim.AdamW

KINDS = [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}, {"maximize": True}]


def of_torch(params, **options):
    return torch.optim.AdamW(params, **options)


@pytest.mark.parametrize("named", [False, True], ids=["nameless", "named"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("to_torch", [False, True], ids=["from torch", "to torch"])
def test_training_goes_on_across_the_two(kind, named, to_torch):
    def made(make, params):
        options = {"betas": (0.8, 0.95), "weight_decay": 0.1, "lr": 0.05}
        ours_too = {k: v for k, v in kind.items() if k not in ("foreach", "fused")}
        options |= ours_too if make is optim.AdamW else kind
        return make(list(zip("abc", params, strict=True)) if named else params, **options)

    one, two = (optim.AdamW, of_torch) if to_torch else (of_torch, optim.AdamW)
    params = make_params()
    source = made(one, params)
    train(source, params, 0, 10)
    twins = [Parameter(param.detach().clone()) for param in params]
    target = two(list(zip("abc", twins, strict=True)) if named else twins, lr=9.0)
    forgetful = copy.deepcopy(params)
    target.load_state_dict(through_a_file(source.state_dict()))
    (group,), (wanted,) = target.param_groups, source.param_groups
    for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
        assert group[key] == wanted[key]
    train(source, params, 10, 20)
    train(target, twins, 10, 20)
    assert [int(target.state[param]["step"]) for param in twins] == [20, 20, 20]
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(twin, param, rtol=1e-5, atol=1e-6)
        for key, value in source.state[param].items():
            torch.testing.assert_close(target.state[twin][key], value, rtol=1e-5, atol=1e-6)
    train(made(two, forgetful), forgetful, 10, 20)  # the test sees it when the state is not taken
    assert not torch.allclose(forgetful[0], params[0], rtol=1e-3, atol=1e-3)


# Names


def named(names, params):
    return optim.AdamW([(name, params[name]) for name in names], lr=0.01)


@pytest.mark.parametrize("order", ["abc", "bca", "cba"])
def test_named_parameters_are_matched_by_name(order):
    params = dict(zip("abc", make_params(), strict=True))
    optimizer = named("abc", params)
    train(optimizer, params.values(), 0, 3)
    twins = {name: Parameter(param.detach().clone()) for name, param in params.items()}
    other = named(order, twins)
    other.load_state_dict(optimizer.state_dict())
    assert all(bits(other.state[twins[name]]) == bits(optimizer.state[params[name]]) for name in "abc")
    assert other.param_groups[0]["param_names"] == list(order)
    third = named("abc", twins)  # there and back
    third.load_state_dict(other.state_dict())
    assert bits(third.state_dict()) == bits(optimizer.state_dict())


def test_names_are_matched_across_groups():
    one, two = make_params(), make_params()
    optimizer = optim.AdamW([{"params": [("a", one[0]), ("b", one[1])]}, {"params": [("c", one[2])]}])
    train(optimizer, one, 0, 3)
    other = optim.AdamW([{"params": [("c", two[2]), ("b", two[1])]}, {"params": [("a", two[0])]}])
    other.load_state_dict(optimizer.state_dict())
    assert [bits(other.state[p]) for p in two] == [bits(optimizer.state[p]) for p in one]
    assert [group["param_names"] for group in other.param_groups] == [["c", "b"], ["a"]]


def test_other_names_are_matched_by_position_with_a_warning():
    params = dict(zip("abc", make_params(), strict=True))
    optimizer = named("abc", params)
    train(optimizer, params.values(), 0, 3)
    twins = dict(zip("xyz", make_params(), strict=True))
    other = named("xyz", twins)
    with pytest.warns(UserWarning, match="by position") as caught:
        other.load_state_dict(optimizer.state_dict())
    assert caught[0].filename == __file__
    assert bits(list(other.state.values())) == bits(list(optimizer.state.values()))


@pytest.mark.parametrize("named_side", ["saved", "own"])
def test_where_only_one_side_has_names_position_decides(named_side):
    params, twins = make_params(), make_params()
    pairs = list(zip("abc", params, strict=True))
    twin_pairs = list(zip("cba", twins, strict=True))
    optimizer = optim.AdamW(pairs if named_side == "saved" else params)
    train(optimizer, params, 0, 3)
    other = optim.AdamW(twins if named_side == "saved" else twin_pairs)
    other.load_state_dict(optimizer.state_dict())
    assert bits(list(other.state.values())) == bits(list(optimizer.state.values()))


# What does not fit


def at(*path, to):
    """A change of a saved state dict: what is at `path` becomes `to`, or what `to` makes of it."""

    def change(saved):
        *way, last = path
        for key in way:
            saved = saved[key]
        saved[last] = to(saved[last]) if callable(to) else to

    return change


def without(*path):
    def change(saved):
        *way, last = path
        for key in way:
            saved = saved[key]
        del saved[last]

    return change


GROUP = ("param_groups", 1)
ENTRY = ("state", 2)  # of shape (), like its step count; 0 is of shape (3, 5)
NAN, INF = float("nan"), float("inf")

WRONG = {
    "no state": without("state"),
    "no groups": without("param_groups"),
    "state a list": at("state", to=[1]),
    "groups a dict": at("param_groups", to=dict(a=1)),  # noqa: C408
    "group a list": at(*GROUP, to=[1]),
    "group without params": without(*GROUP, "params"),
    "group's params a number": at(*GROUP, "params", to=3),
    "a group missing": without(*GROUP),
    "a group more": at("param_groups", to=lambda groups: [*groups, dict(groups[0], params=[])]),
    "a parameter missing": at("param_groups", 0, "params", to=[0]),
    "a parameter more": at("param_groups", 0, "params", to=[0, 1, 3]),
    "a parameter twice": at("param_groups", 0, "params", to=[0, 0]),
    "a parameter in two groups": at(*GROUP, "params", to=[1]),
    "a parameter's number a list": at("param_groups", 0, "params", to=[[0], 1]),
    "names a number": at(*GROUP, "param_names", to=3),
    "entry a list": at("state", 0, to=[1]),
    "entry None": at("state", 0, to=None),
    "entry a tensor": at("state", 0, to=torch.ones(3, 5)),
}
WRONG |= {
    f"{key} {what}": at("state", 0, key, to=value)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    for what, value in {
        "None": None,
        "a string": "0.1",
        "a number": 0.1,
        "a list": [0.1] * 15,
        "transposed": torch.zeros(5, 3),
        "flat": torch.zeros(15),
        "0-dim": torch.zeros(()),
        "broadcastable": torch.zeros(1, 5),
        "int": torch.zeros(3, 5, dtype=torch.int32),
        "bool": torch.zeros(3, 5, dtype=torch.bool),
        "complex": torch.zeros(3, 5, dtype=torch.complex64),
        "sparse": torch.zeros(3, 5).to_sparse(),
    }.items()
}
WRONG["exp_avg on meta"] = at("state", 0, "exp_avg", to=torch.zeros(3, 5, device="meta"))
WRONG |= {f"{key} missing": without("state", 0, key) for key in ("exp_avg", "exp_avg_sq", "step")}
WRONG |= {
    f"step {value!r:.30}": at(*ENTRY, "step", to=value)
    for value in (None, "3", [3], 1j, NAN, INF, -1, 2.5, 2**24, 10**400)
}
WRONG |= {
    f"step tensor {value!r:.30}": at(*ENTRY, "step", to=torch.tensor(value))
    for value in ([3.0, 3.0], [], 1j, NAN, INF, -1.0, 2.5, 2.0**24)
}
WRONG |= {
    f"{key} {value!r:.30}": at(*GROUP, key, to=value)
    for key in ("lr", "eps", "weight_decay")
    for value in (NAN, INF, -1.0, "0.1", None, True, [0.1], torch.tensor([0.1, 0.1]))
}
WRONG |= {
    f"betas {value!r:.30}": at(*GROUP, "betas", to=value)
    for value in ((0.9,), (0.9, 1.0), (NAN, 0.9), (0.9, None), (True, 0.9), "ab", None, 0.9)
}
WRONG |= {
    f"{key} {value!r}": at(*GROUP, key, to=value) for key in ("amsgrad", "maximize") for value in (1, None, "yes")
}
WRONG["lr too long for a float"] = at(*GROUP, "lr", to=10**400)
NAMED = "state|param|lr|eps|weight_decay|beta|amsgrad|maximize"


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "trained"])
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_raises_and_changes_nothing(change, fresh):
    def made(steps):
        params = make_params()
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
        return trained(steps, params, lambda _, **options: optim.AdamW(groups, **options))

    saved = copy.deepcopy(made(3)[0].state_dict())
    optimizer, params = made(0 if fresh else 2)
    optimizer.load_state_dict(copy.deepcopy(saved))  # as it is, it fits
    optimizer, params = made(0 if fresh else 2)
    change(saved)
    before = everything(optimizer)
    with pytest.raises((TypeError, ValueError), match=NAMED):
        optimizer.load_state_dict(saved)
    assert everything(optimizer) == before
    twin, twins = made(0 if fresh else 2)
    train(optimizer, params, 2, 4)
    train(twin, twins, 2, 4)
    assert bits(params) == bits(twins)


@pytest.mark.parametrize("wrong", [None, [], "state", 3])
def test_what_is_no_state_dict_is_refused(wrong):
    optimizer, _ = trained()
    before = everything(optimizer)
    with pytest.raises(TypeError, match="state_dict: expected a dict"):
        optimizer.load_state_dict(wrong)
    assert everything(optimizer) == before


def test_messages_name_the_parameter_and_what_is_wrong_with_it():
    optimizer, _ = trained()
    saved = optimizer.state_dict()
    saved["state"][1] = dict(saved["state"][1], exp_avg=torch.zeros(3))
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 1 of group 0.*\(3,\).*\(7,\)"):
        optimizer.load_state_dict(saved)
    saved["state"][1]["step"] = -4
    with pytest.raises(ValueError, match=r"'step' of parameter 1 of group 0.*-4"):
        optimizer.load_state_dict(saved)


def test_parameters_that_cannot_have_state_refuse_it():
    optimizer, _ = trained(params=make_params())
    other = optim.AdamW(make_params(torch.float8_e5m2))
    with pytest.raises(TypeError, match=r"parameter 0 of group 0.*float8"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state
