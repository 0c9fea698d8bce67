"""``lucid plan``: bytes of weights, gradients and state before training, in every format, on 1, 2, 4, ... processes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from rich.text import Text

from lucid.bench.shapes import Shape
from lucid.engine import pinned
from lucid.engine.formats import NAMES, OF_MOMENTS, STEP, STREAM, MasterWeights, StateFormatName, new_step
from lucid.engine.sizes import slot_bytes

from . import output
from .shapes import DTYPES, Model, memory

TORCH = "torch"
_NUMBERS = {STEP, STREAM}  # in the host's ordinary memory, wherever the state is


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes on the process that holds most, for one dtype of weights and one state format.

    ``gradients``: in memory at once. ``state``: on the weights' device. ``host``: state in the host's memory, if it is
    elsewhere. ``in_backward``: bytes of gradients with ``step_in_backward``, None for several processes.
    """

    dtype: str
    state_format: str
    ranks: int
    weights: int
    gradients: int
    state: int
    host: int
    in_backward: int | None
    fits: bool | None = None
    fits_in_backward: bool | None = None

    @property
    def total(self) -> int:
        """Bytes on the weights' device."""
        return self.weights + self.gradients + self.state

    @property
    def total_in_backward(self) -> int | None:
        return None if self.in_backward is None else self.weights + self.in_backward + self.state


@dataclass(frozen=True, slots=True)
class Options:
    """What to plan for: `AdamW`'s options of these names, `step_in_backward`, and the bytes of the weights' device.

    ``ema``: whether averages of the weights are kept.
    """

    amsgrad: bool = False
    ema: bool = False
    master_weights: MasterWeights = True
    state_device: str | None = None
    step_in_backward: bool = False
    limit: int | None = None


def _placed(held: Sequence[tuple[str, int]], state_device: str | None) -> tuple[int, int]:
    """Return the bytes of state, given by key, on the weights' device and on the host."""
    whole = sum(size for _, size in held)
    if state_device is None:
        return whole, 0
    numbers = sum(size for key, size in held if key in _NUMBERS)
    on_host = [size for key, size in held if key in OF_MOMENTS or (state_device == "cpu" and key not in _NUMBERS)]
    return whole - numbers - sum(on_host), numbers + pinned.bytes_for(on_host)


def _part(shape: Shape, ranks: int) -> int:
    """Elements of the largest shard when FSDP2 shards rows over processes."""
    return math.prod((math.ceil(shape[0] / ranks), *shape[1:])) if shape else 1


def need(shapes: Sequence[Shape], dtype: str, state_format: str, ranks: int, options: Options = Options()) -> Need:
    """Return the bytes that training needs; `state_format` may be ``"torch"``, for torch's AdamW."""
    kind = DTYPES[dtype]
    counts = Counter(shapes)
    sizes = {shape: kind.itemsize * _part(shape, ranks) for shape in counts}
    weights = sum(count * sizes[shape] for shape, count in counts.items())
    if state_format == TORCH:
        slots = {shape: {"moments": (2 + options.amsgrad + options.ema) * size} for shape, size in sizes.items()}
    else:
        name: StateFormatName = state_format  # type: ignore[assignment]
        slots = {
            shape: slot_bytes(
                shape,
                kind,
                name,
                master_weights=options.master_weights,
                amsgrad=options.amsgrad,
                ema=options.ema,
                ranks=ranks,
            )
            for shape in counts
        }
    held = [(STEP, new_step().nbytes)] * len(shapes) + [each for shape in shapes for each in slots[shape].items()]
    state, host = _placed(held, options.state_device)
    in_backward = max(sizes.values()) if ranks == 1 and state_format != TORCH else None
    gradients = in_backward if options.step_in_backward and in_backward is not None else weights
    found = Need(dtype, state_format, ranks, weights, gradients, state, host, in_backward)
    if options.limit is None:
        return found
    least = found.total_in_backward
    return replace(
        found, fits=found.total <= options.limit, fits_in_backward=None if least is None else least <= options.limit
    )


def needs(model: Model, ranks: Sequence[int], options: Options) -> Iterator[Need]:
    """Return the bytes of each choice. torch's AdamW is one if all options are also torch's."""
    formats = NAMES if options.state_device or options.step_in_backward else (*NAMES, TORCH)
    for dtype in DTYPES:
        refused = dtype == "float16" and options.master_weights == "stochastic"
        for state_format in formats:
            for number in ranks:
                if not refused or state_format == TORCH:
                    yield need(model.shapes, dtype, state_format, number, options)


def rank_counts(most: int) -> list[int]:
    """Return 1, 2, 4, ... and `most`."""
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most})


def run(model: Model, most_ranks: int, memory_text: str | None, options: Options, *, json: bool) -> int:
    """Print the bytes of each choice; return 1 if nothing fits into the given memory."""
    limit = None if memory_text is None else memory(memory_text)
    options = replace(options, limit=limit)
    ranks = rank_counts(most_ranks)
    found = list(needs(model, ranks, options))
    if json:
        choices = [asdict(each) | {"total": each.total, "total_in_backward": each.total_in_backward} for each in found]
        output.print_json(
            {"model": model.name, "tensors": len(model.shapes), "parameters": model.elements, "memory": limit}
            | {"choices": choices}
        )
    else:
        _print(model, ranks, found, options, memory_text)
    return 0 if limit is None or any(each.fits or each.fits_in_backward for each in found) else 1


def _print(
    model: Model, ranks: Sequence[int], found: Sequence[Need], options: Options, memory_text: str | None
) -> None:
    console = output.console()
    console.print(Text(model.described, "bold"))
    header = ["weights", "state", *_header(options)]
    for number in ranks[1:]:
        header += [f"each of {number}"] if options.state_device is None else [f"each of {number}", "its host"]
    rows: list[list[str | Text]] = []
    for one in (each for each in found if each.ranks == 1):
        row = [one.dtype, one.state_format, *_cells(one, max(1, model.elements), options)]
        others = (each for each in found if each.ranks > 1)
        for each in others:
            if (each.dtype, each.state_format) == (one.dtype, one.state_format):
                row.append(_marked(each.total, each.fits))
                row += [] if options.state_device is None else [output.size(each.host)]
        rows.append(row)
    shown = output.table(header, rows)
    shown.columns[1].justify = "left"
    console.print(shown)
    console.print(" ".join(_notes(options, several=len(ranks) > 1)), style=output.FAINT)
    if options.limit is None:
        return
    fitting = sum(bool(each.fits or each.fits_in_backward) for each in found)
    if fitting:
        console.print(Text(f"green fits into {memory_text}: {fitting} of {len(found)} choices", output.GOOD))
    else:
        console.print(Text(f"nothing fits into {memory_text}", output.BAD))


def _header(options: Options) -> list[str]:
    in_backward = [] if options.step_in_backward else ["in backward"]
    if options.state_device is None:
        return ["bytes/param", "weights", "gradients", "state", "all", *in_backward]
    return ["device/param", "host/param", "weights", "gradients", "state", "device", *in_backward, "host"]


def _cells(one: Need, elements: int, options: Options) -> list[str | Text]:
    """Return what `_header` names."""
    least = one.total_in_backward
    in_backward = [] if options.step_in_backward else ["–" if least is None else _marked(least, one.fits_in_backward)]
    parts = [output.size(each) for each in (one.weights, one.gradients, one.state)]
    on_device = output.digits(one.total / elements)
    whole = _marked(one.total, one.fits)
    if options.state_device is None:
        return [on_device, *parts, whole, *in_backward]
    return [on_device, output.digits(one.host / elements), *parts, whole, *in_backward, output.size(one.host)]


def _notes(options: Options, *, several: bool) -> Iterator[str]:
    """Yield what the figures count, and what not."""
    yield "Activations, buffers and the allocator's reserve come on top."
    counted = "only the largest gradient is counted (weights used more than once need more)"
    if not options.step_in_backward:
        yield f"in backward: with step_in_backward(), {counted}."
    else:
        yield f"With step_in_backward(), {counted}" + (
            "; with several processes, all gradients are." if several else "."
        )
    if options.state_device is not None:
        yield "host: the host's memory for its part of the state, in pinned pieces; --memory is the device's."
    elif not options.step_in_backward:
        beside = ", and an AveragedModel in the weights' dtype" if options.ema else ""
        yield f"torch: torch.optim.AdamW, which keeps no master weights for 16-bit parameters{beside}."


def _marked(size: int, fits: bool | None) -> str | Text:
    text = output.size(size)
    if fits is None:
        return text
    return Text(f"✓ {text}", output.GOOD) if fits else Text(f"✗ {text}", output.BAD)
