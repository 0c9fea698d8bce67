"""Generated bad calls to an optimizer, and how each is judged: refused in words with nothing changed, or done right.

A trial has an optimizer and a twin on the reference engine. A bad call ends in an exception that says what is wrong,
with everything bit for bit what it was, or in the step that the twin takes. After a refusal the input is mended, and
the next step is that of an optimizer that never saw the bad call.
"""

import copy
import ctypes
import functools
import inspect
import re
import types
import warnings

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lucid.optim as optim
from bits import SEALED, World, assert_same, on, peek, results
from lucid.optim.state_box import StateBox
from quick import examples

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


def generated(what, begun, calls):
    """Make of a check of one call the test of as many as `what` asks for. `begun` draws what a batch starts from."""

    def decorate(check):
        def test():
            made = 0

            @settings(
                max_examples=examples(-(-CALLS[what] // BATCH)),
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

            with warnings.catch_warnings():
                for text in EXPECTED:
                    warnings.filterwarnings("ignore", f".*{text}")
                run()
            assert made >= examples(CALLS[what])

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
        with warnings.catch_warnings():
            for told in ("the optimizer keeps the key", ".* is an option of the whole optimizer"):  # are no refusals
                warnings.filterwarnings("ignore", f"param_groups: {told}", UserWarning)
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
        return results(types.SimpleNamespace(param_groups=[{"params": params}], _box=StateBox(state)))


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
