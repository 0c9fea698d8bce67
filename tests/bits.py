"""What the engine's tests share: comparing to the bit, a small world to step, children that may crash."""

import contextlib
import faulthandler
import io
import os
import signal
import sys
import time
import traceback
import warnings

import torch
from torch.nn import Parameter

import lucid.optim as optim
from lucid import engine

INTEGERS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
SEALED = 12  # steps after which the plan no longer reads the state that nobody else holds


def draw(seed, shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def through_a_file(value):
    """Saved and loaded, as cautiously as torch reads a file."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for x in items if isinstance(x, torch.Tensor | dict | list) for t in tensors_in(x)]


def on(name):
    """The context in which steps run on the engine `name`."""
    return contextlib.nullcontext() if name == "cpu" else engine.only(name)


def canonical(tensor):
    """The bits of `tensor`'s numbers in logical order, every NaN the same: its payload is outside the contract."""
    numbers = tensor.detach().resolve_conj().resolve_neg()
    if numbers.is_complex():
        numbers = torch.view_as_real(numbers)
    numbers = numbers.clone(memory_format=torch.contiguous_format).reshape(-1)
    if numbers.dtype not in INTEGERS:
        return numbers
    patterns = numbers.view(INTEGERS[numbers.dtype])
    patterns[numbers.isnan()] = -1
    return patterns


def same(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(canonical(left), canonical(right))


def peek(optimizer):
    """The state, without the optimizer's noticing that someone has looked."""
    return optimizer._box.peek()


def is_sealed(optimizer):
    """Whether the next step would trust that nobody has touched the state."""
    plan = optimizer._stepper.whole.plan
    return bool(plan and plan._rows.sealed and not optimizer._box.cells[1])


def results(optimizer):
    """What training gives: each parameter in order with its state, as numbers to compare to the bit."""

    def of(key, value):
        return value.view(torch.int16).clone() if key == "residual" else value.clone()  # its bits are no numbers

    state = peek(optimizer)
    return [
        {"param": param.detach().clone()} | {key: of(key, value) for key, value in state.get(param, {}).items()}
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def assert_same(left, right, what=""):
    """Compare what two `results` hold."""
    assert len(left) == len(right)
    for index, (ours, theirs) in enumerate(zip(left, right, strict=True)):
        assert ours.keys() == theirs.keys(), f"{what}: parameter {index}"
        for key in ours:
            if not same(ours[key], theirs[key]):
                a, b = canonical(ours[key]), canonical(theirs[key])
                where = (a != b).nonzero().flatten().tolist() if a.shape == b.shape else "all"
                raise AssertionError(
                    f"{what}: {key} of parameter {index} {tuple(ours[key].shape)} {ours[key].dtype}: other bits "
                    f"at {where[:5]} of {a.numel()}: {ours[key].flatten()[:4]} and {theirs[key].flatten()[:4]}"
                )


def snapshot(optimizer, *more):
    """All that a failed step must leave alone, identities and addresses included, as `==` compares it."""

    def tensor(value):
        if type(value) not in (torch.Tensor, Parameter) or value.layout is not torch.strided or value.is_meta:
            return id(value)
        plain = value.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        numbers = bytes(plain.reshape(-1).view(torch.uint8).numpy())
        return id(value), value.data_ptr(), value.dtype, value.shape, value.stride(), numbers

    def of(value):
        if isinstance(value, torch.Tensor):
            return tensor(value)
        if isinstance(value, dict):
            return id(value), [(id(k) if isinstance(k, torch.Tensor) else k, of(v)) for k, v in value.items()]
        if isinstance(value, list):
            return id(value), [of(item) for item in value]
        return repr(value)

    params = [param for group in optimizer.param_groups for param in group["params"]]
    gradients = [None if param.grad is None else tensor(param.grad) for param in params]
    return of(peek(optimizer)), of(optimizer.param_groups), gradients, [of(m) for m in more]


class World:
    """A few parameters in two groups, their optimizer, and gradients that depend on the step's number only."""

    SHAPES = ((3, 5), (7,), (4, 2, 3), ())

    def __init__(self, dtype=torch.float32, shapes=SHAPES, **options):
        self.dtype = dtype
        self.params = [Parameter(self.draw(index, shape)) for index, shape in enumerate(shapes)]
        half = len(self.params) // 2
        groups = [
            {"params": self.params[:half], "lr": 0.01},
            {"params": self.params[half:], "lr": 0.03, "betas": (0.4, 0.95)},
        ]
        self.optimizer = optim.AdamW(groups, **options)
        self.done = 0

    def draw(self, seed, shape):
        return draw(seed, shape, self.dtype)

    def set_gradients(self):
        for index, param in enumerate(self.params):
            param.grad = self.draw(1000 + 100 * self.done + index, param.shape).to(param.dtype)

    def step(self):
        self.set_gradients()
        self.optimizer.step()
        self.done += 1

    def run(self, steps):
        for _ in range(steps):
            self.step()
        return self


def in_child(act, seconds=40):
    """Run `act` in a forked child; fail with what it wrote, should it raise, crash or hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    faulthandler.cancel_dump_traceback_later()  # a fork would inherit its lock and not its thread
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on: fork beside pytest's own threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            stderr = os.fdopen(2, "w", closefd=False)
            faulthandler.enable(file=stderr)
            faulthandler.dump_traceback_later(seconds * 0.8, file=stderr)
            try:
                act()
                code = 0
            except BaseException:
                traceback.print_exc(file=stderr)
            stderr.flush()
        finally:
            os._exit(code)
    os.close(writing)
    os.set_blocking(reading, False)
    output = b""
    deadline = time.monotonic() + seconds
    status = None
    while status is None and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            output += os.read(reading, 65536)
        done, found = os.waitpid(child, os.WNOHANG)
        status = found if done else None
        time.sleep(0.005)
    hung = status is None
    if hung:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    with contextlib.suppress(BlockingIOError):
        output += os.read(reading, 1 << 20)
    os.close(reading)
    said = output.decode(errors="replace")
    assert not hung, f"the child hung for {seconds} s:\n{said}"
    code = os.waitstatus_to_exitcode(status)
    assert code == 0, f"the child ended with {signal.Signals(-code).name if code < 0 else code}:\n{said}"
