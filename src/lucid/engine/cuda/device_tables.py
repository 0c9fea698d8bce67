"""The tables of a plan's rows on one device, and the kernel launches that use them."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lucid.engine.exact_sum import TOTAL_WORDS
from lucid.engine.numbers import COPIES, PADDED, SET, Scalar, Told, ToldOfSet
from lucid.engine.observed import Observed
from lucid.engine.scalars import MAX_STEP, Recipe, ScalarTable, powers
from lucid.engine.spikes import ToldMemory
from lucid.engine.verdict import DeviceVerdict

from . import launch
from .launch import Launcher
from .row_table import RowTable, Table

_ROOM = 8  # for sets of scalars, at least


class Launch(NamedTuple):
    """A kernel that is ready for launch: what `launch.Launcher.launch` takes."""

    prepared: Any
    programs: int
    args: tuple[Any, ...]
    kind: tuple[Any, ...]


class Deciding(NamedTuple):
    """The launches before the update of a step that the device decides, and the host memory with their input.

    ``measuring``: what writes `DeviceTables.words`. ``decide``: what reads them, after processes have exchanged them.
    """

    measuring: list[Launch]
    decide: Launch
    config: Tensor


class DeviceTables:
    """A plan's rows on one device and stream.

    ``captured``: the launches are captured in a CUDA graph, so the host memory that they copy from must stay alive.
    """

    def __init__(
        self, launcher: Launcher, device: tuple[int, int], row_table: RowTable, *, captured: bool = False
    ) -> None:
        self.launcher, self.device, self.row_table = launcher, device, row_table
        self._captured = captured
        self._alive: list[
            Tensor
        ] = []  # other memory that kernels read: kept until the next step, or as long as captured launches
        self._count = max(1, len(row_table.rows))
        self._updates = row_table.updates(device, launcher.geometry)
        programs = (each.programs.packed for each in self._updates)
        self._table, self._layouts, *self._programs = self._put([row_table.table, row_table.layouts, *programs])
        self._now = launcher.empty(3 * self._count)  # gradients' addresses, sets of scalars and streams of the rows
        self._version = -1
        self._scalars = self._config = launcher.empty(0)
        self._update_launches: dict[tuple[bool, bool], list[Launch]] = {}  # by the arguments of `updates`
        self._measuring: tuple[list[Launch], Launch] | None = None
        self._kinds: array[int] | None = None  # of the rows that are measured
        self.words = launcher.empty(TOTAL_WORDS)  # sums of squares and counts, int64[kinds, TOTAL_WORDS]
        self._buffers: list[Tensor] = []  # observations of each launch, float64[programs, tiles, 4]
        self._observed: list[Observed] = []

    # Copies to the device

    def _write(self, target: Tensor, array: NDArray[np.int64]) -> Tensor:
        staged = self.launcher.staging(array.size)
        staged.numpy()[:] = array
        self.launcher.upload(target[: array.size], staged)
        if self._captured:
            self._alive.append(staged)
        return staged

    def _put(self, arrays: Sequence[Table]) -> list[Tensor]:
        """Return the arrays on the device, copied in one piece."""
        sizes = [_aligned(array.size) for array in arrays]
        ends = np.cumsum(sizes).tolist()
        joined = np.zeros(ends[-1], np.int64)
        for each, size, end in zip(arrays, sizes, ends, strict=True):
            joined[end - size : end - size + each.size] = each.reshape(-1)
        target = self.launcher.empty(joined.size)
        self._write(target, joined)
        return [target[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def refresh(self, step: Table, version: int) -> None:
        """Upload this step's table (``Rows.write_device_step`` in C++), unless the device has this version of it."""
        if version == self._version:
            return
        self._write(self._now, step.reshape(-1))
        self._version = version

    def active(self, step: Table) -> list[int]:
        """Return the places in the table of this device's rows that take part in a step."""
        rows = self.row_table.rows
        places = np.flatnonzero(step[0]).tolist()
        return [place for place in places if (rows[place].device_type, rows[place].device_index) == self.device]

    def _prepared(self, kernel: Any, programs: int, args: tuple[Any, ...], kind: tuple[Any, ...], warps: int) -> Launch:
        return Launch(self.launcher.prepare(kernel, args, kind, warps), programs, args, kind)

    # Scalars

    def _make_room(self, sets: int) -> None:
        size = max(_ROOM, 1 + sets) * SET
        if len(self._scalars) < size:
            self._scalars, self._config = self.launcher.empty(size), self.launcher.empty(size)
            self._update_launches.clear()
            self._measuring = None

    def set_scalars(self, table: ScalarTable[float]) -> None:
        """Upload the scalars of a step that the host has decided."""
        words = np.frombuffer(table, np.int64)
        self._make_room(len(words) // SET - 1)
        self._write(self._scalars, words)

    def decide(
        self, verdict: DeviceVerdict, recipes: Sequence[Recipe], kept: Tensor, alarm: int, spikes: ToldMemory
    ) -> Deciding:
        """Return the launches that measure gradients, decide the step and make its scalars, and their input.

        ``kept``: int64[KEPT], the words that stay on the device from step to step. ``alarm``: the address of the word
        that tells the host that another process could not step. ``spikes``: the memory of norms, which is told if
        there is a threshold.
        """
        self._make_room(len(recipes))
        if not self._captured:
            self._alive = []
        config = np.zeros((1 + len(recipes), SET), np.int64)
        numbers = config.view(np.float64)  # the same words as float64
        self._tell_verdict(verdict, len(recipes), config[0], numbers[0])
        config[0, Told.ALARM_AT] = alarm
        if verdict.memory is not None:
            numbers[0, Told.SPIKE_THRESHOLD] = verdict.spike_threshold
            spikes.tell(verdict.memory)
            spikes.write(config[0])
        for words, floats, recipe in zip(config[1:], numbers[1:], recipes, strict=True):
            self._tell_recipe(recipe, words, floats)
        staged = self._write(self._config, config.reshape(-1))
        measuring: list[Launch] = []
        if verdict.settles:
            squares, settle = self.measuring(verdict.kinds)
            measuring = [*(squares if verdict.measures else []), settle]
        told = (self._config, kept, self.words, _floats(self._scalars))
        decide = self._prepared(launch.decide, 1, told, (verdict.settles, verdict.measures), 1)
        return Deciding(measuring, decide, staged)

    def _tell_verdict(self, verdict: DeviceVerdict, sets: int, words: Table, floats: NDArray[np.float64]) -> None:
        words[Told.SETS] = sets
        floats[Told.MAX_NORM] = np.inf if verdict.max_norm is None else verdict.max_norm
        words[Told.SKIPS], words[Told.CAPTURED] = verdict.skips, verdict.captured
        if isinstance(verdict.scale, Tensor):
            words[Told.SCALE_AT], words[Told.SCALE_DOUBLE] = self._tell(verdict.scale)
        else:
            floats[Told.SCALE] = verdict.scale
        if verdict.found_inf is not None:
            found_inf = verdict.found_inf
            in_float32 = found_inf if found_inf.dtype == torch.float32 else (found_inf != 0).float()
            words[Told.FOUND_INF_AT], _ = self._tell(in_float32)

    def _tell_recipe(self, recipe: Recipe, words: Table, floats: NDArray[np.float64]) -> None:
        floats[Scalar.BETA1], floats[Scalar.ONE_MINUS_BETA1] = recipe.beta1, 1.0 - recipe.beta1
        floats[Scalar.BETA2], floats[Scalar.ONE_MINUS_BETA2] = recipe.beta2, 1.0 - recipe.beta2
        if isinstance(recipe.lr, Tensor):
            words[ToldOfSet.LR_AT], words[ToldOfSet.LR_DOUBLE] = self._tell(recipe.lr)
        else:
            floats[ToldOfSet.LR] = recipe.lr
        floats[ToldOfSet.WEIGHT_DECAY] = recipe.weight_decay
        floats[ToldOfSet.SIGN] = -1.0 if recipe.maximize else 1.0
        floats[ToldOfSet.EPS] = recipe.eps
        floats[ToldOfSet.REFERENCE_LR] = recipe.reference_lr
        floats[Scalar.CAUTIOUS] = recipe.cautious_decay
        floats[Scalar.EMA_DECAY], floats[Scalar.ONE_MINUS_EMA_DECAY] = recipe.ema_decay, 1.0 - recipe.ema_decay
        floats[Scalar.COUNT] = recipe.step
        for at, length, beta in (
            (ToldOfSet.POWERS1, ToldOfSet.LENGTH1, recipe.beta1),
            (ToldOfSet.POWERS2, ToldOfSet.LENGTH2, recipe.beta2),
        ):
            if self._captured:
                table = _powers_on_host(beta, self.launcher)
            else:  # here the true step count is never above the host's
                table = _powers(beta, _most_steps(recipe.step), self.launcher, self.launcher.stream())
            self._alive.append(table)
            words[at], words[length] = table.data_ptr(), len(table)

    def _tell(self, value: Tensor) -> tuple[int, bool]:
        """Return the address of a number on the device, in a type that the kernel reads, and whether it is float64."""
        number = value.detach()
        if number.dtype not in (torch.float32, torch.float64):
            number = number.double()
        self._alive.append(number)
        return number.data_ptr(), number.dtype == torch.float64

    # Updating

    def updates(self, *, some_cautious: bool, observe: bool) -> list[Launch]:
        """Return the launches that update all rows; ``some_cautious``: whether a set is cautious."""
        if observe and not self._buffers:
            sizes = [4 * each.geometry.tiles * len(each.programs.rows) for each in self._updates]
            self._buffers = [_floats(self.launcher.empty(size).zero_()) for size in sizes]
        if observe:
            self._observed = []
        if (some_cautious, observe) not in self._update_launches:
            scalars = _floats(self._scalars)
            found = []
            for number, (each, programs) in enumerate(zip(self._updates, self._programs, strict=True)):
                tile, tiles, warps = each.geometry
                observed = self._buffers[number] if observe else scalars
                args = (self._table, self._now, scalars, programs, self._layouts, observed, self._count)
                kind = (*each.kind, some_cautious, observe, tile, tiles)
                found.append(self._prepared(launch.update, len(each.programs.rows), args, kind, warps))
            self._update_launches[some_cautious, observe] = found
        return self._update_launches[some_cautious, observe]

    def observed(self) -> list[Observed]:
        """Return the last observation of each row, by place in the table; wait for the device."""
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

    def measuring(self, kinds: array[int] | None) -> tuple[list[Launch], Launch]:
        """Return the launches that add up squares, and the one that writes the sums to ``words``.

        ``kinds``: as in `DeviceVerdict`.
        """
        if self._measuring is None or (kinds is not self._kinds and kinds != self._kinds):
            count = 1 if kinds is None else 1 + max(kinds)
            found = self.row_table.squares(self.device, kinds, self.launcher.measuring)
            tables = self._put([each.programs.packed for each in found]) if found else []
            sums = self.launcher.empty(count * COPIES * PADDED).zero_()
            self.words = self.launcher.empty(count * TOTAL_WORDS)
            launches = []
            for (kind, of_rows, geometry, programs), table in zip(found, tables, strict=True):
                to = sums[of_rows * COPIES * PADDED :]
                args = (self._table, self._now, table, self._layouts, self._config, to, self._count)
                each = self._prepared(
                    launch.squares, len(programs.rows), args, (*kind, geometry.tile, geometry.tiles), geometry.warps
                )
                launches.append(each)
            settle = self._prepared(launch.settle, count, (self._config, sums, self.words), (), 1)
            self._measuring, self._kinds = (launches, settle), kinds
        return self._measuring

    def measure(self, scale: float, kinds: array[int] | None) -> list[Launch]:
        """Return all these launches, for gradients with this scale of GradScaler's, which is uploaded."""
        self._make_room(0)
        told = np.zeros(SET, np.int64)
        told.view(np.float64)[Told.SCALE] = scale
        self._write(self._config, told)
        squares, settle = self.measuring(kinds)
        return [*squares, settle]


def _floats(words: Tensor) -> Tensor:
    return words.view(torch.float64)


def _aligned(words: int) -> int:
    """Return `words` rounded up, so that the next array begins at a multiple of 128 bytes."""
    return -(-words // 16) * 16


def _most_steps(count: float) -> int:
    """Return for how many steps a table that includes `count` is made: one of few sizes, so that tables are reused."""
    return max(4096, 1 << int(count).bit_length())


# When the cache drops a table, its memory is freed in the order of its stream, after the kernels that read it.
@functools.lru_cache(maxsize=256)
def _powers(beta: float, steps: int, launcher: Launcher, stream: int) -> Tensor:
    """Return 1 - beta^t for t = 0, 1, ... until it is 1, on the device, for steps on one stream."""
    values = powers(beta, steps)
    staged = launcher.staging(len(values))
    _floats(staged).numpy()[:] = values
    table = launcher.empty(len(values))
    launcher.upload(table, staged)
    return _floats(table)


def _powers_on_host(beta: float, launcher: Launcher) -> Tensor:
    """Return the same table for every possible step count, for captured steps, in host memory that the device reads."""
    values = powers(beta, MAX_STEP)
    staged = _floats(launcher.staging(len(values)))
    staged.numpy()[:] = values
    return staged
