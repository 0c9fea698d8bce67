"""Guards that an optimizer refuses what is wrong, whole and in words, or does it right: ten thousand bad calls.

They are generated: arguments, groups, parameters and gradients here, state, state dicts and checkpoint files in
test_faults_checkpoints.py. How each is judged is in judged.py, what is wrong in bad_values.py. Several calls go to one
optimizer in turn.
"""

import functools

import torch
from hypothesis import strategies as st
from torch.nn import Parameter

import lucid.optim as optim
from bad_values import (
    ARGUMENTS,
    CRASHES,
    KEYS,
    REFUSED,
    SCALES,
    SETTINGS,
    expressions,
    made,
    meant,
    statement,
    tables,
    two_of,
    values,
)
from bits import assert_same, draw, on, results
from judged import CALLS, SHAPES, generated, outcome, refusal, trials, trials_of
from lucid.optim.matching import ADDED


def test_the_calls_are_ten_thousand():
    """That each part makes its share, it sees itself."""
    assert sum(CALLS.values()) >= 10_000


# Arguments


def fresh_params():
    params = [Parameter(draw(index, shape)) for index, shape in enumerate(SHAPES)]
    for index, param in enumerate(params):
        param.grad = draw(100 + index, param.shape)
    return params


def constructed(params, place, changes):
    """An optimizer with `changes` as arguments, or in a group, or in one that is added."""
    if place == "argument":
        return optim.AdamW(params, **changes)
    if place == "group":
        return optim.AdamW([{"params": params[:1]}, {"params": params[1:], **changes}])
    optimizer = optim.AdamW(params[:1])
    failed = refusal(lambda: optimizer.add_param_group({"params": params[1:], **changes}), optimizer, params)
    if failed is not None:
        raise failed
    return optimizer


@functools.cache
def stepped_without(place):
    with on("reference"):
        optimizer = constructed(fresh_params(), place, {})
        optimizer.step()
        return results(optimizer)


def check_made(make, make_plain, must, make_good, good):
    """`make`, `make_plain` and `make_good` make an optimizer of parameters; `good` is what the last one steps to."""
    params, made_one = fresh_params(), []
    refused = refusal(lambda: made_one.append(make(params)), None, params)
    if refused is None and must != "either":
        assert must == "step", "taken, though it is wrong"
    if refused is not None:
        assert must != "step", f"refused, though it is right: {refused}"
    else:
        (optimizer,) = made_one
        refused = refusal(optimizer.step, optimizer, params)
        assert refused is None or must == "either", f"made, and then not stepped: {refused}"
    if refused is None:
        with on("reference"):
            twin = make_plain(fresh_params())
            twin.step()
        assert_same(outcome(optimizer), outcome(twin))
    else:
        optimizer = make_good(params)
        optimizer.step()
        assert_same(results(optimizer), good)


@generated(
    "arguments",
    st.sampled_from([lambda: "argument", lambda: "group", lambda: "later"]),
    st.dictionaries(st.sampled_from([*KEYS, *SETTINGS, "foreach"]), values, min_size=1, max_size=2),
)
def test_bad_arguments(place, changes):
    """Of the constructor, of a group, of a group that is added."""
    if place != "argument" and "betas" in changes:
        changes = {key: value for key, value in changes.items() if key not in ("beta1", "beta2")}  # betas wins
    meanings = {key: meant(key, made(value)) for key, value in changes.items()}
    if place == "argument":
        meanings |= {key: REFUSED for key in changes if key not in ARGUMENTS}
    else:
        meanings = {key: meaning for key, meaning in meanings.items() if key in KEYS}
    must = "refuse" if REFUSED in meanings.values() else "either" if None in meanings.values() else "step"

    def plainly(params):
        plain = {key: meaning[0] if meaning else made(changes[key]) for key, meaning in meanings.items()}
        return constructed(params, place, plain)

    check_made(
        lambda params: constructed(params, place, {key: made(value) for key, value in changes.items()}),
        plainly,
        must,
        lambda params: constructed(params, place, {}),
        stepped_without(place),
    )


PARAMS = {
    "refuse": expressions("""
        None; 3; 0.5; "abc"; b"x"; object(); p[0]; set(p); frozenset(p); []; (); {}; iter([]); [None]; [*p, None];
        [*p, "x"]; [*p, 3.0]; [p]; [p[0], [p[1]]]; [p[0], p[0]]; [*p, p[1]]; [("a", p[0]), p[1]];
        [p[0], ("b", p[1])]; [("a", None)]; [("a", p[0], 1)]; [(p[0], "a")]; [("a", "b")]; {"a": p[0]};
        {"params": p}; np.array([1.0]); [np.array(1.0)]; [{}]; [{"lr": 1}]; [{"params": None}]; [{"params": 3}];
        [{"params": "ab"}]; [{"params": [None]}]; [{"params": [p]}]; [{"params": set(p)}];
        [{"params": p}, {"params": p[:1]}]; [{"params": [p[0], p[0]]}]; [{"params": p}, p[0]];
        [p[0], {"params": p[1:]}]; [{"params": p}, None]; [{"params": p}, 3]; [{"params": {"a": p[0]}}]; [p[0] * 1];
        [{"params": [p[0] * 1]}]; [("a", p[0] * 2)]; torch.nn.Linear(2, 2); [torch.nn.Linear(2, 2)];
        (1 / 0 for q in ()); [{"params": (q * 1 for q in p)}]
    """),
    "step": expressions("""
        tuple(p); iter(p); (q for q in p); [("a", p[0]), ("b", p[1]), ("c", p[2])]; list({"a": p[0]}.items());
        {"a": p[0], "b": p[1]}.values(); {q: 1 for q in p}.keys(); [{"params": p[0]}, {"params": p[1:]}];
        [{"params": iter(p)}]; [{"params": []}, {"params": p}]; p[:1]; p[::-1]; [q.data for q in p]; [("", p[0])];
        [{"params": [("a", p[0])]}, {"params": [("b", p[1])]}]; (x for x in [{"params": p}])
    """),
    "either": expressions("""
        {q: 1 for q in p}; {"a": p[0]}.items(); [{"params": [("a", p[0])]}, {"params": p[1:]}];
        [("a", p[0]), ("a", p[1])]; [{"params": p, "param_names": 3}]; [{"params": p, "param_names": ["a"]}];
        [{"params": p, "param_names": [None, 3, {}]}]; [{"params": p, "param_names": "abc"}];
        [{"params": p, "param_names": {"a": 1}}]; [{"params": p, 3: 4}]; [{"params": p, None: p}];
        [{"params": p, "state": 3}]; [p[0].data.int()]; [*p, torch.ones(2, device="meta")];
        [*p, torch.ones(2).to_sparse()]; [*p, Wrapped(p[0])]; [*p, fake(p[0])]; [*p, p[0].as_subclass(Raising)];
        [*p, frozen(p[0])]; [*p, quantized(p[0])]; [*p, torch.ones(2).bool()]; [freed(torch.ones(2))]
    """),
}
MUST = {text: must for must, texts in PARAMS.items() for text in texts}


@generated(
    "params", st.just(list), st.tuples(st.sampled_from(["argument", "group", "later"]), st.sampled_from(list(MUST)))
)
def test_bad_params(nothing, call):
    place, text = call

    def make(params):
        given_params = made(text, p=params)
        if place == "argument":
            return optim.AdamW(given_params)
        if place == "group":
            return optim.AdamW([{"params": given_params}])
        optimizer = optim.AdamW([Parameter(torch.ones(2))])
        failed = refusal(lambda: optimizer.add_param_group({"params": given_params}), optimizer, params)
        if failed is not None:
            raise failed
        return optimizer

    must = MUST[text] if place == "argument" else "either"
    check_made(make, make, must, lambda p: constructed(p, "argument", {}), stepped_without("argument"))


# Groups between steps


def keep_groups(world):
    """Return what makes the groups again what they are now."""
    groups = world.optimizer.param_groups
    kept = [(group, list(dict(group).items()), list(group["params"])) for group in groups]

    def mend():
        for group, items, params in kept:
            group.clear()
            group.update(items)
            group["params"][:] = params
        groups[:] = [group for group, _, _ in kept]
        world.optimizer.param_groups = groups

    return mend


GROUPS = {
    "refuse": expressions("""
        g.clear(); del g["params"]; g["params"] = None; g["params"] = 3; g["params"] = "ab"; g["params"] = [None];
        g["params"].append(None); g["params"].append("x"); g["params"].append(3.0); g["params"].append([]);
        g["params"].append(p[0]); g["params"].append(p[1]); g["params"].append(p[1] * 1); g["params"] = [p[1:]];
        o.param_groups.append(None); o.param_groups.append(3); o.param_groups.append({}); o.param_groups.append([]);
        o.param_groups.append(g); o.param_groups.append({"params": []}); o.param_groups[0] = None;
        o.param_groups = None; o.param_groups = 3; o.param_groups[1] = list(g);
        o.param_groups[1] = dict(g, lr=-1.0); o.param_groups[1] = {"params": p[1:]}; o.param_groups[0] = g;
        g.update(params=tuple(p[1:]), eps=None)
    """)
    + [f"del g['{key}']" for key in KEYS if key not in ADDED],
    "step": expressions("""
        o.param_groups[1] = dict(g); o.param_groups.pop(); o.param_groups.reverse(); g["params"].pop();
        g["params"].reverse(); g["params"] = tuple(p[1:]); g["params"] = iter(p[1:]); g["params"] = [];
        g["params"] = [Parameter(torch.ones(2))]; g["new"] = object(); o.defaults.clear(); o.param_groups[:] = [];
        g["params"].append(o.param_groups[0]["params"].pop())
    """)
    + [f"del g['{key}']" for key in ADDED],  # groups that an earlier release has pickled do not have these
    "either": expressions("""
        g["params"] = p[1]; o.param_groups = tuple(o.param_groups); o.param_groups = iter(o.param_groups);
        g["params"] = set(p[1:]); g["params"] = {"a": p[1]}; g["params"].append(torch.ones(2).int());
        g["param_names"] = 3; g["param_names"] = ["a"]; g["param_names"] = [None, {}]; g["param_names"] = "ab";
        g["param_names"] = {0: "a"}; g["params"].append(torch.ones(2, device="meta"));
        g["params"].append(fake(p[1])); g[None] = 3; g["params"].append(Wrapped(p[1]));
        g["params"].append(quantized(p[1])); o.defaults = None; o.param_groups = {0: g};
        g["params"].append(p[1].detach())
    """),
}
group_calls = st.one_of(
    st.tuples(st.sampled_from([0, 1]), st.sampled_from([*KEYS, "foreach"]), values),
    st.tuples(st.sampled_from([0, 1]), st.sampled_from(KEYS), values),
    st.tuples(st.none(), st.sampled_from([*SETTINGS, *SCALES]), values),
    st.tuples(st.just("whole"), tables(GROUPS)),
)


@generated("groups", trials, group_calls)
def test_bad_groups(trial, call):
    """A hyperparameter between two steps, what is in a group, the groups."""
    if call[0] == "whole":
        _, (must, text) = call
        if trial.kind == "named" and must == "step":
            must = "either"  # names that do not go with the parameters may be refused
        trial.step(statement(text, keep_groups), must=must)
        return
    number, key, value = call
    meaning = meant(key, made(value))
    must = {REFUSED: "refuse", None: "either"}.get(meaning, "step")

    def assign(world, new):
        if number is None:
            setattr(world.optimizer, key, new)
        else:
            world.optimizer.param_groups[number][key] = new

    def setting(make):
        def spoil(world):
            before = {name: getattr(world.optimizer, name, None) for name in [*SETTINGS, *SCALES]}
            mend_groups = keep_groups(world)

            def mend():
                mend_groups()
                for name, setting in before.items():
                    setattr(world.optimizer, name, setting)

            assign(world, make())
            return mend

        return spoil

    no_pair = key == "betas" and len(two_of(made(value))) != 2
    if must == "refuse" and (key in SETTINGS or no_pair):  # refused at once
        world = trial.world
        assert refusal(lambda: assign(world, made(value)), world.optimizer, world.params) is not None
        return
    if key in ("state_format", "master_weights") and must == "step":
        must = "either"  # the state may be in another format by now
    plain = setting(lambda: meaning[0]) if meaning not in (REFUSED, None) else None
    trial.step(setting(lambda: made(value)), plain, must)


# Parameters and their gradients


def set_data(param, data):
    """Return what gives `param` back the data that it has now."""
    before = param.data

    def mend():
        param.grad = None
        param.data = before

    param.data = data
    return mend


def swapped(param, data, gradient):
    """Make `param` what cannot be set as its data; return what undoes it."""
    other = Parameter(data)
    other.grad_dtype = None
    other.grad = gradient
    torch.utils.swap_tensors(param, other)
    return functools.partial(torch.utils.swap_tensors, param, other)


DATA = {
    "same": expressions("t.clone(); turned(t); spread(t); t[..., None].clone()[..., 0]; torch.cat([t[None]] * 2)[1]"),
    "refuse": expressions("""
        t.real.to(torch.float8_e5m2); t.real.to(torch.float8_e4m3fn); t.reshape(-1)[:1].expand(3);
        t.new_ones(9).as_strided((2, 3), (2, 1)); t.new_ones(9).as_strided((4,), (0,)); torch._neg_view(t.clone());
        t.to(torch.complex64).conj(); fake(t); freed(t.clone()); cut(t.clone());
        torch._efficientzerotensor(t.shape, dtype=t.dtype); t.to(torch.complex32)
    """),
    "swap": expressions("""
        t.detach().to_sparse(); t.detach().to("meta"); Wrapped(t); t.detach().reshape(1, -1).to_sparse_csr();
        t.detach().real.float().reshape(-1).to_mkldnn()
    """),
    "either": expressions("""
        t[None]; t.reshape(-1); t.reshape(-1, 1); t.new_zeros(0); t.new_zeros(3, 0); t.real.double();
        t.real.float(); t.real.half(); t.real.bfloat16(); t.to(torch.complex64); t.to(torch.complex128);
        torch.cat([t.reshape(-1)] * 2); torch.full_like(t, nan); torch.full_like(t, inf); torch.full_like(t, 6e4);
        frozen(t); t.as_subclass(Subclass); t.new_ones(12).as_strided((2, 3), (1, 4)); w.params[0].data;
        w.params[1].data; w.params[2].data
    """),
}
parameter_calls = st.tuples(
    tables(DATA),
    st.integers(0, 2),
    st.sampled_from(["torch.ones_like(t)", "turned(torch.ones_like(t))", "old", None]),
)


@generated("parameters", trials, parameter_calls)
def test_bad_parameters(trial, call):
    """Their dtype, shape, layout, memory and class."""
    (kind, text), index, gradient = call

    def spoil(world, text=text):
        param = world.params[index]
        data = made(text, t=param.data, w=world)
        if kind == "swap":
            return swapped(param, data, None if gradient is None else made(text, t=torch.ones_like(param)))
        mend = set_data(param, data)
        if gradient != "old":
            param.grad = None
            param.grad_dtype = None
            param.grad = None if gradient is None else made(gradient, t=param.detach())
        return mend

    plainly = functools.partial(spoil, text="t.clone()") if kind == "same" else None
    must = {"same": "step", "refuse": "refuse", "swap": "refuse"}.get(kind, "either")
    trial.step(spoil, plainly, must if kind == "same" or gradient is not None else "either")


def set_gradient(param, gradient):
    """Give `param` a gradient of whatever shape and dtype; return what takes it away."""
    before = param.data
    param.grad = None
    param.grad_dtype = None
    with torch._C.DisableTorchFunctionSubclass():
        if gradient is not None and gradient.shape != param.shape:
            param.data = torch.zeros(gradient.shape, dtype=param.dtype)
    param.grad = gradient
    param.data = before
    return lambda: setattr(param, "grad", None)


GRADIENTS = {
    "same": expressions("""
        turned(g); spread(g); torch.cat([g[None]] * 2)[1]; frozen(g); Parameter(g);
        Parameter(g) * 1; g.conj_physical().conj(); g.detach().requires_grad_(); g.view(g.shape)
    """),
    "right": expressions("""
        g.new_ones(()).expand(t.shape); torch._efficientzerotensor(t.shape, dtype=t.dtype); g * 0; g * 1e-30;
        g * 1e-42; g.real.double(); g.real.half(); g.real.bfloat16(); g.real.float(); g.to(torch.complex64);
        g.to(torch.complex128).conj(); w.params[0].grad.reshape(-1)[: t.numel()].view(t.shape);
        g.new_ones(t.numel() + 4).as_strided(t.shape, (1,) * t.dim())
    """),
    "refuse": expressions("""
        g.to_sparse(); g.real.int(); g.real.to(torch.int64); g.real.to(torch.int8); g.real.to(torch.uint8);
        g.real > 0; g.real.to(torch.float8_e4m3fn); g.real.to(torch.float8_e5m2); g.to(torch.complex32);
        quantized(g.real); fake(g); Wrapped(g); freed(g); cut(g); t; t.view(t.shape); t.detach(); turned(g)[None];
        g[None]; g[..., None]; g.reshape(-1).repeat(2); g.new_zeros(0); g.new_zeros(3, 0); g.new_zeros(5);
        g.new_zeros(7, 7)
    """),
    "either": expressions("""
        None; g.as_subclass(Subclass); g.as_subclass(Raising); torch.full_like(g, nan); g * nan;
        torch.full_like(g, inf); torch.full_like(g, -inf); g * 1e20; g * 3e38; torch.full_like(g, 6e4).double();
        (g.real.double() * 1e300); torch.full_like(g.real, 1e300, dtype=torch.float64);
        torch.where(g.real > 0, g, nan); torch.where(g.real > 0, g, inf); torch.full_like(g, -0.0)
    """),
}


NO_NUMBERS = expressions("torch.full_like(g, nan); g * nan; torch.full_like(g, inf); torch.full_like(g, -inf)")


@generated(
    "gradients",
    st.one_of(trials, trials_of(["clipped", "skipping", "no NaN"])),
    st.tuples(tables(GRADIENTS, CRASHES), st.integers(0, 2)),
)
def test_bad_gradients(trial, call):
    """Their dtype, shape, layout, memory, class and values."""
    (kind, text), index = call

    def spoil(world, plainly=False):
        param = world.params[index]
        gradient = made(text, g=param.grad.clone(), t=param.data, w=world)
        if plainly:
            gradient = gradient.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        return set_gradient(param, gradient)

    must = {"same": "step", "right": "either"}.get(kind, kind)
    if text in NO_NUMBERS and trial.kind == "no NaN":
        must = "refuse"
    plainly = functools.partial(spoil, plainly=True) if kind in ("same", "right") else None
    trial.step(spoil, plainly, must)
