"""Guards that an optimizer refuses what is wrong, whole and in words, or does it right: ten thousand bad calls.

They are generated: arguments, groups, parameters and gradients here, state, state dicts and checkpoint files in
test_faults_checkpoints.py. Each ends in an exception that says what is wrong, with everything bit for bit what it
was, or in the step that the reference engine takes on a twin. After a refusal the input is mended, and the next step
is that of an optimizer that never saw the bad call. Several go to one optimizer in turn; a call is written as the
expression that makes it, so that a failure can be read.
"""

import copy
import ctypes
import decimal
import enum
import fractions
import functools
import inspect
import math
import numbers
import re
import types
import warnings

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter

import lucid.optim as optim
from bits import SEALED, World, assert_same, draw, on, peek, results

CALLS = {  # at least; a whole number of batches
    "arguments": 1600,
    "params": 400,
    "groups": 1900,
    "parameters": 900,
    "gradients": 1500,
    "state": 1700,
    "state dicts": 1500,
    "checkpoints": 700,
}
BATCH = 5  # calls to one optimizer
# Warnings of torch about what is made here, and of ours about names that do not match.
EXPECTED = [
    "attribute of a Tensor that is not a leaf",
    "quantize",
    "ComplexHalf",
    "Sparse",
    "nested tensors",
    "TypedStorage",
    "Detected pickle",
    "by position",
]


def test_the_calls_are_ten_thousand():
    """That each part makes its share, it sees itself."""
    assert sum(CALLS.values()) >= 10_000


def generated(what, begun, calls):
    """Make of a check of one call the test of as many as `what` asks for. `begun` draws what a batch starts from."""

    def decorate(check):
        def test():
            made = 0

            @settings(
                max_examples=-(-CALLS[what] // BATCH),
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            @given(begun, st.lists(calls, min_size=BATCH, max_size=BATCH))
            def run(begun, calls):
                nonlocal made
                start = begun()
                for call in calls:
                    check(start, call)
                    made += 1

            torch.set_num_threads(1)
            with warnings.catch_warnings():
                for text in EXPECTED:
                    warnings.filterwarnings("ignore", f".*{text}")
                run()
            assert made >= CALLS[what]

        test.__doc__ = check.__doc__
        return test

    return decorate


# What a refusal is

SIGNATURE = inspect.signature(optim.AdamW).parameters
CLEAR = (TypeError, ValueError, RuntimeError, FloatingPointError)
ABOUT = re.compile(
    "|".join(["param", "grad", "state", "step", "group", "argument", "beta", "found_inf", *SIGNATURE])
    + "|__float__|pickle|deepcopy"  # Python's words for an object that does not do what its class should
)


class OwnError(Exception):
    """What an object that was given to us raises by itself: it may come through."""


def check_clear(error):
    """Raise unless `error` is of a class that a caller expects and says what is wrong."""
    said = str(error)
    if not isinstance(error, OwnError) and (type(error) not in CLEAR or len(said) < 20 or not ABOUT.search(said)):
        raise AssertionError(f"no clear refusal: {type(error).__name__}: {said[:300]}") from error


def is_plain(tensor):
    dispatched = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return not dispatched and tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_nested


def has_memory(tensor):
    """Of its own, and enough for its shape."""
    if not is_plain(tensor) or tensor._is_zerotensor():
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return not tensor.numel() or tensor.untyped_storage().nbytes() >= needed


def seen(optimizer, params):
    """All that a refused call must leave alone: identities, addresses, versions, and the bits of whole storages."""

    def of(value):
        if isinstance(value, Tensor):
            facts = [id(value), type(value), value.dtype, value.layout, value.requires_grad]
            if not value.is_inference():
                facts.append(value._version)
            if is_plain(value):
                storage = value.untyped_storage()
                facts += [value.shape, value.stride(), value.storage_offset(), value.is_neg(), value.is_conj()]
                at = 0 if value._is_zerotensor() else storage.data_ptr()
                facts += [at, ctypes.string_at(at, storage.nbytes()) if at else None]
            return facts
        if isinstance(value, dict):
            return id(value), [(id(k) if isinstance(k, Tensor) else k, of(v)) for k, v in value.items()]
        if isinstance(value, list | tuple):
            return id(value), [of(item) for item in value]
        if type(value) in (int, str, bool):
            return value
        return repr(value) if type(value) is float else id(value)

    with torch._C.DisableTorchFunctionSubclass():
        held = [] if optimizer is None else [peek(optimizer), optimizer.param_groups, optimizer.defaults]
        told = [] if optimizer is None else [optimizer.skipped_steps, optimizer.max_grad_norm, optimizer.nonfinite]
        return (
            [of(item) for item in held],
            [repr(item) for item in told],
            [(of(param), of(param.grad)) for param in params],
        )


def refusal(call, optimizer, params):
    """Make a call; return the exception that it ended in, clear and with nothing changed, or None."""
    before = seen(optimizer, params)
    refused = None
    try:
        call()
    except Exception as error:
        refused = error
    if refused is not None:
        check_clear(refused)
        assert seen(optimizer, params) == before, f"changed by a call that was refused: {refused}"
        refused.__cause__ = refused.__context__ = refused.__traceback__ = None  # they hold what a step has held
    return refused


# Worlds

SHAPES = ((2, 3), (4,), ())
LARGE = ((64, 64), (4,), ())  # so that the first may be kept in 8 bits
KINDS = {
    "float32": {},
    "amsgrad": {"amsgrad": True},
    "bf16": {"state_format": "bf16"},
    "8bit": {"state_format": "8bit", "shapes": LARGE},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16 8bit": {"dtype": torch.bfloat16, "state_format": "8bit", "shapes": LARGE},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "complex64": {"dtype": torch.complex64},
    "named": {},
    "clipped": {"max_grad_norm": 0.5},
    "skipping": {"nonfinite": "skip"},
    "no NaN": {"nonfinite": "error", "max_grad_norm": 1e3},
}


def new_world(kind):
    world = World(**{"shapes": SHAPES, **KINDS[kind]})
    if kind == "named":
        for names, group in zip((["a"], ["b", "c"]), world.optimizer.param_groups, strict=True):
            group["param_names"] = names
    return world


@functools.cache
def trained(kind, steps):
    """A world after good steps on the reference engine, to be copied."""
    with on("reference"):
        return copy.deepcopy(trained(kind, steps - 1)).run(1) if steps else new_world(kind)


@functools.cache
def wanted(kind, steps):
    return results(trained(kind, steps).optimizer)


def outcome(optimizer):
    """The results of all parameters that have memory."""

    def kept(entry):
        tensors = {key: value for key, value in entry.items() if isinstance(key, str) and isinstance(value, Tensor)}
        return {key: value for key, value in tensors.items() if has_memory(value)}

    params = [param for group in optimizer.param_groups for param in group["params"] if has_memory(param)]
    state = {param: kept(peek(optimizer)[param]) for param in params if param in peek(optimizer)}
    with torch._C.DisableTorchFunctionSubclass():
        return results(types.SimpleNamespace(param_groups=[{"params": params}], _state_box=[state]))


def measured(optimizer):
    norm = optimizer.grad_norm
    return optimizer.skipped_steps, None if norm is None else float(norm).hex()


class Trial:
    """A world that gets bad calls, and its mirror on the reference engine that gets what they mean."""

    def __init__(self, kind, stage):
        self.kind, self.stage = kind, stage
        self.renew()

    def renew(self):
        self.world = new_world(self.kind).run(self.stage)
        self.mirror = copy.deepcopy(trained(self.kind, self.stage))

    def step(self, spoil, mirrored=None, must=None):
        """Step a world that `spoil` has made wrong; it returns what mends it, or the exception that refused it.

        ``mirrored`` does the same to the mirror where it can be said more plainly; ``must`` is "refuse" or "step" where
        there is no doubt.
        """
        refusals, mends = [], []
        for world, act, engine_name in ((self.world, spoil, "cpu"), (self.mirror, mirrored or spoil, "reference")):
            with on(engine_name):
                world.set_gradients()
                mend = act(world)
                if isinstance(mend, Exception):
                    refusals.append(mend)
                    continue
                mends.append(mend)
                refusals.append(refusal(world.optimizer.step, world.optimizer, world.params))
        self.judge(*refusals, must)
        if refusals[0] is None:
            self.go_on()
        else:
            self.mended(mends)

    def judge(self, ours, theirs, must):
        assert (ours is None) == (theirs is None), f"here: {ours!r}; the reference engine: {theirs!r}"
        if ours is None:
            assert must != "refuse", "taken, though it is wrong"
            assert_same(outcome(self.world.optimizer), outcome(self.mirror.optimizer))
            assert measured(self.world.optimizer) == measured(self.mirror.optimizer)
        elif must == "step":
            raise AssertionError(f"refused, though it is right: {ours}") from ours

    def mended(self, mends):
        """After a refusal and a good step, all is as though there had been no call."""
        for mend in mends:
            mend()
        self.world.step()
        with on("reference"):
            self.mirror.step()
        assert_same(results(self.world.optimizer), wanted(self.kind, self.world.done), "after a refusal")

    def go_on(self):
        """After a strange step that was right, so is the next with the same; then start anew."""
        refused = refusal(self.world.optimizer.step, self.world.optimizer, self.world.params)
        with on("reference"):
            refused_too = refusal(self.mirror.optimizer.step, self.mirror.optimizer, self.mirror.params)
        self.judge(refused, refused_too, must="either")
        self.renew()


def trials_of(kinds):
    return st.builds(functools.partial, st.just(Trial), st.sampled_from(kinds), st.sampled_from([0, 2, SEALED]))


trials = trials_of(["float32", "float32", "float32", *KINDS])

# Values


class Raising(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise OwnError("no function of torch may have me")


class Wrapped(Tensor):
    @staticmethod
    def __new__(cls, value):
        return Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(*args)
        raise OwnError("no operation may have me")


class Subclass(Tensor):
    pass


class Subfloat(float):
    pass


class Liar(float):
    def __float__(self):
        return "0.1"


class Sulking(float):
    def __float__(self):
        raise OwnError("no number")


@numbers.Real.register
class NoNumber:
    pass


class Nameless:
    def __repr__(self):
        raise OwnError("no name")


class Text(enum.StrEnum):
    EIGHT = "8bit"


class Whole(enum.IntEnum):
    THREE = 3


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def cut(tensor):
    """With less memory than its shape needs."""
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)
    return tensor


def frozen(tensor):
    with torch.inference_mode():
        return tensor.detach().clone()


def fake(tensor):
    with FakeTensorMode():
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def quantized(tensor):
    return torch.quantize_per_tensor(tensor.detach().float(), 0.1, 0, torch.qint8)


def spread(tensor):
    """The same numbers with gaps."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def turned(tensor):
    """The same numbers, in another order in memory."""
    backwards = tuple(reversed(range(tensor.dim())))
    return tensor.permute(backwards).clone(memory_format=torch.contiguous_format).permute(backwards)


WORDS = {each.__name__: each for each in (Raising, Wrapped, Subclass, Subfloat, Liar, Sulking, NoNumber, Nameless)}
WORDS |= {each.__name__: each for each in (Text, Whole, Tensor, Parameter)}
WORDS |= {each.__name__: each for each in (freed, cut, frozen, fake, quantized, spread, turned)}
WORDS |= {"np": np, "torch": torch, "nan": math.nan, "inf": math.inf, "math": math}
WORDS |= {"Fraction": fractions.Fraction, "Decimal": decimal.Decimal}


def expressions(text):
    return [" ".join(part.split()) for part in text.split(";") if part.strip()]


@functools.cache
def compiled(text, mode="eval"):
    return compile(text, text, mode)


def made(text, **more):
    """A fresh object of what `text` says, or a number as it is."""
    return eval(compiled(text), WORDS | more) if isinstance(text, str) else text


SCALARS = expressions("""
    None; ...; True; False; "0.1"; ""; "fp32"; "bf16"; "8bit"; "FP32"; "skip"; "error"; "propagate"; b"8bit"; "ab";
    Text.EIGHT; Whole.THREE; np.str_("fp32"); 1j; Fraction(1, 3); Fraction(-1, 3); Fraction(10**400);
    Decimal("0.1"); 10**400; -10**400; 10**5000; 2**63; 2**63 - 1; np.float16(0.1); np.float32(0.1);
    np.float64(0.1); np.longdouble("0.1"); np.longdouble("1e4000"); np.float32("nan"); np.float64("inf");
    np.int64(1); np.int8(-1); np.uint8(0); np.bool_(True); np.complex64(0.1); np.array(0.1); np.array([0.1, 0.2]);
    np.array([None, "x"]); Subfloat(0.25); Liar(0.1); Sulking(0.1); NoNumber(); Nameless(); object(); float; math;
    math.sin; (x for x in (0.9, 0.99)); []; [0.1]; (0.9, 0.99); [0.5, 0.5]; (0.9, 1.0); (0.9, None); (nan, 0.9);
    (True, 0.9); (0.9, 0.9, 0.9); {}; {"lr": 1}; {0.1, 0.2}; {0.9: 1, 0.99: 2}; ((0.9, 0.99),); [Nameless(), 0.9]
""")
SCALAR_TENSORS = expressions("""
    torch.tensor(0.1); torch.tensor(0.0); torch.tensor(-1.0); torch.tensor(nan); torch.tensor(inf);
    torch.tensor(0.1, dtype=torch.float64); torch.tensor(0.1, dtype=torch.bfloat16); torch.tensor(1);
    torch.tensor(True); torch.tensor(1j); torch.tensor([0.1]); torch.tensor([[0.1]]); torch.tensor([0.1, 0.1]);
    torch.tensor([]); torch.tensor(0.1, device="meta"); torch.tensor(0.1).to_sparse(); quantized(torch.tensor(0.1));
    freed(torch.tensor(0.1)); fake(torch.tensor(0.1)); Wrapped(torch.tensor(0.1));
    torch.tensor(0.1).as_subclass(Raising); torch.tensor(0.1).as_subclass(Subclass); Parameter(torch.tensor(0.1));
    Parameter(torch.tensor(0.1)) * 1; torch._neg_view(torch.tensor(-0.1)); torch._efficientzerotensor(());
    frozen(torch.tensor(0.1)); torch.tensor(0.1).to(torch.float8_e5m2)
""")
# What ends the process or reads memory that is not the tensor's: a tensor in a state dict whose storage was freed or
# made smaller, and a gradient whose storage was made smaller. To be emptied when they are refused.
CRASHES = ["freed(torch.tensor(0.1))", "freed(t.clone())", "cut(t.clone())", "cut(g)"]
values = st.one_of(
    st.sampled_from(SCALARS),
    st.sampled_from(SCALAR_TENSORS),
    st.floats(),
    st.floats(0, 1),
    st.integers(-3, 3),
    st.integers(),
)


def tables(table, without=()):
    """Draw (kind, expression)."""
    kept = {kind: [text for text in table[kind] if text not in without] for kind in table}
    return st.sampled_from(list(kept)).flatmap(lambda kind: st.tuples(st.just(kind), st.sampled_from(kept[kind])))


REFUSED = object()
ARGUMENTS = [name for name in SIGNATURE if name != "params"]
KEYS = [*optim.AdamW([Parameter(torch.ones(1))]).defaults, "betas"]
SETTINGS = [name for name in ARGUMENTS if name not in KEYS]  # of the whole optimizer
SCALES = ["grad_scale", "found_inf"]  # what GradScaler sets
CHOICES = {"state_format": ("fp32", "bf16", "8bit"), "nonfinite": ("propagate", "skip", "error")}


def number_meant(value, below=math.inf):
    """Of a number from 0 to what it is `below`; None: above 0, and as large as you like."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        return REFUSED
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    except (TypeError, OwnError):
        return REFUSED
    return (number,) if (number > 0 if below is None else 0 <= number < below) else REFUSED


def lr_meant(value):
    if not isinstance(value, Tensor):
        return number_meant(value)
    with torch._C.DisableTorchFunctionSubclass():
        if value.numel() != 1 or type(value) is Wrapped:
            return REFUSED
        if type(value) not in (Tensor, Parameter) or value.dim() or value.is_quantized or not has_memory(value):
            return None
        return number_meant(value.item())


def two_of(value):
    """What is a pair of betas, if it has two of something in order."""
    with torch._C.DisableTorchFunctionSubclass():
        if isinstance(value, Tensor | np.ndarray):
            return value.tolist() if value.ndim == 1 else ()
    return list(value) if isinstance(value, tuple | list | types.GeneratorType) else ()


def meant(name, value):
    """What `value` means by the documentation: (a plain value,), REFUSED, or None where it does not say."""
    if name == "lr":
        return lr_meant(value)
    if name in ("eps", "weight_decay", "beta1", "beta2"):
        return number_meant(value, 1.0 if name.startswith("beta") else math.inf)
    if name == "betas":
        value = two_of(value)
        if len(value) != 2:
            return REFUSED
        pair = [number_meant(beta, 1.0) for beta in value]
        return REFUSED if REFUSED in pair else ((pair[0][0], pair[1][0]),)
    if name in ("amsgrad", "maximize", "master_weights"):
        return (bool(value),) if isinstance(value, bool | np.bool_) else REFUSED
    if name in CHOICES:
        return (str(value),) if isinstance(value, str) and value in CHOICES[name] else REFUSED
    if name == "seed":
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= value < 2**63
        return (int(value),) if whole else REFUSED
    if name == "max_grad_norm":
        return (None,) if value is None else number_meant(value, None)
    return None  # no hyperparameter of ours


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


def statement(text, keep):
    """The spoiling of a world by the statement `text`, of the second group `g` and the state `e` of its first."""

    def spoil(world):
        mend = keep(world)
        o, p = world.optimizer, world.params
        words = WORDS | {"o": o, "p": p, "g": o.param_groups[1], "e": peek(o).get(p[1])}
        return refusal(lambda: exec(compiled(text, "exec"), words), o, p) or mend

    return spoil


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
    + [f"del g['{key}']" for key in KEYS],
    "step": expressions("""
        o.param_groups[1] = dict(g); o.param_groups.pop(); o.param_groups.reverse(); g["params"].pop();
        g["params"].reverse(); g["params"] = tuple(p[1:]); g["params"] = iter(p[1:]); g["params"] = [];
        g["params"] = [Parameter(torch.ones(2))]; g["new"] = object(); o.defaults.clear(); o.param_groups[:] = [];
        g["params"].append(o.param_groups[0]["params"].pop())
    """),
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
