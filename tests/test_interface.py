"""Guards the face of `AdamW`: arguments, groups, the step, hooks, everything of torch's base.

It is a drop-in, so what a user of ``torch.optim.AdamW`` writes must mean the same here, and what is
no argument must be refused by name before anything is touched. Numbers that a user changes between
steps are checked against the definition, which is given them directly: a step that read an old copy
would differ in bits.
"""

import collections
import copy
import fractions
import inspect
import pickle

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from lucid import engine
from lucid.engine import reference

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "maximize": False}


def make_params(n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(3, 5, generator=generator)) for _ in range(n)]


def set_gradients(params, step=0):
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def bits(value):
    """All that `value` holds, in a form that `==` compares to the bit."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.shape, value.stride(), value.detach().numpy().tobytes())
    if isinstance(value, dict):
        return {id(k) if isinstance(k, torch.Tensor) else k: bits(v) for k, v in value.items()}
    return [bits(item) for item in value] if isinstance(value, list) else value


def everything(optimizer):
    return bits([optimizer.param_groups, dict(optimizer.state), optimizer.defaults])


def defined_step(param, entry, amsgrad=False, **hyper):
    """θ and the moments after one more step, by the definition and the hyperparameters given."""
    h = engine.Scalars.of(**HYPER | hyper, step=float(entry["step"]) + 1 if entry else 1.0)
    zero = torch.zeros_like(param.detach())
    m, v, w = (entry.get(k, zero) for k in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
    new = reference.adamw(h, param.detach().clone(), param.grad, m, v, w if amsgrad else None)
    return [x for x in new if x is not None]


def as_it_is(optimizer, param):
    entry = optimizer.state[param]
    return [param.detach()] + [entry[key] for key in entry if key != "step"]


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


# The constructor


def test_signature():
    given = list(inspect.signature(optim.AdamW).parameters.values())
    assert [(p.name, p.default) for p in given[1:6]] == [
        ("lr", 1e-3),
        ("betas", (0.9, 0.999)),
        ("eps", 1e-8),
        ("weight_decay", 0.01),
        ("amsgrad", False),
    ]
    assert (given[0].name, given[0].default) == ("params", inspect.Parameter.empty)
    assert {p.kind for p in given[:6]} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert {p.kind for p in given[6:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert {p.name: p.default for p in given[6:]}["maximize"] is False
    theirs = list(inspect.signature(torch.optim.AdamW).parameters.values())
    assert [(p.name, p.default) for p in given[:6]] == [(p.name, p.default) for p in theirs[:6]]


def test_it_is_an_optimizer_of_torchs():
    optimizer = optim.AdamW(make_params())
    assert isinstance(optimizer, optim.Optimizer)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optim.AdamW.__name__ == "AdamW"
    assert "beta1: 0.9" in repr(optimizer)


def test_groups_and_defaults_have_the_documented_keys():
    names = {"lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize"}
    names |= {"state_format", "master_weights", "seed"}
    names |= {"weight_decay_schedule", "reference_lr", "cautious_decay", "ema_decay"}
    params = make_params()
    optimizer = optim.AdamW(
        params, 0.1, (0.2, 0.3), 0.4, 0.5, True, maximize=True, state_format="8bit", master_weights=False, seed=6
    )
    (group,) = optimizer.param_groups
    assert group["params"] == params
    wanted = {"lr": 0.1, "beta1": 0.2, "beta2": 0.3, "eps": 0.4, "weight_decay": 0.5}
    wanted |= {"amsgrad": True, "maximize": True, "state_format": "8bit", "master_weights": False, "seed": 6}
    wanted |= {"weight_decay_schedule": "lr", "reference_lr": None, "cautious_decay": False, "ema_decay": None}
    assert {key: group[key] for key in names} == wanted
    assert dict(optimizer.defaults) == wanted
    assert set(group) == {"params"} | names
    assert group["betas"] == optimizer.defaults["betas"] == (0.2, 0.3)


@pytest.mark.parametrize("lr", [1, np.float32(0.5), np.float64(0.5), fractions.Fraction(1, 2), 0])
def test_every_real_number_is_a_number(lr):
    (param,) = make_params(1)
    set_gradients([param])
    wanted = defined_step(param, {}, lr=float(lr))
    optimizer = optim.AdamW([param], lr=lr)
    optimizer.init_state()
    optimizer.step()
    assert torch.equal(param, wanted[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda params: params,
        tuple,
        iter,
        lambda params: [{"params": params}],
        lambda params: [{"params": iter(params)}],
        lambda params: [{"params": param} for param in params],
        lambda params: zip("ab", params, strict=True),
        lambda params: [{"params": zip("ab", params, strict=True)}],
    ],
)
def test_every_form_of_params(make):
    params = make_params()
    set_gradients(params)
    wanted = [defined_step(param, {})[0] for param in params]
    optim.AdamW(make(params)).step()
    assert same(params, wanted)


@pytest.mark.parametrize("grouped", [False, True])
def test_names_are_kept_and_used(grouped):
    params = make_params()
    pairs = list(zip(["one", "two"], params, strict=True))
    optimizer = optim.AdamW([{"params": pairs}] if grouped else pairs)
    assert optimizer.param_groups[0]["param_names"] == ["one", "two"]
    assert optimizer.param_groups[0]["params"] == params
    set_gradients(params)
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(TypeError, match="'two'"):
        optimizer.step()


# Arguments that are none

NUMBERS = ["lr", "eps", "weight_decay", "beta1", "beta2"]
OUTSIDE = [float("nan"), float("inf"), -float("inf"), -1, -1e-30]
NO_NUMBER = [True, "0.1", None, 1j, [0.1], torch.tensor([0.1, 0.2]), torch.tensor([])]
BAD = [(name, value, ValueError) for name in NUMBERS for value in OUTSIDE]
BAD += [(name, value, ValueError) for name in ("beta1", "beta2") for value in (1, 1.0, 1.5)]
BAD += [(name, value, TypeError) for name in NUMBERS for value in NO_NUMBER]
BAD += [("lr", torch.tensor(x), ValueError) for x in (float("nan"), float("inf"), -1.0)]
BAD += [("lr", 10**400, ValueError), ("beta2", 10**400, ValueError)]
BAD += [("lr", torch.tensor(True), TypeError), ("lr", torch.tensor(1j), TypeError)]
BAD += [(name, x, TypeError) for name in ("amsgrad", "maximize") for x in (1, 0, None, "yes")]
BAD += [("betas", x, TypeError) for x in (0.9, (0.9,), (0.9, 0.99, 0.999), "ab", None, {0.1, 0.2})]
BAD = [pytest.param(*bad, id=f"{bad[0]}={bad[1]}"[:24]) for bad in BAD]


def given_to_the_constructor(optimizer, params, name, value):
    if name in ("beta1", "beta2"):
        name, value = "betas", (value, 0.99) if name == "beta1" else (0.9, value)
    optim.AdamW(params, **{name: value})


def given_to_the_constructors_group(optimizer, params, name, value):
    optim.AdamW([{"params": params[:1]}, {"params": params[1:], name: value}])


def given_to_add_param_group(optimizer, params, name, value):
    optimizer.add_param_group({"params": params, name: value})


WAYS = [given_to_the_constructor, given_to_the_constructors_group, given_to_add_param_group]


def check_refusal(raised, name, value, error):
    shown = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    assert str(raised.value).startswith(f"{name}: expected ")
    assert repr(shown) in str(raised.value)
    if error is ValueError:
        assert ("[0, 1)" if name.startswith("beta") else "[0, inf)") in str(raised.value)


@pytest.mark.parametrize("give", WAYS)
@pytest.mark.parametrize(("name", "value", "error"), BAD)
def test_bad_hyperparameters_are_named_and_change_nothing(give, name, value, error):
    params = make_params(2)
    optimizer = optim.AdamW(params)
    set_gradients(params)
    optimizer.step()
    before = everything(optimizer)
    with pytest.raises(error) as raised:
        give(optimizer, make_params(2), name, value)
    check_refusal(raised, name, value, error)
    assert everything(optimizer) == before


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("name", "value", "error"), [b for b in BAD if b.values[0] != "betas"])
def test_a_step_refuses_what_a_group_was_set_to(name, value, error, steps):
    params = make_params()
    optimizer = optim.AdamW([{"params": [param]} for param in params])
    set_gradients(params)
    for _ in range(steps):
        optimizer.step()
    optimizer.param_groups[1][name] = value
    before = everything(optimizer)
    with pytest.raises(error) as raised:
        optimizer.step()
    check_refusal(raised, name, value, error)
    assert everything(optimizer) == before


NO_PARAMS = {
    "None": lambda p, q: None,
    "a number": lambda p, q: 5,
    "an empty list": lambda p, q: [],
    "an empty iterator": lambda p, q: iter(()),
    "a bare Tensor": lambda p, q: p,
    "a set": lambda p, q: {p, q},
    "a bare dict": lambda p, q: {"params": [p]},
    "a list of numbers": lambda p, q: [1.0],
    "a string among them": lambda p, q: [p, "q"],
    "None among them": lambda p, q: [p, None],
    "one twice": lambda p, q: [p, q, p],
    "one under two names": lambda p, q: [("p", p), ("q", p)],
    "one nameless": lambda p, q: [("p", p), q],
    "a pair the wrong way round": lambda p, q: [(p, "p")],
    "a name missing": lambda p, q: [(p,)],
    "not a leaf": lambda p, q: [p * 2],
    "a group of a set": lambda p, q: [{"params": {p}}],
    "a group of None": lambda p, q: [{"params": None}],
    "a group without": lambda p, q: [{"params": [p]}, {"lr": 1.0}],
    "one in two groups": lambda p, q: [{"params": [p]}, {"params": [q, p]}],
    "a group nameless": lambda p, q: [{"params": [p]}, {"params": [("q", q)]}],
    "no group": lambda p, q: [{"params": [p]}, q],
}


@pytest.mark.parametrize("make", NO_PARAMS.values(), ids=NO_PARAMS.keys())
def test_what_is_no_params_is_named(make):
    with pytest.raises((TypeError, ValueError), match="param"):
        optim.AdamW(make(*make_params()))


NO_GROUP = {
    "a number": lambda old, new: 5,
    "a list": lambda old, new: [new],
    "without params": lambda old, new: {},
    "None": lambda old, new: {"params": None},
    "a set": lambda old, new: {"params": {new}},
    "one twice": lambda old, new: {"params": [new, new]},
    "one of another group": lambda old, new: {"params": [new, old]},
    "the first with a name": lambda old, new: {"params": [("new", new)]},
    "not a leaf": lambda old, new: {"params": [new * 2]},
    "a number among them": lambda old, new: {"params": [new, 1.0]},
}


@pytest.mark.parametrize("make", NO_GROUP.values(), ids=NO_GROUP.keys())
def test_what_is_no_group_is_not_added(make):
    *old, new = make_params(3)
    optimizer = optim.AdamW(old)
    set_gradients(old)
    optimizer.step()
    before = everything(optimizer)
    with pytest.raises((TypeError, ValueError), match="param"):
        optimizer.add_param_group(make(old[0], new))
    assert everything(optimizer) == before


# The step


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.5},
        {"lr": torch.tensor(0.25)},
        {"betas": (0.5, 0.25)},
        {"beta1": 0.0},
        {"beta2": 0.0},
        {"eps": 0.125},
        {"weight_decay": 0.75},
        {"maximize": True},
        {"amsgrad": True},
    ],
    ids=str,
)
def test_a_change_takes_effect_at_the_next_step(change, steps):
    runs = []
    for only_reference in (False, True):
        params = make_params()
        optimizer = optim.AdamW([{"params": [param]} for param in params])
        for step in range(steps):
            set_gradients(params, step)
            optimizer.step()
        set_gradients(params, steps)
        optimizer.param_groups[0].update(change)
        hyper = {k: float(v) if k == "lr" else v for k, v in change.items() if k != "betas"}
        if "betas" in change:
            hyper["beta1"], hyper["beta2"] = change["betas"]
        wanted = defined_step(params[0], optimizer.state[params[0]], **hyper)
        other = defined_step(params[1], optimizer.state[params[1]])
        if only_reference:
            with engine.only("reference"):
                optimizer.step()
        else:
            optimizer.step()
        assert same(as_it_is(optimizer, params[0]), wanted)
        assert same(as_it_is(optimizer, params[1]), other)
        runs.append([as_it_is(optimizer, param) for param in params])
    assert all(map(same, *runs))


def test_amsgrad_switched_on_later_keeps_the_maximum_from_then_on():
    (param,) = make_params(1)
    optimizer = optim.AdamW([param], betas=(0.9, 0.5))
    w = torch.zeros_like(param)
    for step in range(6):
        set_gradients([param], step)
        param.grad *= 10.0 if step in (0, 3) else 0.1  # v falls after step 3, its maximum does not
        amsgrad = optimizer.param_groups[0]["amsgrad"] = step >= 2
        wanted = defined_step(param, optimizer.state[param], amsgrad, beta2=0.5)
        optimizer.step()
        assert same(as_it_is(optimizer, param), wanted)
        if amsgrad:
            w = torch.maximum(w, optimizer.state[param]["exp_avg_sq"])
            assert torch.equal(optimizer.state[param]["max_exp_avg_sq"], w)
    assert (w > optimizer.state[param]["exp_avg_sq"]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_lr_is_read_at_every_step(dtype):
    lr = torch.tensor(1e-3, dtype=dtype)
    params = make_params()
    optimizer = optim.AdamW([{"params": [param]} for param in params], lr=lr)
    for step in range(4):
        set_gradients(params, step)
        lr.fill_(0.1 / (step + 1))
        wanted = [defined_step(param, optimizer.state[param], lr=lr.item()) for param in params]
        optimizer.step()
        assert all(same(as_it_is(optimizer, p), w) for p, w in zip(params, wanted, strict=True))
    assert all(group["lr"] is lr for group in optimizer.param_groups)


def test_late_gradients_have_their_own_bias_correction():
    params = make_params(3)
    optimizer = optim.AdamW(params)
    for step in range(5):
        set_gradients(params, step)
        params[2].grad = None
        if step < 3:
            params[1].grad = None
        wanted = [defined_step(p, optimizer.state.get(p, {})) for p in params if p.grad is not None]
        untouched, version = params[2].detach().clone(), params[2]._version
        optimizer.step()
        done = [as_it_is(optimizer, param) for param in params if param.grad is not None]
        assert all(map(same, done, wanted))
        assert torch.equal(params[2], untouched)
        assert params[2]._version == version
    assert [int(optimizer.state[param]["step"]) for param in params[:2]] == [5, 2]
    assert params[2] not in optimizer.state


def test_a_parameter_whose_gradient_is_gone_keeps_its_state():
    params = make_params()
    optimizer = optim.AdamW(params)
    set_gradients(params)
    optimizer.step()
    before = bits([params[0].detach(), optimizer.state[params[0]]])
    params[0].grad = None
    optimizer.step()
    assert bits([params[0].detach(), optimizer.state[params[0]]]) == before
    assert int(optimizer.state[params[1]]["step"]) == 2


def test_closure_runs_first_with_gradients_and_its_value_is_returned():
    (param,) = make_params(1)
    optimizer = optim.AdamW([param])
    start = param.detach().clone()
    seen = []

    def closure():
        assert torch.is_grad_enabled()
        assert torch.equal(param, start)
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        seen.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is seen[0]
        assert not torch.is_grad_enabled()
    assert len(seen) == 1
    assert int(optimizer.state[param]["step"]) == 1
    start = param.detach().clone()
    assert optimizer.step(closure=closure) is seen[1]
    assert not torch.equal(param, start)
    assert optimizer.step() is None


def test_a_closure_that_raises_leaves_everything():
    params = make_params()
    optimizer = optim.AdamW(params)
    set_gradients(params)
    optimizer.step()
    before = everything(optimizer)

    def closure():
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.step(closure)
    assert everything(optimizer) == before
    optimizer.step()
    assert int(optimizer.state[params[0]]["step"]) == 2


@pytest.mark.parametrize("form", [lambda p: p, lambda p: [p], lambda p: iter([p])])
def test_a_group_added_in_the_middle(form):
    old, new = make_params()
    optimizer = optim.AdamW([old], lr=0.1, betas=(0.5, 0.75))
    for step in range(2):
        set_gradients([old], step)
        optimizer.step()
    optimizer.add_param_group({"params": form(new), "lr": 0.2, "beta2": 0.25})
    for step in range(2, 5):
        set_gradients([old, new], step)
        wanted = [
            defined_step(old, optimizer.state[old], lr=0.1, beta1=0.5, beta2=0.75),
            defined_step(new, optimizer.state[new], lr=0.2, beta1=0.5, beta2=0.25),
        ]
        optimizer.step()
        assert all(map(same, [as_it_is(optimizer, p) for p in (old, new)], wanted))
    assert [int(optimizer.state[p]["step"]) for p in (old, new)] == [5, 3]


# State: what users do to it, state made ahead, defaults


@pytest.mark.parametrize("hold", ["nothing", "the state", "an entry", "a tensor"])
@pytest.mark.parametrize("what", ["a number inside", "a tensor", "an entry", "the state"])
def test_a_change_of_state_takes_effect_at_the_next_step(hold, what):
    (param,) = make_params(1)
    set_gradients([param])
    optimizer = optim.AdamW([param])
    optimizer.step()
    held = {"the state": optimizer.state, "an entry": optimizer.state[param]}
    held = held.get(hold, optimizer.state[param]["exp_avg"] if hold == "a tensor" else None)
    for _ in range(15):  # by then the plan reads the state only where someone could have changed it
        optimizer.step()
    state = held if hold == "the state" else optimizer.state
    entry = held if hold == "an entry" else state[param]
    tensor = held if hold == "a tensor" else entry["exp_avg"]
    if what == "a number inside":
        tensor[0, 0] = 0.5
    elif what == "a tensor":
        entry["exp_avg"] = torch.full_like(param, 0.5, requires_grad=False)
    elif what == "an entry":
        state[param] = {**entry, "exp_avg": torch.full_like(param, 0.5, requires_grad=False)}
    else:
        new = {**entry, "exp_avg": torch.full_like(param, 0.5, requires_grad=False)}
        optimizer.state = collections.defaultdict(dict, {param: new})
    assert optimizer.state[param]["exp_avg"][0, 0] == 0.5
    wanted = defined_step(param, copy.deepcopy(optimizer.state[param]))
    optimizer.step()
    assert same(as_it_is(optimizer, param), wanted)
    assert int(optimizer.state[param]["step"]) == 17


@pytest.mark.parametrize("amsgrad", [False, True])
def test_init_state_makes_what_the_first_step_would(amsgrad):
    lazy, eager = make_params(3), make_params(3)
    for params in (lazy, eager):
        params[1].data = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(7)).to(
            memory_format=torch.channels_last
        )
        params[2].requires_grad_(False)
    one, two = (optim.AdamW(params, amsgrad=amsgrad) for params in (lazy, eager))
    two.init_state()
    keys = ["step", "exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
    assert [list(two.state[param]) for param in eager[:2]] == [keys, keys]
    assert all(not x.any() for entry in two.state.values() for x in entry.values())
    assert two.state[eager[1]]["exp_avg"].stride() == eager[1].stride()
    assert eager[2] not in two.state
    for step in range(3):
        for optimizer, params in ((one, lazy), (two, eager)):
            set_gradients(params[:2], step)
            optimizer.step()
        assert bits([p.detach() for p in lazy]) == bits([p.detach() for p in eager])
        assert bits(one.state_dict()) == bits(two.state_dict())
    before = everything(two)
    two.init_state()
    assert everything(two) == before


def test_init_state_makes_all_or_none():
    params = [*make_params(), Parameter(torch.zeros(3, dtype=torch.float8_e5m2))]
    optimizer = optim.AdamW(params)
    with pytest.raises(TypeError, match=r"parameter 2 of group 0.*float8"):
        optimizer.init_state()
    assert not any(optimizer.state.values())


@pytest.mark.filterwarnings("ignore:param_groups")
def test_defaults_never_gain_keys():
    params = make_params()
    optimizer = optim.AdamW(params[:1], betas=(0.5, 0.75))
    wanted = dict(optimizer.defaults)
    set_gradients(params)
    optimizer.step()
    optimizer.init_state()
    optimizer.add_param_group({"params": params[1:], "betas": (0.1, 0.2), "mine": 3})
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    torch.optim.Optimizer.load_state_dict(optimizer, saved)
    for twin in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert dict(twin.defaults) == wanted
        assert twin.defaults["betas"] == (0.5, 0.75)


def test_defaults_are_those_of_groups_added_later():
    params = make_params()
    optimizer = optim.AdamW(params[:1])
    optimizer.defaults["betas"] = (0.5, 0.75)
    optimizer.add_param_group({"params": params[1:]})
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999), (0.5, 0.75)]


class Counting(optim.AdamW):
    """Has a number of its own, and saves it."""

    count = 0

    def __getstate__(self):
        return super().__getstate__() | {"count": self.count}


def test_copies_keep_what_a_subclass_saves():
    optimizer = Counting([Parameter(torch.ones(2))])
    optimizer.count = 7
    for twin in (copy.copy(optimizer), copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.count == 7
        assert not {"_skipped_steps", "_max_grad_norm", "state"} & vars(twin).keys()
