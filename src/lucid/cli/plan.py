"""``lucid plan``: bytes of weights, gradients and state before training, in every format, on 1, 2, 4, ... processes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from rich.text import Text

from lucid.bench.shapes import Shape
from lucid.engine.formats import NAMES, MasterWeights, StateFormatName, state_bytes

from . import output
from .shapes import DTYPES, Model, memory

TORCH = "torch"


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept beside the moments, as the arguments of AdamW say."""

    amsgrad: bool = False
    ema: bool = False
    master_weights: MasterWeights = True


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes on the process that holds most, for one dtype of weights and one state format.

    ``in_backward``: bytes of gradients in memory at once with ``step_in_backward``, None for several processes.
    """

    dtype: str
    state_format: str
    ranks: int
    weights: int
    gradients: int
    state: int
    in_backward: int | None
    fits: bool | None = None
    fits_in_backward: bool | None = None

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state

    @property
    def total_in_backward(self) -> int | None:
        return None if self.in_backward is None else self.weights + self.in_backward + self.state


def _part(shape: Shape, ranks: int) -> int:
    """Elements of the largest shard when FSDP2 shards rows over processes."""
    return math.prod((math.ceil(shape[0] / ranks), *shape[1:])) if shape else 1


def need(
    shapes: Sequence[Shape],
    dtype: str,
    state_format: str,
    ranks: int,
    kept: Kept = Kept(),
    *,
    limit: int | None = None,
) -> Need:
    """Return the bytes that training needs; `state_format` may be ``"torch"``, for torch's AdamW."""
    kind = DTYPES[dtype]
    counts = Counter(shapes)
    sizes = {shape: kind.itemsize * _part(shape, ranks) for shape in counts}
    weights = sum(count * sizes[shape] for shape, count in counts.items())
    if state_format == TORCH:
        state = (2 + kept.amsgrad + kept.ema) * weights + 4 * len(shapes)  # and the step count
    else:
        name: StateFormatName = state_format  # type: ignore[assignment]
        state = sum(
            count * state_bytes(shape, kind, name, ranks=ranks, **asdict(kept)) for shape, count in counts.items()
        )
    in_backward = max(sizes.values()) if ranks == 1 and state_format != TORCH else None
    found = Need(dtype, state_format, ranks, weights, weights, state, in_backward)
    if limit is None:
        return found
    least = found.total_in_backward
    fits = found.total <= limit, None if least is None else least <= limit
    return Need(dtype, state_format, ranks, weights, weights, state, in_backward, *fits)


def needs(model: Model, ranks: Sequence[int], kept: Kept, *, limit: int | None) -> Iterator[Need]:
    """Return the bytes of each choice."""
    for dtype in DTYPES:
        refused = dtype == "float16" and kept.master_weights == "stochastic"
        for state_format in (TORCH,) if refused else (*NAMES, TORCH):
            for number in ranks:
                yield need(model.shapes, dtype, state_format, number, kept, limit=limit)


def rank_counts(most: int) -> list[int]:
    """Return 1, 2, 4, ... and `most`."""
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most})


def run(model: Model, most_ranks: int, memory_text: str | None, kept: Kept, *, json: bool) -> int:
    """Print the bytes of each choice; return 1 if nothing fits into the given memory."""
    limit = None if memory_text is None else memory(memory_text)
    ranks = rank_counts(most_ranks)
    found = list(needs(model, ranks, kept, limit=limit))
    if json:
        choices = [asdict(each) | {"total": each.total, "total_in_backward": each.total_in_backward} for each in found]
        output.print_json(
            {"model": model.name, "tensors": len(model.shapes), "parameters": model.elements, "memory": limit}
            | {"choices": choices}
        )
    else:
        _print(model, ranks, found, limit, memory_text)
    return 0 if limit is None or any(each.fits or each.fits_in_backward for each in found) else 1


def _print(
    model: Model, ranks: Sequence[int], found: Sequence[Need], limit: int | None, memory_text: str | None
) -> None:
    console = output.console()
    console.print(Text(model.described, "bold"))
    header = ["weights", "state", "bytes/param", "weights", "gradients", "state", "all", "in backward"]
    header += [f"each of {number}" for number in ranks[1:]]
    rows: list[list[str | Text]] = []
    for one in (each for each in found if each.ranks == 1):
        row: list[str | Text] = [one.dtype, one.state_format, output.digits(one.total / max(1, model.elements))]
        row += [output.size(part) for part in (one.weights, one.gradients, one.state)]
        row.append(_marked(one.total, one.fits))
        least = one.total_in_backward
        row.append("–" if least is None else _marked(least, one.fits_in_backward))
        others = (each for each in found if each.ranks > 1)
        same = (each for each in others if (each.dtype, each.state_format) == (one.dtype, one.state_format))
        row += [_marked(each.total, each.fits) for each in same]
        rows.append(row)
    shown = output.table(header, rows)
    shown.columns[1].justify = "left"
    console.print(shown)
    console.print(
        "Activations, buffers and the allocator's reserve come on top. in backward: with step_in_backward(), which "
        "keeps only the largest gradient (weights used more than once need more). torch: torch.optim.AdamW, which "
        "keeps no master weights for 16-bit parameters, with --ema beside an AveragedModel in the weights' dtype.",
        style=output.FAINT,
    )
    if limit is None:
        return
    fitting = sum(bool(each.fits or each.fits_in_backward) for each in found)
    if fitting:
        console.print(Text(f"green fits into {memory_text}: {fitting} of {len(found)} choices", output.GOOD))
    else:
        console.print(Text(f"nothing fits into {memory_text}", output.BAD))


def _marked(size: int, fits: bool | None) -> str | Text:
    text = output.size(size)
    if fits is None:
        return text
    return Text(f"✓ {text}", output.GOOD) if fits else Text(f"✗ {text}", output.BAD)
