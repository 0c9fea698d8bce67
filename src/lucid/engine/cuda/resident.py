"""What of a plan lies on one device: the tables of its rows, and the launches that work on them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lucid.engine.observed import Observed
from lucid.engine.scalars import MAX_STEP, Decision, Recipe, Scalars, powers

from . import launch
from .launch import Launcher
from .table import CHUNK, Rows, Segments, Table, cut

SET = 16  # words of a set of scalars, and of what comes before the first
COUNT = 9  # which of them is the step count
_TOGETHER = 8  # chunks whose squares a program sums up side by side


class Launch(NamedTuple):
    """A kernel, ready to be launched."""

    prepared: Any
    programs: int
    args: tuple[Any, ...]
    kind: tuple[Any, ...]


class Measuring(NamedTuple):
    """How gradients are measured: the launches, and where the sums of rows come to lie, float64[3, rows]."""

    launches: list[Launch]
    row_sums: Tensor


class Resident:
    """A plan's rows on one device and stream.

    ``captured``: what is launched is captured, to be run again and again, so that what it copies has to stay.
    """

    def __init__(self, launcher: Launcher, device: tuple[int, int], rows: Rows, *, captured: bool = False) -> None:
        self.launcher, self.device, self.rows = launcher, device, rows
        self._held: list[Tensor] | None = [] if captured else None
        self._count = max(1, len(rows.rows))
        self._updates = rows.launches(device, launcher.geometry)
        programs = (each.programs.packed for each in self._updates)
        self._table, self._layouts, *self._programs = self._put([rows.table, rows.layouts, *programs])
        # Gradients, sets of scalars and streams of the rows; which take part; how their sums are summed up.
        self._most_totals = -(-self._count // CHUNK)
        self._order_at = _aligned(3 * self._count)
        self._segments_at = self._order_at + _aligned(self._count)
        self._now = launcher.empty(self._segments_at + 3 * self._most_totals)
        self._version = -1
        self._totals = 0
        self._scalars = self._config = launcher.empty(0)
        self._update_launches: dict[bool, list[Launch]] = {}  # by whether they observe
        self._measuring: Measuring | None = None
        self._buffers: list[Tensor] = []  # of what is observed, float64[programs, tiles, 4] of each launch
        self._observed: list[Observed] = []
        self._told: list[Tensor] = []

    # To the device

    def _write(self, target: Tensor, array: NDArray[np.int64]) -> Tensor:
        staged = self.launcher.staging(array.size)
        staged.numpy()[:] = array
        self.launcher.upload(target[: array.size], staged)
        if self._held is not None:
            self._held.append(staged)
        return staged

    def _put(self, arrays: Sequence[Table]) -> list[Tensor]:
        """Return the arrays on the device, by one copy."""
        sizes = [_aligned(array.size) for array in arrays]
        ends = np.cumsum(sizes).tolist()
        joined = np.zeros(ends[-1], np.int64)
        for array, size, end in zip(arrays, sizes, ends, strict=True):
            joined[end - size : end - size + array.size] = array.reshape(-1)
        target = self.launcher.empty(joined.size)
        self._write(target, joined)
        return [target[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def refresh(self, step: Table, version: int) -> None:
        """Let the device have what `Plan.write_device_step` gives for this step, unless it has this version of it."""
        if version == self._version:
            return
        active = np.flatnonzero(step[0])
        segments, parts, _ = cut(np.array([len(active)]), np.array([0]))
        self._totals = int(parts[0])
        stacked = _stacked(segments)
        now = np.zeros(self._segments_at + stacked.size, np.int64)
        now[: step.size] = step.reshape(-1)
        now[self._order_at : self._order_at + len(active)] = active
        now[self._segments_at :] = stacked
        self._write(self._now, now)
        self._version = version

    def active(self, step: Table) -> list[int]:
        """Return the places in the table of the rows on this device that take part in a step."""
        rows = self.rows.rows
        places = np.flatnonzero(step[0]).tolist()
        return [place for place in places if (rows[place].device_type, rows[place].device_index) == self.device]

    def _prepared(self, kernel: Any, programs: int, args: tuple[Any, ...], kind: tuple[Any, ...], warps: int) -> Launch:
        return Launch(self.launcher.prepare(kernel, args, kind, warps), programs, args, kind)

    # Scalars

    def _make_room(self, sets: int) -> None:
        size = (1 + sets) * SET
        if len(self._scalars) < size:
            self._scalars, self._config = self.launcher.empty(size), self.launcher.empty(size)
            self._update_launches.clear()

    def set_scalars(self, scalars: Sequence[Scalars], steps: Sequence[float]) -> None:
        """Let the device have the scalars of a step that the host has decided."""
        self._make_room(len(scalars))
        table = np.zeros((1 + len(scalars), SET), np.float64)
        for row, each, step in zip(table[1:], scalars, steps, strict=True):
            row[:COUNT] = each
            row[COUNT] = step
        self._write(self._scalars, table.reshape(-1).view(np.int64))

    def decide(self, decision: Decision, recipes: Sequence[Recipe], kept: Tensor) -> tuple[list[Launch], Tensor]:
        """Return the launches that decide and make the scalars; and where the host has what the device is told."""
        self._make_room(len(recipes))
        config = np.zeros((1 + len(recipes), SET), np.int64)
        numbers = config.view(np.float64)  # as the kernel has them, word by word
        self._told = []  # until the kernel has read it
        config[0, 0:2] = len(recipes), self._totals
        numbers[0, 2] = np.inf if decision.max_norm is None else decision.max_norm
        config[0, 3] = decision.skips
        if isinstance(decision.scale, Tensor):
            config[0, 5:7] = self._tell(decision.scale)
        else:
            numbers[0, 4] = decision.scale
        if decision.found_inf is not None:
            found_inf = decision.found_inf
            config[0, 7], _ = self._tell(found_inf if found_inf.dtype == torch.float32 else (found_inf != 0).float())
        config[0, 8] = decision.captured
        for row, words, recipe in zip(numbers[1:], config[1:], recipes, strict=True):
            row[:4] = recipe.beta1, 1.0 - recipe.beta1, recipe.beta2, 1.0 - recipe.beta2
            if isinstance(recipe.lr, Tensor):
                words[7:9] = self._tell(recipe.lr)
            else:
                row[4] = recipe.lr
            row[5:7] = recipe.weight_decay, -1.0 if recipe.maximize else 1.0
            row[COUNT] = recipe.step
            for at, beta in ((10, recipe.beta1), (12, recipe.beta2)):
                if self._held is not None:
                    table = _powers_on_host(beta, self.launcher)
                    self._held.append(table)
                else:  # which comes no further than the host's count
                    table = _powers(beta, _most_steps(recipe.step), self.launcher, self.launcher.stream())
                    self._told.append(table)
                words[at : at + 2] = table.data_ptr(), len(table)
            row[14] = recipe.eps
        staged = self._write(self._config, config.reshape(-1))
        launches = []
        sums = self._scalars
        if decision.measures:
            row_sums = self.measuring().row_sums
            sums = self._total_sums
            order, segments = self._now[self._order_at :], self._now[self._segments_at :]
            args = (row_sums, sums, segments, order, self._count, self._most_totals)
            launches.append(self._prepared(launch.sum_up, self._totals, args, (True,), 1))
        told = (self._config, kept, _floats(sums), _floats(self._scalars), self._most_totals)
        launches.append(self._prepared(launch.decide, 1, told, (decision.measures,), 1))
        return launches, staged

    def _tell(self, value: Tensor) -> tuple[int, bool]:
        """The address of a number on the device, of a type that the kernel reads, and whether it is a float64."""
        number = value.detach()
        if number.dtype not in (torch.float32, torch.float64):
            number = number.double()
        self._told.append(number)
        return number.data_ptr(), number.dtype == torch.float64

    # Updating

    def updates(self, *, observe: bool) -> list[Launch]:
        """Return the launches that update all rows."""
        if observe and not self._buffers:
            sizes = [4 * each.geometry.tiles * len(each.programs.rows) for each in self._updates]
            self._buffers = [_floats(self.launcher.empty(size).zero_()) for size in sizes]
        if observe:
            self._observed = []
        if observe not in self._update_launches:
            scalars = _floats(self._scalars)
            found = []
            for number, (each, programs) in enumerate(zip(self._updates, self._programs, strict=True)):
                tile, tiles, warps = each.geometry
                observed = self._buffers[number] if observe else scalars
                args = (self._table, self._now, scalars, programs, self._layouts, observed, self._count)
                kind = (*each.kind, observe, tile, tiles)
                found.append(self._prepared(launch.update, len(each.programs.rows), args, kind, warps))
            self._update_launches[observe] = found
        return self._update_launches[observe]

    def observed(self) -> list[Observed]:
        """Return what the last observed step of each row was like, by place in the table; waits for the device."""
        if not self._observed:
            sums = np.zeros((self._count, 4), np.float64)
            for each, buffer in zip(self._updates, self._buffers, strict=True):
                found = buffer.view(-1, 4).cpu().numpy()
                rows = each.programs.rows.repeat(each.geometry.tiles)
                with np.errstate(invalid="ignore"):
                    np.add.at(sums[:, :3], rows, found[:, :3])
                    np.maximum.at(sums[:, 3], rows, found[:, 3])
            self._observed = [Observed(*row) for row in sums.tolist()]
        return self._observed

    # Measuring

    def measuring(self) -> Measuring:
        """Return how the squares of rows' gradients are summed up, in the order that all engines keep."""
        if self._measuring is None:
            self._measuring = self._new_measuring()
        return self._measuring

    def _new_measuring(self) -> Measuring:
        kinds, counts = self.rows.squares(self.device, _TOGETHER)
        begins = np.cumsum(counts) - counts
        sizes, levels = [int(counts.sum())], []
        while True:
            segments, parts, starts = cut(counts, begins)
            if parts.max(initial=0) <= 1:  # what comes out is one sum of each row that has elements
                levels.append(segments._replace(to=np.flatnonzero(parts)))
                break
            levels.append(segments)
            sizes.append(int(parts.sum()))
            counts, begins = parts, starts
        sizes = [max(1, size) for size in (*sizes, self._count)]
        programs = (np.concatenate([own.packed, to]) for _, own, to in kinds)
        tables = self._put([*programs, *(_stacked(level) for level in levels)])
        sums = [_floats(self.launcher.empty(3 * size).zero_()) for size in sizes]
        self._total_sums = _floats(self.launcher.empty(3 * self._most_totals).zero_())
        launches = []
        for (kind, own, _), table in zip(kinds, tables, strict=False):
            args = (self._table, self._now, table, self._layouts, sums[0], self._count, sizes[0])
            launches.append(self._prepared(launch.squares, len(own.rows), args, (*kind, _TOGETHER), 1))
        for level, (segments, table) in enumerate(zip(levels, tables[len(kinds) :], strict=True)):
            level_args = (sums[level], sums[level + 1], table, self._now, sizes[level], sizes[level + 1])
            if len(segments.begin):
                launches.append(self._prepared(launch.sum_up, len(segments.begin), level_args, (False,), 1))
        return Measuring(launches, sums[-1])


def _floats(words: Tensor) -> Tensor:
    return words.view(torch.float64)


def _stacked(segments: Segments) -> Table:
    return np.concatenate([segments.begin, segments.length, segments.to])


def _aligned(words: int) -> int:
    """So many and as few more as keep what comes next at a multiple of 128 bytes."""
    return -(-words // 16) * 16


def _most_steps(count: float) -> int:
    """How many steps a table is for that has to have `count`: few different numbers."""
    return max(4096, 1 << int(count).bit_length())


# One that is no longer kept is freed in the order of its stream, behind the kernels that read it.
@functools.lru_cache(maxsize=256)
def _powers(beta: float, steps: int, launcher: Launcher, stream: int) -> Tensor:
    """1 - beta^t for t = 0, 1, ... until it is 1, on the device, for steps on one stream."""
    values = powers(beta, steps)
    staged = launcher.staging(len(values))
    _floats(staged).numpy()[:] = values
    table = launcher.empty(len(values))
    launcher.upload(table, staged)
    return _floats(table)


def _powers_on_host(beta: float, launcher: Launcher) -> Tensor:
    """The same of all steps that can be counted, for captured ones, in memory of the host that the device can read."""
    values = powers(beta, MAX_STEP)
    staged = _floats(launcher.staging(len(values)))
    staged.numpy()[:] = values
    return staged
