"""The tensors that a command is about."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lucid.bench.shapes import MODELS, MOST_TENSORS, Shape, elements, read_shapes

from .checkpoints import read, trained
from .error import CommandError


@dataclass(frozen=True, slots=True)
class Model:
    """Shapes of the tensors to train, and the name of their source."""

    name: str
    shapes: Sequence[Shape]

    @property
    def elements(self) -> int:
        return elements(self.shapes)

    @property
    def described(self) -> str:
        return f"{self.name}: {len(self.shapes):,} tensors, {self.elements:,} parameters"


def chosen(checkpoint: Path | None, like: str | None, shapes: Path | None, default: str | None = None) -> Model:
    """Return the model that the command line names, or the model `default`."""
    given = [value for value in (checkpoint, like, shapes) if value is not None]
    if len(given) > 1 or (not given and default is None):
        raise CommandError("expected one of CHECKPOINT, --like and --shapes (for plan also --parameters)")
    if checkpoint is not None:
        return Model(checkpoint.name, _trained(checkpoint))
    if shapes is not None:
        try:
            return Model(shapes.name, read_shapes(shapes))
        except (OSError, ValueError) as error:
            raise CommandError(f"--shapes: {error}") from error
    name = like or default
    assert name is not None
    return Model(name, MODELS[name]())


def _trained(path: Path) -> list[Shape]:
    """The shapes of a checkpoint's weights: tied weights count once, running statistics do not count."""
    weights = read(path).weights()
    if not weights:
        raise CommandError(f"{path}: expected a model's weights in it, found none")
    found = trained(weights)
    if not found:
        raise CommandError(f"{path}: expected floating-point weights in it, found none")
    return [tuple(each.shape) for each in found]


_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMBGT]?)")
_THOUSANDS = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def counted(count: str, layout: str, others: Sequence[object]) -> Model:
    """Return `count` parameters, like "1.3B", in tensors of the shape `layout`, like "4096x4096"."""
    if any(other is not None for other in others):
        raise CommandError("expected one of CHECKPOINT, --like, --shapes and --parameters, got two")
    found = _COUNT.fullmatch(count.strip())
    if found is None or (number := round(float(found[1]) * _THOUSANDS[found[2]])) < 1:
        raise CommandError(f"--parameters: expected a count like 350M or 1.3B, got {count!r}")
    sizes = re.fullmatch(r"\d+(x\d+)*", layout)
    shape = tuple(int(size) for size in layout.split("x")) if sizes else ()
    if not shape or not all(shape):
        raise CommandError(f"--layout: expected a shape like 4096x4096, got {layout!r}")
    full, rest = divmod(number, math.prod(shape))
    if full > MOST_TENSORS:
        raise CommandError(f"--layout: {count} in {layout} would be {full:,} tensors; give a larger shape")
    row = math.prod(shape[1:])
    shapes = [shape] * full
    if rest >= row:
        shapes.append((rest // row, *shape[1:]))
    if rest % row:
        shapes.append((rest % row,))
    return Model(f"{count} in {layout}", shapes)


BYTES = {
    "B": 1,
    **{f"{unit}B": 1000**power for power, unit in enumerate("kMGT", 1)},
    **{f"{unit}iB": 1024**power for power, unit in enumerate("KMGT", 1)},
}


def memory(text: str) -> int:
    """Return a size like 24GiB in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?i?B?)", text.strip())
    unit = found[2] if found else None
    unit = {"": "B", "KB": "kB"}.get(unit or "", unit) if found else None
    if found is None or unit not in BYTES:
        raise CommandError(f"--memory: expected a size like 24GiB or 80GB, got {text!r}")
    return int(float(found[1]) * BYTES[unit])


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
