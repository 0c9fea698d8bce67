"""Guards that state and checkpoints are refused whole or used right, and that a run survives `kill -9`.

State that someone has changed; state dicts with parts removed, swapped, renamed and replaced, of other optimizers too;
files cut short and with bytes flipped: the second half of the calls of test_faults.py, judged as there. What is loaded
has to step. At the end, a training run that is killed while it saves, again and again, and goes on from the last whole
checkpoint each time.
"""

import copy
import functools
import io
import numbers
import os
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import train_gpt
from bad_values import CRASHES, REFUSED, expressions, made, statement, tables, values
from bits import draw, on, peek, tensors_in
from judged import CALLS, KINDS, SHAPES, generated, has_memory, refusal, trained, trials
from quick import examples

# State


def keep_state(world):
    """Return what makes the state again what it is now."""
    world.optimizer.init_state()
    state = world.optimizer.state
    kept = [
        (param, entry, [(key, value, value.clone()) for key, value in entry.items()]) for param, entry in state.items()
    ]

    def mend():
        state.clear()
        for param, entry, items in kept:
            entry.clear()
            for key, value, before in items:
                if not has_memory(value):
                    value.data = before
                entry[key] = value.copy_(before)
            state[param] = entry
        world.optimizer.state = state

    return mend


SLOTS = {
    "same": expressions(
        "t.clone(); t.view(t.shape); torch.cat([t[None]] * 2)[1]; Parameter(t) if t.is_floating_point() else t.clone()"
    ),
    "refuse": expressions("""
        t[None]; t[..., None]; t.reshape(-1).repeat(2); t.new_zeros(0); t.new_zeros(3, 0); t.new_zeros(5);
        t.to(torch.complex32); t.to_sparse(); t.to("meta"); fake(t); Wrapped(t); freed(t.clone()); t.tolist(); [t];
        (t,); {"t": t}; torch.Size(t.shape); p.data; p; p.grad; t.real.to(torch.float8_e5m2); torch.empty(9, 9);
        next(x for k, x in e.items() if x is not t and k != "step")
    """),
    "either": expressions("""
        turned(t); spread(t); t.real.double(); t.real.float(); t.real.half(); t.real.bfloat16(); t.real.int();
        t.real.long(); t != 0; t.real.to(torch.uint8); t.to(torch.complex64); cut(t.clone()); frozen(t);
        t.as_subclass(Subclass); t.as_subclass(Raising); torch._neg_view(t.clone()); t.to(torch.complex64).conj();
        torch.zeros_like(t); torch._efficientzerotensor(t.shape, dtype=t.dtype); t.new_ones(()).expand(t.shape);
        t * 0 - 1; t * nan; t * inf; t.new_zeros(9 + t.numel()).as_strided(t.shape, (1,) * t.dim());
        t.numpy(force=True) if t.dtype != torch.bfloat16 else 0
    """),
}
COUNTS = expressions("""
    -1; -1.0; 0.5; nan; inf; -inf; 2**24; 2**24 - 1; 2**24 - 2; 0; 3; 3.0; -0.0; 1e300; 10**400; "3"; None; [3];
    True; torch.tensor(-1.0); torch.tensor(0.5); torch.tensor(nan); torch.tensor(inf); torch.tensor(2.0**24);
    torch.tensor(2.0**24 - 1); torch.tensor(2.0**24 - 2); torch.tensor(3); torch.tensor([3.0]);
    torch.tensor([[3.0]]); torch.tensor([3.0, 3.0]); torch.tensor([]); torch.tensor(3j);
    torch.tensor(3.0, dtype=torch.float64); torch.tensor(True); Parameter(torch.tensor(3.0));
    frozen(torch.tensor(3.0)); torch.tensor(3.0).to_sparse(); torch.tensor(3.0, device="meta"); np.float32(3);
    np.int64(3); np.array(3.0); Fraction(3); Fraction(1, 2); Whole.THREE; torch.ones(()).expand(()) * 3;
    fake(torch.tensor(3.0)); Wrapped(torch.tensor(3.0)); freed(torch.tensor(3.0))
""")
STATES = {
    "refuse": expressions("""
        o.state[p[1]] = None; o.state[p[1]] = 3; o.state[p[1]] = [];
        o.state[p[1]] = "x"; o.state[p[1]] = torch.ones(4); o.state[p[1]] = {"step": torch.tensor(1.0)};
        o.state[p[1]] = {"square_avg": torch.ones(4)}; o.state[p[1]] = {3: 4};
        o.state[p[1]] = {"momentum_buffer": None}; o.state[p[1]], o.state[p[0]] = o.state[p[0]], o.state[p[1]];
        o.state[p[0]] = o.state[p[2]]; e["step"].fill_(-1); e["step"].fill_(0.5); e["step"].fill_(nan);
        e["step"].fill_(inf); e["step"].fill_(2**24); e["step"].fill_(2**24 - 1); e["step"].fill_(-1e30);
        e["step"].fill_(1e-45); e["step"].untyped_storage().resize_(0);
        [x.untyped_storage().resize_(0) for k, x in e.items() if k != "step"]; e.update(dict.fromkeys(e));
        [e.pop(k) for k in list(e) if k != "step"]
    """),
    "step": expressions("""
        o.state = {}; o.state.clear(); o.state.pop(p[1]); o.state[p[1]] = {}; o.state[p[1]] = dict(e); e.clear();
        o.state["x"] = 1; o.state[None] = None; o.state[torch.ones(3)] = {}; e["new"] = object(); e[3] = {};
        e[None] = p; o.state = dict(o.state); o.state[3] = o.state[p[1]]; e["step"].fill_(2**24 - 2);
        e["step"].fill_(0); e.update(list(e.items())[::-1]); e["momentum_buffer"] = None;
        e["square_avg"] = torch.ones(2)
    """),
    "either": expressions("""
        o.state = {p[1]: e}; [x.fill_(nan) for x in e.values() if x.is_floating_point() and x.dim()];
        [x.fill_(inf) for x in e.values() if x.is_floating_point() and x.dim()];
        [x.fill_(-1) for k, x in e.items() if k != "step"]; [x.neg_() for k, x in e.items() if k != "step"];
        e["exp_avg_code"] = torch.zeros(4, dtype=torch.uint8); e["exp_avg_sq"] = e.pop("exp_avg");
        e["master"] = torch.zeros(4); e["residual"] = torch.zeros(4);
        e["residual"] = torch.zeros(4, dtype=torch.bfloat16); e["max_exp_avg_sq"] = torch.zeros(4);
        e["max_exp_avg_sq"] = 3; e["stream"] = torch.tensor(0); e["stream"] = 3; e["stream"] = torch.ones(2).long();
        o.state[p[2]] = o.state[p[1]]; o.state.default_factory = None; o.state.default_factory = list
    """),
}
slots = st.tuples(tables(SLOTS), st.integers(0, 2), st.integers(0, 5))
scalar_slots = st.tuples(st.just("scalar"), st.integers(0, 2), st.integers(0, 5), values)
wholes = st.tuples(st.just("whole"), tables(STATES))
counts = st.tuples(st.just("count"), st.integers(0, 2), st.one_of(st.sampled_from(COUNTS), st.floats(), st.integers()))


def count_meant(value):
    """As `meant`: the count before a step that is to be one more."""
    if isinstance(value, Tensor):
        return None
    if isinstance(value, np.generic) or not isinstance(value, int | float):
        return None if isinstance(value, numbers.Real) else REFUSED
    return (value,) if 0 <= value < 2**24 - 1 and value == int(value) else REFUSED


def with_slot(index, number, make):
    def spoil(world):
        mend = keep_state(world)
        param = world.params[index]
        entry = world.optimizer.state[param]
        keys = sorted(key for key in entry if key != "step")
        key = "step" if number is None else keys[number % len(keys)]
        entry[key] = make(entry[key], param, entry)
        return mend

    return spoil


@generated("state", trials, st.one_of(slots, scalar_slots, counts, wholes, wholes))
def test_bad_state(trial, call):
    """Its entries, its tensors, its step counts."""
    if call[0] == "whole":
        _, (must, text) = call
        trial.step(statement(text, keep_state), must=must)
    elif call[0] == "count":
        _, index, value = call
        meaning = count_meant(made(value))
        must = {REFUSED: "refuse", None: "either"}.get(meaning, "step")
        plain = with_slot(index, None, lambda *_: torch.tensor(float(meaning[0]))) if must == "step" else None
        trial.step(with_slot(index, None, lambda *_: made(value)), plain, must)
    elif call[0] == "scalar":
        _, index, number, value = call
        trial.step(with_slot(index, number, lambda *_: made(value)), must="either")
    else:
        (kind, text), index, number = call
        must = {"same": "step"}.get(kind, kind)
        same = with_slot(index, number, lambda t, p, e: t.detach().clone()) if must == "step" else None
        trial.step(with_slot(index, number, lambda t, p, e: made(text, t=t, p=p, e=e)), same, must)


# State dicts

OTHERS = {
    "torch AdamW": (torch.optim.AdamW, {"amsgrad": True}),
    "torch fused AdamW": (torch.optim.AdamW, {"fused": True}),
    "Adamax": (torch.optim.Adamax, {}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "RMSprop": (torch.optim.RMSprop, {"centered": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
}


@functools.cache
def saved_by(source, shapes):
    """The state dict of ours of some kind, or of another's optimizer; to be copied."""
    if source in KINDS:
        return copy.deepcopy(trained(source, 2).optimizer.state_dict())
    params = [Parameter(draw(index, shape)) for index, shape in enumerate(shapes)]
    make, options = OTHERS[source]
    optimizer = make([{"params": params[:1]}, {"params": params[1:]}], lr=0.01, **options)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer.state_dict()


def places(value, path=()):
    """The path of everything in nested dicts and lists, the whole first."""
    found = [path]
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*path, key))
    return found


def at(value, path):
    for key in path:
        value = value[key]
    return value


KEYS = [0, 1, 2, 7, -1, 0.5, True, None, "0", (1, 2), "state", "param_groups", "params", "param_names", "lr", "betas"]
KEYS += ["beta1", "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_code", "exp_avg_scale", "exp_avg_sq_code"]
KEYS += ["exp_avg_sq_scale", "stream", "residual", "master", "momentum_buffer", "square_avg", "sum", "foreach", "mine"]

garbage = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)),
    max_leaves=6,
)
somewhere = st.one_of(  # one of the places that fit, counted round and round, or a path
    st.integers(0, 999), st.sampled_from([("state",), ("state", 0), ("state", 2), ("param_groups", 1)])
)
new_values = st.one_of(
    st.tuples(st.just("value"), values.filter(lambda value: value not in CRASHES)),
    st.tuples(st.just("garbage"), garbage),
)
changes = st.one_of(
    st.tuples(st.just("remove"), somewhere),
    st.tuples(st.just("replace"), somewhere, new_values),
    st.tuples(st.just("tensor"), somewhere, tables(SLOTS, CRASHES)),
    st.tuples(st.just("swap"), somewhere, somewhere),
    st.tuples(st.just("shorten"), somewhere),
    st.tuples(st.just("double"), somewhere),
    st.tuples(st.just("rename"), somewhere, st.sampled_from(KEYS)),
    st.tuples(st.just("add"), somewhere, st.sampled_from(KEYS), new_values),
)


def new_value(drawn):
    kind, value = drawn
    return made(value) if kind == "value" else copy.deepcopy(value)


def changed(whole, change):
    """What `change` makes of nested dicts and lists; places where it makes nothing are passed over."""
    how, where, *more = change
    whole = [whole]  # so that the whole can be replaced as well
    all_places = [(0, *path) for path in places(whole[0])]

    def fitting(fits, where=where):
        found = [path for path in all_places if fits(at(whole, path), at(whole, path[:-1]))]
        if isinstance(where, tuple):
            return (0, *where) if (0, *where) in found else None
        return found[where % len(found)] if found else None

    fits = {
        "tensor": lambda value, _: type(value) in (Tensor, Parameter) and has_memory(value) and not value.is_quantized,
        "shorten": lambda value, _: isinstance(value, list) and value,
        "double": lambda value, _: isinstance(value, list) and value,
        "add": lambda value, _: isinstance(value, dict),
        "rename": lambda _, parent: isinstance(parent, dict),
    }.get(how, lambda value, parent: True)
    path = fitting(fits)
    if path is None:
        return whole[0]
    parent, key = at(whole, path[:-1]), path[-1]
    if how == "remove" and len(path) > 1:
        del parent[key]
    elif how == "replace":
        parent[key] = new_value(more[0])
    elif how == "tensor":
        param = Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        parent[key] = made(more[0][1], t=parent[key], p=param, e={"other": torch.ones(3)})
    elif how == "swap" and (other := fitting(lambda *_: True, more[0])):
        nested = path[: len(other)] == other or other[: len(path)] == path
        if not nested:
            its_parent = at(whole, other[:-1])
            parent[key], its_parent[other[-1]] = its_parent[other[-1]], parent[key]
    elif how == "shorten":
        parent[key].pop()
    elif how == "double":
        parent[key].append(parent[key][-1])
    elif how == "rename":
        parent[more[0]] = parent.pop(key)
    elif how == "add":
        parent[key][more[0]] = new_value(more[1])
    return whole[0]


def check_load(trial, make):
    """Load what `make` makes: refused, and all as it was, or taken, and then it steps and can be saved."""
    refusals = []
    for world, engine_name in ((trial.world, "cpu"), (trial.mirror, "reference")):
        state_dict = make()
        with on(engine_name):
            refusals.append(refusal(lambda: world.optimizer.load_state_dict(state_dict), world.optimizer, world.params))  # noqa: B023
    ours, theirs = refusals
    assert (ours is None) == (theirs is None), f"{ours!r}, {theirs!r}"
    if ours is not None:
        trial.mended([])
        return
    for world in (trial.world, trial.mirror):
        world.set_gradients()
    for _ in range(2):
        refused = refusal(trial.world.optimizer.step, trial.world.optimizer, trial.world.params)
        with on("reference"):
            refused_too = refusal(trial.mirror.optimizer.step, trial.mirror.optimizer, trial.mirror.params)
        state = peek(trial.world.optimizer)
        full = any(param in state and state[param]["step"] == 2**24 - 1 for param in trial.world.params)
        assert refused is None or full, f"loaded, and then not stepped: {refused}"
        trial.judge(refused, refused_too, must="either")
    optimizer, params = trial.world.optimizer, trial.world.params
    saved = optimizer.state_dict()["state"]
    assert all(
        saved[number] is peek(optimizer)[param] for number, param in enumerate(params) if param in peek(optimizer)
    )
    refusal(optimizer.torch_state_dict, optimizer, params)
    trial.renew()


@generated(
    "state dicts",
    trials,
    st.tuples(st.sampled_from([None, None, *KINDS, *OTHERS]), st.lists(changes, min_size=1, max_size=3)),
)
def test_bad_state_dicts(trial, call):
    """Parts removed, replaced by anything, swapped, renamed, added; of other optimizers."""
    source, what = call

    def make():
        saved = copy.deepcopy(saved_by(source or trial.kind, KINDS[trial.kind].get("shapes", SHAPES)))
        return functools.reduce(changed, what, saved)

    check_load(trial, make)


# Files


@functools.cache
def file_of(kind, zipped):
    file = io.BytesIO()
    checkpoint = {"step": 2, "optimizer": saved_by(kind, None)}
    torch.save(checkpoint, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def flipped(content, flips):
    content = bytearray(content)
    for where, mask in flips:
        content[where % len(content)] ^= mask
    return bytes(content)


def with_entry(content, number, change):
    """A zip file with one of its members changed, and its checksum with it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        names = old.namelist()
        for name in names:
            member = old.read(name)
            new.writestr(name, change(member) if name == names[number % len(names)] and member else member)
    return file.getvalue()


flips = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3)
damages = st.one_of(
    st.tuples(st.just("cut"), st.booleans(), st.integers(0, 10**6)),
    st.tuples(st.just("flip"), st.booleans(), flips),
    st.tuples(st.just("pickle"), flips),
    st.tuples(st.just("pickle"), flips),
    st.tuples(st.just("member"), st.integers(0, 99), flips),
)
loaded_from_files = []  # those that torch could read


def damaged(kind, damage):
    how, *more = damage
    if how == "cut":
        content = file_of(kind, more[0])
        return content[: more[1] % len(content)]
    if how == "flip":
        return flipped(file_of(kind, more[0]), more[1])
    number, mutated = (0, more[0]) if how == "pickle" else more
    return with_entry(file_of(kind, True), number, lambda member: flipped(member, mutated))


def check_file(trial, damage):
    content = damaged(trial.kind, damage)

    def read():
        checkpoint = torch.load(io.BytesIO(content), weights_only=True)
        return checkpoint["optimizer"] if isinstance(checkpoint, Mapping) and "optimizer" in checkpoint else checkpoint

    try:
        read()
    except Exception:
        return  # torch's own
    loaded_from_files.append(damage)
    check_load(trial, read)


bad_files = generated("checkpoints", trials, damages)(check_file)


def test_bad_files():
    """Cut short, bytes flipped, the checksums made right again: what torch still reads is not little."""
    loaded_from_files.clear()
    bad_files()
    assert len(loaded_from_files) > examples(CALLS["checkpoints"]) // 10


# kill -9


def small_run(**formats):
    """A run of the example that saves after each of its steps, which take no longer than that."""
    config = train_gpt.Config(steps=12, width=64, heads=2, layers=1, batch=1, context=8, **formats)
    corpus = train_gpt.Corpus()
    corpus.held_out = corpus.held_out[:40]
    return train_gpt.Run(config, corpus)


def contents(run):
    """The bits of all that a run goes on from."""
    tensors = [*run.model.state_dict().values(), *tensors_in(run.optimizer.state_dict()["state"])]
    bits = [tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return bits, [*run.losses], [*run.held_out], run.schedule.state_dict()


def forked(act):
    """Begin `act` in a forked child, silently; return its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on: fork beside pytest's own threads
        child = os.fork()
    if child:
        return child
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        act()
        os._exit(0)
    finally:
        os._exit(1)


def killed_when(child, there, seconds=60):
    """Kill a child with signal 9 as soon as the file `there` exists."""
    deadline = time.monotonic() + seconds
    while not there.exists():
        assert time.monotonic() < deadline, f"nothing was saved within {seconds} s"
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child ended by itself"
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.slow
@pytest.mark.parametrize("formats", [{}, {"state": "8bit", "dtype": "bf16"}], ids=["fp32", "8bit-bf16"])
def test_killed_while_it_saves(formats, tmp_path, monkeypatch):
    """However much of it was written, the one before is whole, and the run goes on from it to the same bits."""
    monkeypatch.setattr(train_gpt, "EVERY", 1)
    monkeypatch.setattr(train_gpt.tqdm, "_lock", threading.RLock(), raising=False)  # its own is shared with children
    path = tmp_path / "checkpoint.pt"
    whole, after = small_run(**formats), {}
    save = whole.save
    whole.save = lambda to: (save(to), after.__setitem__(whole.step, contents(whole)))
    train_gpt.train([whole], whole.config.steps, tmp_path / "whole.pt")
    assert len(after) == whole.config.steps

    unfinished, torn = path.with_suffix(".tmp"), tmp_path / "torn"
    for number, part in enumerate((0.0, 0.01, 0.5, 0.99, 1.0), start=1):

        def go_on(part=part):
            """Save one step whole, and of the next one only the first part of the bytes; then wait to be killed."""
            run = small_run(**formats)
            if path.exists():
                run.load(path)
            whole_save, saved = torch.save, []

            def save(value, to):
                saved.append(to)
                if len(saved) == 1:
                    return whole_save(value, to)
                whole_save(value, buffer := io.BytesIO())
                to.write_bytes(buffer.getvalue()[: int(part * buffer.tell())])
                torn.touch()
                time.sleep(100)
                return None

            torch.save = save
            train_gpt.train([run], run.config.steps, path)

        killed_when(forked(go_on), torn)
        torn.unlink()
        assert unfinished.exists()
        run = small_run(**formats)
        run.load(path)
        assert run.step == number
        assert contents(run) == after[number]
    run = small_run(**formats)
    run.load(path)
    train_gpt.train([run], run.config.steps, path)
    assert contents(run) == after[whole.config.steps]
