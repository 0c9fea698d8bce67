"""The results as tables for the terminal and for RESULTS.md, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from lucid.bench.contenders import FUSED, FUSED_BF16, LIMIT, LUCID, PEERS
from lucid.bench.machine import BUSY
from lucid.bench.paired import Quartiles

from . import overhead
from .averages import FUSED_AVERAGED, AveragesResult
from .clipping import FUSED_CLIPPED, ClippingResult
from .formats import FormatResult
from .results import Results
from .tables import markdown_table, terminal_table
from .targets import targets

BEGIN = "<!-- measured: written by `python -m benchmarks.step --markdown`; notes go outside -->"
END = "<!-- end of measured -->"


class Table(NamedTuple):
    """A titled table; `note` says how to read it."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


def warnings(results: Results) -> list[str]:
    """Return why the results are not for quoting."""
    found = ["A quick run: few rounds, not for quoting."] if results.quick else []
    if results.neighbours > BUSY:
        found.append("A busy machine: not for quoting. OpenMP's barriers wait for threads that do not run.")
    return found


def tables(results: Results) -> Iterator[Table]:
    """Yield a table for each thing that was measured."""
    if found := targets(results):
        rows = [[what, wanted, got, "met" if met else "NOT MET"] for what, wanted, got, met in found]
        yield Table("Targets", "Medians.", ["target", "wanted", "measured", ""], rows)
    if results.steps:
        yield _steps(results)
    for found_formats in results.formats.values():
        yield _formats(found_formats)
    if results.clipping:
        yield _beside("Clipping, observing", "clip + fused", FUSED_CLIPPED, results.clipping)
    if results.averages:
        yield _beside("Averages of the weights", "fused + AveragedModel", FUSED_AVERAGED, results.averages)
    if results.loops:
        yield _loops(results)
    if any(step.temporary for step in results.steps.values()):
        yield _temporary(results)
    if results.imports:
        columns = zip(*results.imports, strict=True)
        names = ("import torch", "import lucid.optim after it")
        rows = [
            [name, _spread(Quartiles.of(1e3 * second for second in column))]
            for name, column in zip(names, columns, strict=True)
        ]
        note = f"ms, median and quartiles of {len(results.imports)} fresh processes."
        yield Table("Import", note, ["", "ms"], rows)
    if results.overhead:
        note = "ns a tensor, medians; the lines in brackets are no part of the step, for comparison."
        header = ["", *results.overhead]
        yield Table("Many small tensors", note, header, overhead.rows(results.overhead))


def _steps(results: Results) -> Table:
    peers = [peer for peer in PEERS if any(peer in step.samples for step in results.steps.values())]
    header = ["case", "tensors", "parameters", "lucid ms", "µs/tensor", f"{FUSED} ms"]
    header += [f"× {peer}" for peer in peers] + ["of limit", "limit GB/s", "pairs"]
    rows = []
    for step in results.steps.values():
        limit = LIMIT in step.samples
        rows.append(
            [
                step.case,
                f"{step.tensors:,}",
                f"{step.elements / 1e6:.3g} M",
                _digits(1e3 * step.seconds(LUCID)),
                _digits(step.microseconds_a_tensor) if step.tensors > 1 else "–",
                _digits(1e3 * step.seconds(FUSED)),
                *(_spread(step.times_lucid(peer)) for peer in peers),
                _spread(step.part_of_limit),
                f"{step.limit_gigabytes:.1f}" if limit else "–",
                f"{len(step.samples[FUSED])}",
            ]
        )
    note = (
        "× peer: its time over lucid's in the same round, median (quartiles); above 1, lucid is "
        "faster. of limit: lucid's speed as a part of a kernel's that only moves the same bytes."
    )
    return Table("The step alone", note, header, rows)


def _formats(found: FormatResult) -> Table:
    rows = []
    for name in found.samples:
        size = found.bytes_a_parameter(name)
        rows.append(
            [
                name,
                "–" if size is None else f"{size:.2f}",
                _digits(1e3 * found.seconds(name)),
                _spread(found.times(FUSED, name)),
                _spread(found.times(FUSED_BF16, name)),
            ]
        )
    note = (
        f"{len(found.samples[FUSED])} rounds. bytes a parameter: resident memory of weights, gradients and state. × as "
        "above: above 1, faster than torch's fused step in float32, or in bf16 without master weights."
    )
    header = ["", "bytes a parameter", "ms", f"× {FUSED}", f"× {FUSED_BF16}"]
    return Table(f"Formats: {found.case.removeprefix('formats-')}", note, header, rows)


def _beside(
    title: str, short: str, peer: str, found: Mapping[str, ClippingResult] | Mapping[str, AveragesResult]
) -> Table:
    rows = [
        [
            case.case.partition("-")[2],
            name,
            _digits(1e3 * case.seconds(name)),
            _spread(case.times(name, LUCID)),
            _spread(case.times(peer, name)),
        ]
        for case in found.values()
        for name in case.samples
    ]
    note = (
        f"× lucid: its time over that of lucid's step alone. × {short}: how many times as long {peer} took; above 1, "
        "faster."
    )
    return Table(title, note, ["case", "", "ms", "× lucid", f"× {short}"], rows)


def _loops(results: Results) -> Table:
    header = ["model", "tensors", "parameters", "lucid step ms", f"{FUSED} step ms", "× step"]
    header += ["lucid iteration ms", "× iteration", "pairs"]
    rows = []
    for loop in results.loops.values():
        own, peer = loop.milliseconds(LUCID), loop.milliseconds(FUSED)
        step, whole = loop.times(FUSED, LUCID)
        rows.append(
            [
                loop.training,
                f"{loop.tensors:,}",
                f"{loop.elements / 1e6:.3g} M",
                _digits(own.step),
                _digits(peer.step),
                _spread(step),
                _digits(own.whole),
                _spread(whole),
                f"{len(loop.samples[FUSED])}",
            ]
        )
    note = f"Forward, backward, step; the step timed where it is. × as above, {FUSED}'s time over lucid's."
    return Table("In a training loop", note, header, rows)


def _temporary(results: Results) -> Table:
    steps = [step for step in results.steps.values() if step.temporary]
    names = list(dict.fromkeys(name for step in steps for name in step.temporary))
    rows = []
    for step in steps:
        found = (step.temporary.get(name) for name in names)
        row = ["–" if size is None else f"{size / 2**20:,.2f}" for size in found]
        rows.append([step.case, *row])
    note = "MiB by which a step's peak of resident memory exceeds what was resident before."
    return Table("Temporary memory", note, ["case", *names], rows)


def _spread(found: Quartiles | None) -> str:
    if found is None:
        return "–"
    return f"{_digits(found.median)} ({_digits(found.low)}–{_digits(found.high)})"


def _digits(value: float) -> str:
    """Three of them at least, and no exponent."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{decimals}f}"


def terminal(machine: Mapping[str, str], warnings: Sequence[str], tables: Sequence[Table]) -> str:
    """Return a report for people at a terminal."""
    parts = ["\n".join(f"{name:<12}{line}" for name, line in machine.items()), *warnings]
    parts += [f"{title.upper()}  {note}\n{terminal_table(header, rows)}" for title, note, header, rows in tables]
    return "\n\n".join(parts)


def markdown(machine: Mapping[str, str], warnings: Sequence[str], tables: Sequence[Table], heading: str = "##") -> str:
    """Return the same report for a page."""
    parts = ["\n".join(f"- {name}: {line}" for name, line in machine.items())]
    parts += [f"**{warning}**" for warning in warnings]
    parts += [f"{heading} {title}\n\n{note}\n\n{markdown_table(header, rows)}" for title, note, header, rows in tables]
    return "\n\n".join(parts)


def spliced(text: str, report: str, begin: str = BEGIN) -> str:
    """Return `text` with the report between its markers; raise ValueError where it lacks them."""
    if text.count(begin) != 1 or text.count(END) != 1 or text.index(begin) > text.index(END):
        raise ValueError(f"expected the lines {begin!r} and {END!r}, once each and in this order")
    before, _, rest = text.partition(begin)
    after = rest.partition(END)[2]
    return f"{before}{begin}\n\n{report}\n\n{END}{after}"


def write_json(results: Results, path: Path) -> None:
    """Write every sample, so that other statistics can be made of them."""
    path.write_text(json.dumps(asdict(results), indent=1) + "\n")
