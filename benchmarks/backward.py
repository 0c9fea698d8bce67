"""Time a whole training step with the optimizer stepping in backward beside the ordinary one; count its memory.

python -m benchmarks.backward                        # all of it
python -m benchmarks.backward --quick                # a look: few rounds, not for quoting
python -m benchmarks.backward --case stack-1024      # some of it
python -m benchmarks.backward --markdown docs/step_in_backward.md
"""

from __future__ import annotations

import argparse
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import lucid.optim
from lucid.bench.contenders import LR, WEIGHT_DECAY, MakeOptimizer
from lucid.bench.machine import BUSY, Neighbours

from . import machine
from .arguments import check_page, count, write_page
from .report import Table, markdown, terminal
from .training import TRAININGS, LoopResult, SmallGPT, Training, gpt_loss, time_training

BEGIN = "<!-- measured: written by `python -m benchmarks.backward --markdown`; notes go outside -->"

ORDINARY, IN_BACKWARD = "ordinary", "in backward"

Loss = Callable[[nn.Module], Tensor]


def optimizer_of(params: Iterable[Tensor], *, in_backward: bool) -> lucid.optim.AdamW:
    """Return the optimizer of either contender."""
    optimizer = lucid.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY)
    optimizer.step_in_backward(in_backward)
    return optimizer


# Time


def _stack(width: int, layers: int, batch: int = 8) -> Training:
    """A stack of Linear and ReLU: nothing but matrices of one size."""

    def make_model() -> nn.Module:
        return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())))

    def make_loss() -> Loss:
        x, target = torch.randn(batch, width), torch.randn(batch, width)
        return lambda model: F.mse_loss(model(x), target)

    return Training(f"stack-{width}", make_model, make_loss, iterations=4)


# 1, 8, 67 and 134 MB of float32 weights.
CASES = {case.name: case for case in (_stack(64, 64), _stack(256, 32), _stack(1024, 16), _stack(2048, 8))} | TRAININGS


MAKERS: dict[str, MakeOptimizer] = {
    ORDINARY: functools.partial(optimizer_of, in_backward=False),
    IN_BACKWARD: functools.partial(optimizer_of, in_backward=True),
}


# Memory


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of the tensors made while it is on, of those of them that are gradients, and the most of each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.gradients_now = self.gradients_peak = 0
        self._made: dict[int, bool] = {}  # by storage: whether it is a gradient's

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._made:
                self._made[storage._cdata] = False
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return result

    def note_gradient(self, gradient: Tensor) -> None:
        """Count a tensor that has become a parameter's gradient."""
        storage = gradient.untyped_storage()
        if self._made.get(storage._cdata) is False:
            self._made[storage._cdata] = True
            self.gradients_now += storage.nbytes()
            self.gradients_peak = max(self.gradients_peak, self.gradients_now)

    def _gone(self, storage: int, size: int) -> None:
        self.now -= size
        if self._made.pop(storage):
            self.gradients_now -= size


def _tensors(values: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


class Peak(NamedTuple):
    """The most bytes alive at a time during a training step: in gradients, and in all tensors that it made."""

    gradients: int
    everything: int


def peak(make_model: Callable[[], nn.Module], loss: Loss, *, in_backward: bool) -> Peak:
    """Measure the second training step of a new model: weights and state are there before it."""
    model = make_model()
    alive = Alive()

    def note(param: Tensor) -> None:
        if param.grad is not None:
            alive.note_gradient(param.grad)

    for param in model.parameters():
        # Before the optimizer's hook, which lets the gradient go.
        param.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
    optimizer = optimizer_of(model.parameters(), in_backward=in_backward)

    def train() -> None:
        loss(model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    train()
    with alive:
        train()
    return Peak(alive.gradients_peak, alive.peak)


@dataclass(frozen=True, slots=True)
class MemoryResult:
    """Peaks of one model under both."""

    name: str
    gradients: int  # bytes of all of them
    ordinary: Peak
    in_backward: Peak

    @property
    def saved(self) -> float:
        """By how much the peak of all tensors fell, as a part of all gradients."""
        return (self.ordinary.everything - self.in_backward.everything) / self.gradients


def _gpt(batch: int, context: int) -> tuple[Callable[[], nn.Module], Loss]:
    return (lambda: SmallGPT(layers=12, context=context)), gpt_loss(batch, context)


MEMORY = {
    "memory-gpt-1x4": lambda: _gpt(1, 4),
    "memory-gpt-1x64": lambda: _gpt(1, 64),
    "memory-gpt-8x64": lambda: _gpt(8, 64),
}


def measure_memory(name: str) -> MemoryResult:
    """Measure one case; the two models are alike."""
    make_model, loss = MEMORY[name]()
    gradients = sum(param.nbytes for param in make_model().parameters())
    ordinary, in_backward = (peak(make_model, loss, in_backward=on) for on in (False, True))
    return MemoryResult(name, gradients, ordinary, in_backward)


# The report


def _times(results: Sequence[LoopResult]) -> Table:
    header = ["model", "tensors", "parameters", f"{ORDINARY} ms", f"{IN_BACKWARD} ms", "×", "pairs"]
    rows = []
    for result in results:
        _, gain = result.times(ORDINARY, IN_BACKWARD)
        rows.append(
            [
                result.training,
                f"{result.tensors:,}",
                f"{result.elements / 1e6:.3g} M",
                *(f"{result.milliseconds(name).whole:.2f}" for name in MAKERS),
                f"{gain.median:.3f} ({gain.low:.3f}–{gain.high:.3f})",
                f"{len(result.samples[ORDINARY])}",
            ]
        )
    note = (
        "Time of forward, backward and step. ×: the ordinary step's time divided by the time in backward of the same "
    )
    note += "round, median (quartiles). Above 1, step in backward is faster."
    return Table("Time of a training step", note, header, rows)


def _memory(results: Sequence[MemoryResult]) -> Table:
    header = ["model, batch × tokens", "gradients", f"alive, {ORDINARY}", f"alive, {IN_BACKWARD}"]
    header += [f"all tensors, {ORDINARY}", f"all tensors, {IN_BACKWARD}", "saved"]
    rows = []
    for result in results:
        pairs = zip(result.ordinary, result.in_backward, strict=True)
        sizes = [result.gradients, *(size for pair in pairs for size in pair)]
        rows.append([result.name, *(f"{size / 2**20:.2f}" for size in sizes), f"{result.saved:.0%}"])
    note = (
        "MiB in use at the peak of a training step: by gradients, and by all tensors that the step creates, including "
        "activations. saved: by how much the peak of all tensors fell, as a part of the gradients. If activations take "
        "more memory than gradients, the peak is at the beginning of backward, before gradients exist, and nothing is "
        "saved."
    )
    return Table("Memory", note, header, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backward", description=__doc__.partition("\n")[0])
    names = [*CASES, *MEMORY]
    parser.add_argument("--case", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rounds", type=count, help="pairs (61)")
    parser.add_argument("--quick", action="store_true", help="few rounds: a look, not for quoting")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="put the tables between this file's markers")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    check_page(parser, options.markdown, BEGIN, quick=options.quick)
    wanted: int = options.rounds or (5 if options.quick else 61)

    torch.manual_seed(0)
    described = machine.description()
    neighbours = Neighbours()
    names = list(dict.fromkeys(options.case))
    bar = tqdm([name for name in names if name in CASES], "cases", disable=None)
    times = [time_training(CASES[name], MAKERS, wanted) for name in bar]
    share = neighbours.share()
    memory = [measure_memory(name) for name in names if name in MEMORY]

    if times:
        described["neighbours"] = f"took {share:.1%} of all cores' time meanwhile"
    tables = ([_times(times)] if times else []) + ([_memory(memory)] if memory else [])
    warnings = ["A busy machine: not for quoting."] if times and share > BUSY else []
    print(terminal(described, warnings, tables))
    if options.markdown is not None:
        write_page(options.markdown, markdown(described, warnings, tables, "###"), BEGIN)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
