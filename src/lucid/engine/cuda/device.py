"""A plan's rows on GPUs: what is uploaded, launched and read back in a step.

A step uploads what is not as it was and launches: it never waits for the device. What becomes of a step may be decided
there (`Decision`): then the host's step counts are a guess, that all steps are taken, until `DevicePlan.settle`.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lucid.engine.observed import Observed
from lucid.engine.scalars import Decision, Recipe, Scalars, powers

from . import launch
from .launch import Launcher, launcher_for
from .table import CHUNK, Rows, Segments, Table, cut

if TYPE_CHECKING:
    from lucid.engine import _cpu

_SET = 16  # words of a set of scalars, and of what comes before the first
_TOGETHER = 8  # chunks of squares in a program
_DRIFT, _SKIPPED, _NORM, _SCALE, _KEPT = range(5)  # words that stay on the device, and how many


class Unread:
    """What a row's step was like: on the device until someone looks."""

    __slots__ = ("_place", "_tables")

    def __init__(self, tables: _Tables, place: int) -> None:
        self._tables, self._place = tables, place

    def __iter__(self) -> Iterator[float]:
        return iter(self._tables.observed()[self._place])


class _Launch(NamedTuple):
    prepared: Any
    programs: int
    args: tuple[Any, ...]
    kind: tuple[Any, ...]


class _Measuring(NamedTuple):
    """How gradients are measured: the launches, and where the sums of rows come to lie, float64[3, rows]."""

    launches: list[_Launch]
    row_sums: Tensor


class _Tables:
    """The tables of a plan's rows on one device and stream, and what is launched with them.

    ``captured``: they are read again each time that a captured step is run, so that nothing of theirs may move.
    """

    def __init__(self, launcher: Launcher, device: tuple[int, int], rows: Rows, *, captured: bool = False) -> None:
        self.launcher, self.rows = launcher, rows
        self.stream = launcher.stream()
        self._device = device
        self._held: list[Tensor] | None = [] if captured else None
        self._count = max(1, len(rows.rows))
        self._updates = rows.launches(device, launcher.geometry)
        self._table, self._layouts, *self._programs = self._put(
            [rows.table, rows.layouts, *(each.programs.packed for each in self._updates)]
        )
        self._most_totals = -(-self._count // CHUNK)
        # Gradients, sets of scalars and streams of rows; which rows take part; how their sums are summed up.
        self._now = launcher.empty(4 * self._count + 3 * self._most_totals)
        self._version = -1
        self._totals = 0
        self._scalars = launcher.empty(0).view(torch.float64)
        self._config = launcher.empty(0)
        self._launches: dict[bool, list[_Launch]] = {}
        self._measuring: _Measuring | None = None
        self._buffers: list[Tensor] = []  # of what is observed, float64[programs, tiles, 4] of each launch
        self._observed: dict[int, Observed] = {}
        self._total_sums = self._scalars

    def _put(self, arrays: Sequence[Table]) -> list[Tensor]:
        """Return the arrays on the device, by one copy."""
        sizes = [-(-array.size // 16) * 16 for array in arrays]
        target = self.launcher.empty(sum(sizes))
        joined = np.zeros(sum(sizes), np.int64)
        begins = np.cumsum(sizes) - sizes
        for array, begin in zip(arrays, begins, strict=True):
            joined[begin : begin + array.size] = array.reshape(-1)
        self._write(target, joined)
        return [target[begin : begin + array.size] for array, begin in zip(arrays, begins, strict=True)]

    def _write(self, target: Tensor, array: Table) -> Tensor:
        staged = self.launcher.staging(array.size)
        staged.numpy()[:] = array
        self.launcher.upload(target[: array.size], staged)
        if self._held is not None:
            self._held.append(staged)
        return staged

    def active(self, step: Table) -> list[int]:
        """Return the places in the table of the rows on this device that take part in a step."""
        rows = self.rows.rows
        return [
            place
            for place in np.flatnonzero(step[0]).tolist()
            if (rows[place].device_type, rows[place].device_index) == self._device
        ]

    def refresh(self, step: Table, version: int) -> None:
        """Let the device have what is new in this step of its rows, unless it has it."""
        if version == self._version:
            return
        active = np.flatnonzero(step[0])
        order = np.zeros(self._count, np.int64)
        order[: len(active)] = active
        segments, parts, _ = cut(np.array([len(active)]), np.array([0]))
        self._totals = int(parts[0])
        self._write(self._now, np.concatenate([step.reshape(-1), order, _stacked(segments).reshape(-1)]))
        self._version = version

    def _prepared(
        self, kernel: Any, programs: int, args: tuple[Any, ...], kind: tuple[Any, ...], warps: int = 1
    ) -> _Launch:
        return _Launch(self.launcher.prepare(kernel, args, kind, warps), programs, args, kind)

    # Scalars

    def _make_room(self, sets: int) -> None:
        size = (1 + sets) * _SET
        if len(self._scalars) < size:
            self._scalars = self.launcher.empty(size).view(torch.float64)
            self._config = self.launcher.empty(size)
            self._launches.clear()

    def set_scalars(self, scalars: Sequence[Scalars], steps: Sequence[float]) -> None:
        """Let the device have the scalars of a step that the host has decided."""
        self._make_room(len(scalars))
        table = np.zeros((1 + len(scalars), _SET), np.float64)
        for number, (each, step) in enumerate(zip(scalars, steps, strict=True), 1):
            table[number, : len(each)] = each
            table[number, len(each)] = step
        self._write(self._scalars.view(torch.int64), table.reshape(-1).view(np.int64))

    def decide(self, decision: Decision, recipes: Sequence[Recipe], kept: Tensor) -> tuple[list[_Launch], Tensor]:
        """Return the launches that decide and make the scalars; where the host has what they are told."""
        self._make_room(len(recipes))
        config = np.zeros((1 + len(recipes), _SET), np.int64)
        floats = config.view(np.float64)
        measures = decision.measures
        config[0, :2] = len(recipes), self._totals
        floats[0, 2] = np.inf if decision.max_norm is None else decision.max_norm
        config[0, 3] = decision.skips
        floats[0, 7] = 1.0
        told = [value for value in (decision.scale, decision.found_inf) if isinstance(value, Tensor)]
        told = [value if value.dtype == torch.float32 else value.float() for value in told]
        if isinstance(decision.scale, Tensor):
            config[0, 4] = told[0].data_ptr()
        else:
            floats[0, 7] = decision.scale
        if decision.found_inf is not None:
            config[0, 5] = told[-1].data_ptr()
        config[0, 6] = decision.captured
        for number, recipe in enumerate(recipes, 1):
            floats[number, :4] = recipe.beta1, 1.0 - recipe.beta1, recipe.beta2, 1.0 - recipe.beta2
            if isinstance(recipe.lr, Tensor):
                config[number, 7:9] = recipe.lr.data_ptr(), recipe.lr.dtype == torch.float64
            else:
                floats[number, 4] = recipe.lr
            floats[number, 5:7] = recipe.weight_decay, -1.0 if recipe.maximize else 1.0
            floats[number, 9] = recipe.step
            for at, beta in ((10, recipe.beta1), (12, recipe.beta2)):
                table = _powers(beta, self.launcher)
                config[number, at : at + 2] = table.data_ptr(), len(table)
            floats[number, 14] = recipe.eps
        staged = self._write(self._config, config.reshape(-1))
        measuring = self.measuring() if measures else None
        launches = []
        sums = self._scalars
        if measuring is not None:
            sums = self._total_sums
            segments = self._now[4 * self._count :]
            order = self._now[3 * self._count :]
            args = (measuring.row_sums, sums, segments, order, self._count, self._most_totals)
            launches.append(self._prepared(launch.sum_up, self._totals, args, (True,)))
        self._told = told  # until the kernel has read it, so at least to the next step
        args = (self._config, kept, sums, self._scalars, self._most_totals)
        launches.append(self._prepared(launch.decide, 1, args, (measures,)))
        return launches, staged

    # Updating

    def updates(self, observe: bool) -> list[_Launch]:
        """Return the launches that update all rows."""
        if observe and not self._buffers:
            sizes = [4 * each.geometry.tiles * len(each.programs.rows) for each in self._updates]
            self._buffers = [self.launcher.empty(size).zero_().view(torch.float64) for size in sizes]
        if observe:
            self._observed = {}
        if observe not in self._launches:
            found = []
            for number, (each, programs) in enumerate(zip(self._updates, self._programs, strict=True)):
                observed = self._buffers[number] if observe else self._scalars
                args = (self._table, self._now, self._scalars, programs, self._layouts, observed, self._count)
                tile, tiles, warps = each.geometry
                kind = (*each.kind, observe, tile, tiles)
                found.append(self._prepared(launch.update, len(each.programs.rows), args, kind, warps))
            self._launches[observe] = found
        return self._launches[observe]

    def observed(self) -> dict[int, Observed]:
        """Return what the last observed step was like, by place in the table; this waits for the device."""
        if not self._observed:
            sums = np.zeros((self._count, 4), np.float64)
            for each, buffer in zip(self._updates, self._buffers, strict=True):
                found = buffer.view(-1, 4).cpu().numpy()
                rows = each.programs.rows.repeat(each.geometry.tiles)
                np.add.at(sums[:, :3], rows, found[:, :3])
                np.maximum.at(sums[:, 3], rows, found[:, 3])
            self._observed = {place: Observed(*row) for place, row in enumerate(sums.tolist())}
        return self._observed

    # Measuring

    def measuring(self) -> _Measuring:
        """Return how the squares of rows' gradients are summed up."""
        if self._measuring is not None:
            return self._measuring
        kinds, counts = self.rows.squares(self._device, _TOGETHER)
        begins = np.cumsum(counts) - counts
        sizes, levels = [int(counts.sum())], []
        while True:
            segments, parts, starts = cut(counts, begins)
            if parts.max(initial=0) <= 1:
                levels.append(segments._replace(to=np.flatnonzero(parts)))
                break
            levels.append(segments)
            counts, begins = parts, starts
            sizes.append(int(parts.sum()))
        sizes = [max(1, size) for size in (*sizes, self._count)]
        tables = self._put(
            [*(np.stack([own.packed, to]) for _, own, to in kinds), *(_stacked(level) for level in levels)]
        )
        sums = [self.launcher.empty(3 * size).zero_().view(torch.float64) for size in sizes]
        launches = []
        for (kind, own, _), table in zip(kinds, tables, strict=False):
            args = (self._table, self._now, table, self._layouts, sums[0], self._count, sizes[0])
            launches.append(self._prepared(launch.squares, len(own.rows), args, (*kind, _TOGETHER)))
        for level, (segments, table) in enumerate(zip(levels, tables[len(kinds) :], strict=True)):
            args = (sums[level], sums[level + 1], table, self._now, sizes[level], sizes[level + 1])
            if len(segments.begin):
                launches.append(self._prepared(launch.sum_up, len(segments.begin), args, (False,)))
        self._total_sums = self.launcher.empty(3 * self._most_totals).zero_().view(torch.float64)
        self._measuring = _Measuring(launches, sums[-1])
        return self._measuring


class _Captured(NamedTuple):
    """A captured step: its tables, what the host tells it each time it is run, and a step count of each set in that."""

    tables: _Tables
    config: Tensor
    counts: list[Tensor]

    def keep_up(self) -> None:
        """Let it count on from where the host's step counts are."""
        words = self.config.view(torch.float64)
        for number, count in enumerate(self.counts, 1):
            words[number * _SET + 9] = count.item() + 1


class DevicePlan:
    """The rows of a plan that are on GPUs."""

    def __init__(self, native: _cpu.Plan) -> None:
        self._native = native
        self._rows: Rows | None = None
        self._step: Table = np.zeros((3, 0), np.int64)
        self._version = 0
        self._tables: dict[tuple[int, int], _Tables] = {}
        self._kept: Tensor | None = None
        self._captured: list[_Captured] = []
        self._launches: list[tuple[Launcher, list[_Launch]]] = []
        self._seen: list[tuple[int, Unread]] = []
        self.guessing = False  # whether the host's step counts are a guess

    @property
    def captured(self) -> bool:
        """Whether steps have been captured, which may have been run since."""
        return bool(self._captured)

    def _current(self, *, captured: bool = False) -> list[_Tables]:
        """The tables of each device, as this step needs them."""
        native = self._native
        rows = self._rows
        if rows is None or rows.structure != native.device_structure or rows.serial != native.serial:
            rows = self._rows = Rows(native)
            self._tables.clear()
            self._step = np.zeros((3, max(1, len(rows.rows))), np.int64)
            self._version += 1
        self._version += native.write_device_step(self._step.ctypes.data)
        found = []
        for device in rows.devices:
            launcher = launcher_for(device)
            with launcher.current():
                tables = self._tables.get(device)
                if captured:
                    tables = _Tables(launcher, device, rows, captured=True)
                elif tables is None or tables.stream != launcher.stream():
                    tables = self._tables[device] = _Tables(launcher, device, rows)
                tables.refresh(self._step, self._version)
            found.append(tables)
        return found

    def squares(self) -> list[tuple[int, float]]:
        """Return (row number, sum of the squares of its gradient) for the rows of this step; waits for the device."""
        found = []
        for tables in self._current():
            with tables.launcher.current():
                measuring = tables.measuring()
                _run(tables.launcher, measuring.launches)
                sums = measuring.row_sums[: len(tables.rows.rows)].tolist()
            found += [(tables.rows.rows[place].row, sums[place]) for place in tables.active(self._step)]
        return found

    def prepare(self, recipes: Sequence[Recipe], verdict: float | Decision, *, observe: bool) -> None:
        """Upload and compile what `run` launches: what can go wrong does so here."""
        captured = isinstance(verdict, Decision) and verdict.captured
        self._launches, self._seen = [], []
        for tables in self._current(captured=captured):
            with tables.launcher.current():
                launches: list[_Launch] = []
                if isinstance(verdict, Decision):
                    launches = self._deciding(tables, recipes, verdict)
                else:
                    tables.set_scalars([recipe.scalars(verdict) for recipe in recipes], [each.step for each in recipes])
                launches += tables.updates(observe)
            self._launches.append((tables.launcher, launches))
            if observe:
                rows = tables.rows.rows
                self._seen += [(rows[place].row, Unread(tables, place)) for place in tables.active(self._step)]

    def _deciding(self, tables: _Tables, recipes: Sequence[Recipe], decision: Decision) -> list[_Launch]:
        if self._kept is None:
            self._kept = tables.launcher.empty(_KEPT).zero_()
        launches = list(tables.measuring().launches) if decision.measures else []
        own, config = tables.decide(decision, recipes, self._kept)
        if decision.captured:
            groups = {}
            for group, count in self._native.step_counts():
                groups.setdefault((group, count.item() + 1), count)
            counts = [groups[recipe.group, recipe.step] for recipe in recipes]
            self._captured.append(_Captured(tables, config, counts))
        return launches + own

    def run(self, *, counted: bool) -> list[tuple[int, Unread]]:
        """Launch what was prepared, all of it; return what rows' steps are like, if that is observed.

        ``counted``: whether the host has counted the step, which it does not while one is captured.
        """
        launches, self._launches = self._launches, []
        with _uninterrupted():
            for launcher, each in launches:
                with launcher.current():
                    _run(launcher, each)
        if counted:
            self.keep_up()
        return self._seen

    def guess(self) -> bool:
        """Take the step counts of this step's rows for a guess; False where those of other rows are one already."""
        self.guessing = bool(self._native.guess()) or self.guessing
        return bool(self._native.guess())

    def settle(self) -> int:
        """Make the host's step counts right, waiting for the device; return how many steps it has left out."""
        if not self.guessing or self._kept is None:
            return 0
        drift, skipped = self._kept[: _SKIPPED + 1].tolist()
        self._native.settle(drift, keep=self.captured)
        self._kept[: _SKIPPED + 1].zero_()
        self.guessing = self.captured
        self.keep_up()
        return int(skipped)

    def keep_up(self) -> None:
        """Let captured steps count on from where the host's step counts are."""
        for each in self._captured:
            each.keep_up()

    def decided(self) -> tuple[Tensor, Tensor]:
        """Return the norm of all gradients and their scale, on the device, of the last step that decided there."""
        assert self._kept is not None
        words = self._kept.view(torch.float64)
        return words[_NORM], words[_SCALE]


def _stacked(segments: Segments) -> Table:
    return np.stack([segments.begin, segments.count, segments.to])


def _run(launcher: Launcher, launches: Sequence[_Launch]) -> None:
    for each in launches:
        launcher.launch(each.prepared, each.programs, each.args, each.kind)


@functools.cache
def _powers(beta: float, launcher: Launcher) -> Tensor:
    """1 - beta^t for t = 0, 1, ... until it is 1, where the device can read it."""
    values = powers(beta)
    staged = launcher.staging(len(values)).view(torch.float64)
    staged.numpy()[:] = values
    return staged


# Without signal's own conversion of numbers to enumerations and back, which takes longer than a launch.
_handler_of = getattr(signal.getsignal, "__wrapped__", signal.getsignal)
_handle = getattr(signal.signal, "__wrapped__", signal.signal)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Keep Ctrl-C for afterwards: between two launches it would leave a step half taken."""
    before = _handler_of(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[int] = []
    _handle(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        _handle(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)
