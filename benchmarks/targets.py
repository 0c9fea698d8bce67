"""What the project promises of its speed, next to what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lucid.bench.contenders import (
    DEFAULT,
    EIGHT_BIT,
    FUSED,
    FUSED_BF16,
    LUCID,
    RESIDUAL_EIGHT_BIT,
    STOCHASTIC_EIGHT_BIT,
)
from lucid.bench.paired import Quartiles

from .averages import AVERAGED, FUSED_AVERAGED
from .clipping import CLIPPED, FUSED_CLIPPED, OBSERVED
from .results import Results

IMPORT_MS = 30.0
TEMPORARY_MIB = 1.0  # "none that grows with the model": 64 M parameters are 256 MiB


class Target(NamedTuple):
    """One promise and its measured value."""

    what: str
    wanted: str
    measured: str
    met: bool


def targets(results: Results) -> list[Target]:
    """Return every promise of which something was measured."""
    found = (_steps, _formats, _clipping, _averages, _loops, _footprint)
    return [target for each in found for target in each(results)]


def _at_least(what: str, bound: float, found: Quartiles, unit: str = "×") -> Target:
    return Target(what, f"≥ {bound:.4g}{unit}", f"{found.median:.3g}{unit}", found.median >= bound)


def _at_most(what: str, bound: float, found: float, unit: str) -> Target:
    return Target(what, f"≤ {bound:.4g}{unit}", f"{found:.3g}{unit}", found <= bound)


def _steps(results: Results) -> Iterator[Target]:
    for name in ("64M", "gpt2-small"):
        if (step := results.steps.get(name)) is None:
            continue
        for peer, bound in ((FUSED, 0.97), (DEFAULT, 6.0)):
            if (found := step.times_lucid(peer)) is not None:
                yield _at_least(f"{name}: {peer}'s time over lucid's", bound, found)
        if (found := step.part_of_limit) is not None:
            yield _at_least(f"{name}: part of the memory's limit", 0.9, found, unit="")
    for name, ratio in (("1000x1000", 8.0), ("1000x64", 15.0), ("10000x64", 15.0)):
        if (step := results.steps.get(name)) is not None and (found := step.times_lucid(FUSED)) is not None:
            yield _at_least(f"{name}: {FUSED}'s time over lucid's", ratio, found)
    for name, most in (("1x64", 15.0), ("1000x64", 0.5), ("10000x64", 0.5)):
        if (step := results.steps.get(name)) is not None:
            yield _at_most(f"{name}: a tensor, all in", most, step.microseconds_a_tensor, " µs")


def _formats(results: Results) -> Iterator[Target]:
    if (large := results.formats.get("formats-64M")) is not None:
        yield _at_least(f"64M: {FUSED}'s time over {EIGHT_BIT}'s", 1.5, large.times(FUSED, EIGHT_BIT))
        for peer, bound in ((FUSED, 1.5), (FUSED_BF16, 1.05)):
            what = f"64M: {peer}'s time over that of {RESIDUAL_EIGHT_BIT}"
            yield _at_least(what, bound, large.times(peer, RESIDUAL_EIGHT_BIT))
        if (size := large.bytes_a_parameter(RESIDUAL_EIGHT_BIT)) is not None:
            yield _at_most(f"64M: bytes a parameter of {RESIDUAL_EIGHT_BIT}", 8.2, size, "")
        if (size := large.bytes_a_parameter(STOCHASTIC_EIGHT_BIT)) is not None:
            yield _at_most(f"64M: bytes a parameter of {STOCHASTIC_EIGHT_BIT}", 6.2, size, "")
    if (small := results.formats.get("formats-1000x1000")) is not None:
        yield _at_least(f"1000x1000: {FUSED}'s time over {EIGHT_BIT}'s", 10.0, small.times(FUSED, EIGHT_BIT))


def _clipping(results: Results) -> Iterator[Target]:
    for name, bound in (("64M", 1.2), ("gpt2-small", 1.2), ("1000x1000", 10.0)):
        if (case := results.clipping.get(f"clip-{name}")) is not None:
            yield _at_least(
                f"{name}: time of {FUSED_CLIPPED} over {CLIPPED}'s", bound, case.times(FUSED_CLIPPED, CLIPPED)
            )
    if (case := results.clipping.get("clip-64M")) is not None:
        cost = 100 * (case.times(OBSERVED, LUCID).median - 1)
        yield _at_most("64M: cost of observing a step", 15.0, cost, " %")


def _averages(results: Results) -> Iterator[Target]:
    for name in ("64M", "gpt2-small"):
        if (case := results.averages.get(f"ema-{name}")) is not None:
            what = f"{name}: time of {FUSED_AVERAGED} over that of {AVERAGED}"
            yield _at_least(what, 1.5, case.times(FUSED_AVERAGED, AVERAGED))
            yield _at_most(f"{name}: time of {AVERAGED} over lucid's", 1.35, case.times(AVERAGED, LUCID).median, "×")


def _loops(results: Results) -> Iterator[Target]:
    for name, bound in (("loop-gpt", 1.15), ("loop-mlp", 3.5)):
        if (loop := results.loops.get(name)) is not None:
            step, _ = loop.times(FUSED, LUCID)
            yield _at_least(f"{name}: {FUSED}'s step over lucid's", bound, step)


def _footprint(results: Results) -> Iterator[Target]:
    for name, step in results.steps.items():
        if LUCID in step.temporary:
            mebibytes = step.temporary[LUCID] / 2**20
            yield _at_most(f"{name}: temporary memory of a step", TEMPORARY_MIB, mebibytes, " MiB")
    if results.imports:
        seconds = Quartiles.of(each.lucid for each in results.imports).median
        yield _at_most("import lucid.optim after torch", IMPORT_MS, 1e3 * seconds, " ms")
