"""Values that are wrong or odd, written as the expressions that make them, so that a failure can be read."""

import decimal
import enum
import fractions
import functools
import math
import numbers
from types import GeneratorType

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter

import lucid.optim as optim
from bits import peek
from judged import SIGNATURE, OwnError, has_memory, refusal

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
    return list(value) if isinstance(value, tuple | list | GeneratorType) else ()


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
    if name == "spike_threshold":
        found = (None,) if value is None else number_meant(value, None)
        return REFUSED if found == (math.inf,) else found
    return None  # no hyperparameter of ours


# Groups between steps


def statement(text, keep):
    """The spoiling of a world by the statement `text`, of the second group `g` and the state `e` of its first."""

    def spoil(world):
        mend = keep(world)
        o, p = world.optimizer, world.params
        words = WORDS | {"o": o, "p": p, "g": o.param_groups[1], "e": peek(o).get(p[1])}
        return refusal(lambda: exec(compiled(text, "exec"), words), o, p) or mend

    return spoil
