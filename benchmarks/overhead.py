"""Where the time of a step over many small tensors goes, in ns a tensor.

A step's calls of the engine are timed by wrapping them, so this knows where an optimizer keeps its
rows, and nothing of how a step is put together.

    python -m benchmarks.overhead
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import lucid.optim
from lucid.bench.shapes import CASES, Case

from .tables import terminal_table

REPEATS = 61


class Cost(NamedTuple):
    """One line of the account."""

    what: str
    nanoseconds: float  # a tensor, median


def account(case: Case) -> list[Cost]:
    """Return the whole step, its stages, and for comparison what each access costs from Python."""
    count = len(case.shapes)
    params = [_with_gradient(shape) for shape in case.shapes]
    optimizer = _stepped(params)
    seconds = {
        "whole step": _median(optimizer.step),
        **_stages(optimizer),
        "(kernel: as many elements in one tensor)": _median(_stepped([_with_gradient((case.elements,))]).step),
        **_accesses(params, optimizer),
    }
    return [Cost(what, 1e9 * each / count) for what, each in seconds.items()]


def _with_gradient(shape: tuple[int, ...]) -> Tensor:
    param = torch.randn(shape).requires_grad_()
    param.grad = torch.randn(shape)
    return param


def _stepped(params: list[Tensor]) -> lucid.optim.AdamW:
    optimizer = lucid.optim.AdamW(params, lr=1e-4)
    for _ in range(3):
        optimizer.step()
    return optimizer


def _median(run: Callable[[], object]) -> float:
    samples = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)


class _Clock:
    """Seconds spent in named calls, added up for each step."""

    def __init__(self) -> None:
        self.steps: list[defaultdict[str, float]] = []

    def timed(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.steps[-1][what] += time.perf_counter() - started

        return run


class _TimedRows:
    """The CPU engine's rows, their calls timed."""

    def __init__(self, rows: object, clock: _Clock) -> None:
        self._rows, self._clock = rows, clock

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._rows, name)
        return self._clock.timed(f"  rows.{name}", member) if callable(member) else member


def _stages(optimizer: lucid.optim.AdamW) -> dict[str, float]:
    """Return the medians of what a step spends in the engine's calls, and beside them."""
    plan = optimizer._stepper.whole.plan
    assert plan is not None
    clock = _Clock()
    step = clock.timed("whole", optimizer.step)
    graph = torch.autograd.graph
    timed = _TimedRows(plan._rows, clock)
    increment = clock.timed("  increment_version", graph.increment_version)
    with (
        mock.patch.object(plan, "_rows", timed),
        mock.patch.object(plan._cpu, "_rows", timed),
        mock.patch.object(graph, "increment_version", increment),
    ):
        for _ in range(REPEATS):
            clock.steps.append(defaultdict(float))
            step()
    stages = [name for name in clock.steps[0] if name != "whole"]
    for taken in clock.steps:
        taken["  the rest"] = taken["whole"] - sum(taken[name] for name in stages)
    return {name: statistics.median(taken[name] for taken in clock.steps) for name in (*stages, "  the rest")}


def _accesses(params: list[Tensor], optimizer: lucid.optim.AdamW) -> dict[str, float]:
    state = optimizer.state

    def loop() -> None:
        for _ in params:
            pass

    def grad() -> None:
        for p in params:
            p.grad  # noqa: B018

    def data_ptr() -> None:
        for p in params:
            p.data_ptr()

    def look_up() -> None:
        for p in params:
            state[p]

    def state_addresses() -> None:
        for entry in state.values():
            for slot in entry.values():
                slot.data_ptr()

    def versions() -> None:
        torch.autograd.graph.increment_version(params)

    empty = _median(loop)
    return {
        "(Python: p.grad)": _median(grad) - empty,
        "(Python: p.data_ptr())": _median(data_ptr) - empty,
        "(Python: state[p])": _median(look_up) - empty,
        "(Python: data_ptr() of its 3 state tensors)": _median(state_addresses),
        "(Python: increment_version(params))": _median(versions),
    }


def accounts() -> dict[str, list[Cost]]:
    """Return the account of each case of many small tensors."""
    return {name: account(CASES[name]) for name in ("1000x64", "10000x64")}


def rows(accounts: dict[str, list[Cost]]) -> list[list[str]]:
    """Return a table's rows: what, then ns a tensor in each case."""
    columns = list(accounts.values())
    return [
        [line[0].what.replace("  ", "– "), *(f"{cost.nanoseconds:,.0f}" for cost in line)]
        for line in zip(*columns, strict=True)
    ]


if __name__ == "__main__":
    found = accounts()
    print(terminal_table(["ns a tensor", *found], rows(found)))
