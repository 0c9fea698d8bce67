"""Guards `ParamGroup`, and what becomes of groups in the hands of others.

A group stores ``beta1`` and ``beta2`` and answers to ``betas`` too. torch's schedulers write
``betas``, its loaders and Accelerate put plain dicts and other lists of parameters in a group's
place: were one of these ways of writing forgotten, training would go on with the old numbers and
nobody would see it.
"""

import copy
import pickle

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch.nn import Parameter

import lucid.optim as optim
from lucid import engine
from lucid.engine import reference
from lucid.optim.groups import ParamGroup
from quick import examples


def group_of(**more):
    return ParamGroup({"lr": 0.1, "beta1": 0.9, "beta2": 0.99, **more})


def with_gradients(n=2):
    params = [Parameter(torch.linspace(-1.0, 1.0, 5) * (i + 1)) for i in range(n)]
    for i, param in enumerate(params):
        param.grad = torch.linspace(0.3, -0.2, 5) + i
    return params


def after_one_step(param, *, lr=1e-3, beta1=0.9, beta2=0.999):
    """The first step of `param`, made by the definition itself from the numbers given here."""
    h = engine.Scalars.of(lr=lr, beta1=beta1, beta2=beta2, eps=1e-8, weight_decay=0.01, maximize=False, step=1)
    zero = torch.zeros_like(param.grad)
    return reference.adamw(h, param.detach().clone(), param.grad, zero, zero, None)[0]


# The dict itself


def test_betas_is_read_from_the_stored_two():
    group = group_of()
    assert group["betas"] == (0.9, 0.99)
    assert group.get("betas") == (0.9, 0.99)
    assert "betas" in group
    group["beta1"] = 0.5
    assert group["betas"] == (0.5, 0.99)
    assert list(group) == ["lr", "beta1", "beta2"]
    assert "betas" not in list(group.keys())
    assert dict(group) == {"lr": 0.1, "beta1": 0.5, "beta2": 0.99}


WRITES = {
    "assignment": lambda group, betas: group.__setitem__("betas", betas),
    "update, mapping": lambda group, betas: group.update({"betas": betas}),
    "update, pairs": lambda group, betas: group.update([("betas", betas)]),
    "update, keyword": lambda group, betas: group.update(betas=betas),
    "update, another group": lambda group, betas: group.update(ParamGroup({"betas": betas})),
    "|=": lambda group, betas: group.__ior__({"betas": betas}),
    "pop, setdefault": lambda group, betas: (group.pop("betas"), group.setdefault("betas", betas)),
    "del, assignment": lambda group, betas: (group.__delitem__("betas"), group.__setitem__("betas", betas)),
}


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_every_way_of_writing_betas_writes_the_stored_two(write, kind):
    group = group_of()
    write(group, kind((0.5, 0.75)))
    assert dict(group) == {"lr": 0.1, "beta1": 0.5, "beta2": 0.75}
    assert group["betas"] == (0.5, 0.75)


@pytest.mark.parametrize("write", [v for k, v in WRITES.items() if "pop" not in k and "del" not in k])
@pytest.mark.parametrize("wrong", [0.9, (0.9,), (0.9, 0.99, 0.999), "ab", None, {0.9, 0.99}])
def test_betas_that_are_no_pair_are_refused_and_leave_the_two(write, wrong):
    group = group_of()
    with pytest.raises(TypeError, match="betas: expected a pair") as raised:
        write(group, wrong)
    assert repr(wrong) in str(raised.value)
    assert dict(group) == dict(group_of())


@pytest.mark.parametrize("order", [("betas", "beta1", "beta2"), ("beta1", "beta2", "betas")])
def test_betas_wins_over_the_stored_two_given_with_it(order):
    given = {"betas": [0.1, 0.2], "beta1": 0.3, "beta2": 0.4}
    group = ParamGroup({key: given[key] for key in order})
    assert dict(group) == {"beta1": 0.1, "beta2": 0.2}
    group = group_of()
    group.update([(key, given[key]) for key in order])
    assert group["betas"] == (0.1, 0.2)


def test_without_both_betas_there_is_no_pair():
    group = ParamGroup({"beta1": 0.9})
    assert "betas" not in group
    assert group.get("betas") is None
    assert group.get("betas", 7) == 7
    assert group.pop("betas", 7) == 7
    for read in (lambda: group["betas"], lambda: group.pop("betas")):
        with pytest.raises(KeyError, match="betas"):
            read()
    with pytest.raises(KeyError, match="betas"):
        del group["betas"]
    assert dict(group) == {"beta1": 0.9}


COPIES = {
    "copy": lambda group: group.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "group | {}": lambda group: group | {},
    "{} | group": lambda group: {} | group,
    "ParamGroup()": ParamGroup,
} | {
    f"pickle protocol {protocol}": lambda group, protocol=protocol: pickle.loads(pickle.dumps(group, protocol))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_copies_keep_type_and_content_and_are_apart(copied):
    group = group_of(initial_lr=0.2)
    twin = copied(group)
    assert type(twin) is ParamGroup
    assert dict(twin) == dict(group)
    twin["betas"] = (0.0, 0.0)
    assert group["betas"] == (0.9, 0.99)
    assert twin["beta2"] == 0.0


def test_or_takes_the_right_sides_values():
    assert dict(group_of() | {"betas": (0.1, 0.2), "lr": 3}) == {"lr": 3, "beta1": 0.1, "beta2": 0.2}
    merged = {"betas": (0.1, 0.2), "eps": 1.0} | group_of()
    assert dict(merged) == {"eps": 1.0, **group_of()}
    with pytest.raises(TypeError, match=r"unsupported operand"):
        group_of() | 3


# The same against a model that is a plain dict with the rule written out


def stored(items):
    """What of `items` a group is to store."""
    flat = dict(items)
    if "betas" in flat:
        flat["beta1"], flat["beta2"] = flat.pop("betas")
    return flat


NAMES = st.sampled_from(["lr", "beta1", "beta2", "initial_lr"])
NUMBERS = st.floats(0, 1)
PAIRS = st.tuples(NUMBERS, NUMBERS)
ITEMS = st.one_of(st.tuples(NAMES, NUMBERS), st.tuples(st.just("betas"), PAIRS))
MAPPINGS = st.lists(ITEMS, max_size=5).map(dict)
KEYS = st.one_of(NAMES, st.just("betas"))


class GroupAgainstDict(RuleBasedStateMachine):
    """Every operation on a group, and what it should have made of a plain dict."""

    def __init__(self):
        super().__init__()
        self.group, self.model = ParamGroup(), {}

    def seen(self, key):
        """What reading `key` is to give; KeyError where there is nothing."""
        return (self.model["beta1"], self.model["beta2"]) if key == "betas" else self.model[key]

    def has(self, key):
        return {"beta1", "beta2"} <= self.model.keys() if key == "betas" else key in self.model

    def forget(self, key):
        for name in ("beta1", "beta2") if key == "betas" else (key,):
            del self.model[name]

    @rule(item=ITEMS)
    def assign(self, item):
        self.group[item[0]] = item[1]
        self.model.update(stored([item]))

    @rule(item=ITEMS)
    def setdefault(self, item):
        if not self.has(item[0]):
            self.model.update(stored([item]))
        assert self.group.setdefault(*item) == self.seen(item[0])

    @rule(key=KEYS)
    def delete(self, key):
        if self.has(key):
            del self.group[key]
            self.forget(key)
        else:
            with pytest.raises(KeyError):
                del self.group[key]

    @rule(key=KEYS)
    def pop(self, key):
        wanted = self.seen(key) if self.has(key) else "nothing"
        assert self.group.pop(key, "nothing") == wanted
        if self.has(key):
            self.forget(key)

    @rule(items=MAPPINGS, way=st.sampled_from(["mapping", "pairs", "keywords", "|=", "|", "group"]))
    def take(self, items, way):
        if way == "mapping":
            self.group.update(items)
        elif way == "pairs":
            self.group.update(list(items.items()))
        elif way == "keywords":
            self.group.update(**items)
        elif way == "group":
            self.group.update(ParamGroup(items))
        elif way == "|=":
            before = self.group
            self.group |= items
            assert self.group is before
        else:
            self.group = self.group | items
        self.model.update(stored(items))

    @rule(items=MAPPINGS)
    def under(self, items):
        self.group = items | self.group
        self.model = stored(items) | self.model

    @rule(copied=st.sampled_from(list(COPIES.values())))
    def replace_by_copy(self, copied):
        self.group = copied(self.group)

    @invariant()
    def agree(self):
        assert type(self.group) is ParamGroup
        assert dict(self.group) == self.model
        assert len(self.group) == len(self.model)
        for key in ("lr", "beta1", "beta2", "initial_lr", "betas"):
            assert (key in self.group) == self.has(key)
            assert self.group.get(key, "none") == (self.seen(key) if self.has(key) else "none")


TestGroupAgainstDict = GroupAgainstDict.TestCase
TestGroupAgainstDict.settings = settings(max_examples=examples(100), stateful_step_count=20, deadline=None)


# Groups in an optimizer


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.8, 0.95)),
        ({"betas": (0.1, 0.2)}, (0.1, 0.2)),
        ({"betas": [0.1, 0.2]}, (0.1, 0.2)),
        ({"beta1": 0.1}, (0.1, 0.95)),
        ({"beta2": 0.2}, (0.8, 0.2)),
        ({"beta1": 0.1, "beta2": 0.2}, (0.1, 0.2)),
    ],
)
def test_a_group_may_give_its_betas_in_either_form(given, expected):
    params = with_gradients()
    wanted = [after_one_step(params[0], beta1=expected[0], beta2=expected[1])]
    wanted += [after_one_step(params[1], beta1=0.8, beta2=0.95)]
    asked = {"params": params[:1], **given}
    before = dict(asked)
    optimizer = optim.AdamW([asked, {"params": params[1:]}], betas=(0.8, 0.95))
    assert optimizer.param_groups[0]["betas"] == expected
    assert optimizer.param_groups[1]["betas"] == (0.8, 0.95)
    assert asked == before  # the caller's dict is the caller's
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, wanted, strict=True))


def replaced_by_plain_dicts(optimizer):
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]


def replaced_in_place(optimizer):
    optimizer.param_groups[:] = [dict(group) for group in optimizer.param_groups]


def loaded_by_torchs_base(optimizer):
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["beta1"], group["beta2"]
    torch.optim.Optimizer.load_state_dict(optimizer, saved)


def loaded_by_torchs_base_from_torch(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    theirs = torch.optim.AdamW(params)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    saved = theirs.state_dict()
    for group in saved["param_groups"]:
        del group["beta1"], group["beta2"]
    torch.optim.Optimizer.load_state_dict(optimizer, saved)


OTHERS = [replaced_by_plain_dicts, replaced_in_place, loaded_by_torchs_base, loaded_by_torchs_base_from_torch]


@pytest.mark.parametrize("first_step", [False, True], ids=["before a step", "after a step"])
@pytest.mark.parametrize("replace", OTHERS)
def test_groups_that_others_replaced_are_wrapped_again(replace, first_step):
    params = with_gradients()
    optimizer = optim.AdamW(params, betas=(0.8, 0.95))
    twins = with_gradients()
    twin = optim.AdamW(twins, betas=(0.8, 0.95))
    if first_step:
        optimizer.step()
        twin.step()
    replace(optimizer)
    for group in optimizer.param_groups:  # as a scheduler that cycles momentum does
        group["betas"] = (0.5, 0.75)
        group["lr"] = 0.25
    for group in twin.param_groups:
        group.update(beta1=0.5, beta2=0.75, lr=0.25)
    optimizer.step()
    twin.step()
    assert [type(group) for group in optimizer.param_groups] == [ParamGroup]
    assert optimizer.param_groups[0]["beta1"] == 0.5
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_state_dict_and_step_see_the_same_betas_of_a_plain_dict():
    optimizer = optim.AdamW(with_gradients())
    replaced_by_plain_dicts(optimizer)
    optimizer.param_groups[0]["betas"] = (0.5, 0.75)
    saved = optimizer.state_dict()["param_groups"][0]
    optimizer.step()
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    assert (saved["betas"], saved["beta1"], saved["beta2"]) == ((0.5, 0.75), 0.5, 0.75)


@pytest.mark.parametrize("kind", [list, tuple, torch.nn.ParameterList])
@pytest.mark.parametrize("n", [1, 2, 3], ids=["fewer", "as many", "more"])
@pytest.mark.parametrize("named", [False, True], ids=["nameless", "named"])
def test_replaced_params_are_what_is_stepped(kind, n, named):
    old = with_gradients()
    optimizer = optim.AdamW(zip("ab", old, strict=True) if named else old)
    optimizer.step()
    kept = [param.detach().clone() for param in old]
    new = with_gradients(n)
    wanted = [after_one_step(param) for param in new]
    optimizer.param_groups[0]["params"] = kind(new)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(new, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(old, kept, strict=True))
    assert [id(param) for param in optimizer.param_groups[0]["params"]] == [id(p) for p in new]


def test_params_replaced_inside_their_list_are_what_is_stepped():
    old, new = with_gradients(), with_gradients(1)
    optimizer = optim.AdamW(old)
    optimizer.step()
    wanted = after_one_step(new[0])
    kept = old[1].detach().clone()
    optimizer.param_groups[0]["params"][1] = new[0]
    optimizer.step()
    assert torch.equal(new[0], wanted)
    assert torch.equal(old[1], kept)
    assert int(optimizer.state[old[0]]["step"]) == 2


@pytest.mark.parametrize("key", ["lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize"])
def test_a_group_that_lost_a_key_is_named_before_anything_is_written(key):
    params = with_gradients()
    before = [param.detach().clone() for param in params]
    optimizer = optim.AdamW(params)
    del optimizer.param_groups[0][key]
    with pytest.raises(ValueError, match=f"'{key}'"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert not any(optimizer.state.values())
