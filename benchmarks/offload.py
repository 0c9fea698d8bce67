"""Time a step whose state is on the host (`state_device="cpu"`), on a CUDA device, beside other ways and the bus.

    python -m benchmarks.offload --markdown benchmarks/RESULTS-gpu.md  # at most 4 minutes
    python -m benchmarks.offload --dry  # tiny tensors on the CPU: shows that the script works, and no speed

The bus's limit is measured in the same rounds: two copies between pinned memory and the device, one in each direction,
at the same time. What does not fit into `--seconds` is left out and named, the most important cases first.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import lucid.optim
from lucid.bench import machine as timed_machine
from lucid.bench.contenders import (
    BF16_STATE,
    BITSANDBYTES,
    EIGHT_BIT,
    FORMATS,
    LR,
    LUCID,
    RESIDUAL_EIGHT_BIT,
    TORCHAO,
    WEIGHT_DECAY,
    Format,
    Step,
    bus_copies,
    is_installed,
)
from lucid.bench.paired import Quartiles, Timed, ratios, rounds, sampler
from lucid.bench.shapes import CASES as SHAPES
from lucid.bench.shapes import Shape, llama_1b, parameters
from lucid.engine import choice
from lucid.engine.formats import STEP, STREAM, StateDevice

from . import gpu
from .arguments import check_page, count, write_page
from .report import Table, markdown, terminal
from .targets import Target, at_least, at_most

BEGIN = "<!-- measured: written by `python -m benchmarks.offload --markdown`; notes go outside -->"

IN_PLACE, MOMENTS, STAGED = "in place", "in place, moments only", "in chunks, updated on the host"
BUS = "the bus"
OFFLOADED, PAGED = "torchao CPUOffloadOptimizer", "bitsandbytes PagedAdamW8bit"
LIBRARY = {OFFLOADED: TORCHAO, PAGED: BITSANDBYTES}

LLAMA = "llama-1b"
SMALL = "10000x64x64"  # each just large enough for 8-bit state
SIZES: dict[str, Sequence[Shape]] = {
    LLAMA: llama_1b(),
    "gpt2-small": SHAPES["gpt2-small"].shapes,
    "10000x64": SHAPES["10000x64"].shapes,
    SMALL: 10_000 * [(64, 64)],
}
OWN: dict[str, StateDevice] = {IN_PLACE: "cpu", MOMENTS: "cpu:moments", STAGED: "cpu"}
WAYS = IN_PLACE, STAGED
# Shapes, a format, and who is timed; a step in chunks of thousands of tensors takes seconds, so it is timed once.
CASES = (
    (LLAMA, EIGHT_BIT, (*WAYS, PAGED)),
    (LLAMA, LUCID, (*WAYS, OFFLOADED)),
    (LLAMA, RESIDUAL_EIGHT_BIT, (*OWN, OFFLOADED, PAGED)),
    ("10000x64", LUCID, WAYS),
    (SMALL, EIGHT_BIT, (IN_PLACE, PAGED)),
    (LLAMA, BF16_STATE, WAYS),
    ("gpt2-small", EIGHT_BIT, (*WAYS, PAGED)),
    ("gpt2-small", LUCID, (*WAYS, OFFLOADED)),
    ("gpt2-small", BF16_STATE, WAYS),
    (SMALL, LUCID, (IN_PLACE,)),
    (SMALL, BF16_STATE, (IN_PLACE,)),
)
KINDS = {kind.name: kind for kind in FORMATS}

# Of a step of LLAMA on a PCIe 5 GPU.
MOST_MS = {(EIGHT_BIT, IN_PLACE): 80.0, (RESIDUAL_EIGHT_BIT, MOMENTS): 80.0, (LUCID, IN_PLACE): 250.0}
LEAST_OF_BUS = 0.85

BUS_BYTES = 2**28  # of each of the two copies
BUDGET_SECONDS = 3.0  # for a contender's samples in one case: the slow ones take part in the first rounds only
ASLEEP = 2**30  # cycles, half a second: longer than the host takes for a step in place


class Host(NamedTuple):
    """The host's seconds in a step, and whether it waited for the device."""

    seconds: float
    waited: bool


@dataclass(frozen=True, slots=True)
class Result(Timed):
    """One case and format; all by contender. ``moved``: bytes over the bus, in each direction. ``made``: seconds to
    make all state.
    """

    case: str
    format: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    made: dict[str, float] = field(default_factory=dict)
    host: dict[str, Host] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def of_bus(self, name: str) -> Quartiles:
        """Its bytes per second as a part of the bus's, within rounds."""
        part = self.moved[name] / self.moved[BUS]
        return Quartiles(*(part * each for each in self.times(BUS, name)))


# Contenders


def choose(way: str) -> None:
    """Set the line of the engine that says how it updates state on the host."""
    choice.IN_PLACE = way != STAGED


def _own(result: Result, kind: Format, way: str, params: list[Tensor]) -> Step:
    """Return lucid's step; add what is known of its state on the host, which a step reads and writes."""
    assert kind.state is not None
    choose(way)
    optimizer = lucid.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY, state_format=kind.state, state_device=OWN[way])
    started = time.perf_counter()
    optimizer.init_state()
    result.made[way] = time.perf_counter() - started
    slots = [slot for entry in optimizer.state.values() for key, slot in entry.items() if key not in (STEP, STREAM)]

    def step() -> None:
        choose(way)
        optimizer.step()

    result.moved[way] = sum(slot.nbytes for slot in slots if slot.device.type == "cpu")
    return step


def _offloaded(params: list[Tensor]) -> Step:
    """Return torchao's step with a backward that only delivers gradients: its hooks copy them to the host."""
    optimizer = importlib.import_module("torchao.optim").CPUOffloadOptimizer(params, lr=LR, weight_decay=WEIGHT_DECAY)
    gradients = [param.grad for param in params]

    def step() -> None:
        for param in params:
            param.grad = None
        torch.autograd.backward(params, gradients)
        optimizer.step()

    return step


def _paged(params: list[Tensor]) -> Step:
    step: Step = (
        importlib.import_module("bitsandbytes.optim").PagedAdamW8bit(params, lr=LR, weight_decay=WEIGHT_DECAY).step
    )
    return step


def _made(result: Result, kind: Format, name: str, params: list[Tensor]) -> Step:
    if name in OWN:
        return _own(result, kind, name, params)
    if not is_installed(LIBRARY[name]):
        raise ModuleNotFoundError(f"{LIBRARY[name]} is not installed")
    return (_offloaded if name == OFFLOADED else _paged)(params)


# Measuring


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how long steps are timed. ``dry``: on the CPU, with the first tensors of each case made tiny.

    ``bus``: copies in both directions at once, and the bytes of each.
    """

    device: torch.device
    dry: bool
    count: int
    until: float
    bus: tuple[Step, int]

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize(self.device)

    def shapes(self, case: str) -> Sequence[Shape]:
        shapes = SIZES[case]
        return [tuple(min(64, size) for size in shape) for shape in shapes[:9]] if self.dry else shapes

    def host(self, step: Step) -> Host:
        """Time the host in a step whose work the device has not begun when the host should be done."""
        self.wait()
        if self.dry:
            started = time.perf_counter()
            step()
            return Host(time.perf_counter() - started, False)
        torch.cuda._sleep(ASLEEP)  # type: ignore[no-untyped-call]
        awake = torch.cuda.Event()  # type: ignore[no-untyped-call]
        awake.record()
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        waited = awake.query()  # type: ignore[no-untyped-call]
        self.wait()
        return Host(seconds, waited)


def _bus(device: torch.device) -> tuple[Step, int]:
    if device.type == "cuda":
        return bus_copies(BUS_BYTES, device), BUS_BYTES
    one, other = torch.zeros(2**10), torch.ones(2**10)
    return lambda: one.copy_(other), one.nbytes


def measure(bench: Bench, case: str, kind: Format, names: Sequence[str]) -> Result:
    """Time one case in one format; each contender has parameters, gradients and state of its own."""
    gc.collect()  # what an earlier case held is free
    if not bench.dry:
        torch.cuda.empty_cache()
    bus, size = bench.bus
    result = Result(case, kind.name, moved={BUS: size})
    samplers: dict[str, Callable[[], float]] = {BUS: sampler(bus, warm=False, wait=bench.wait)}
    counts = {BUS: bench.count}
    for name in names:
        if time.perf_counter() > bench.until:
            result.failures[name] = "no time was left"
            continue
        try:
            with torch.device(bench.device):
                params = parameters(bench.shapes(case), kind.dtype)
            step = _made(result, kind, name, params)
            samplers[name] = sampler(step, warm=False, wait=bench.wait)
            result.host[name] = bench.host(step)
            started = time.perf_counter()
            samplers[name]()
            counts[name] = max(1, min(bench.count, int(BUDGET_SECONDS / (time.perf_counter() - started))))
        except Exception as error:  # what one lacks on this device, or in this version, costs not the others
            result.failures[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    if len(samplers) > 1:
        result.samples.update(rounds(samplers, counts, f"{case}, {kind.name}"))
    return result


# Reporting


def targets(results: Sequence[Result]) -> Iterator[Target]:
    """Yield what is asked of a step in place, next to what was measured."""
    for result, name in itertools.product(results, (IN_PLACE, MOMENTS)):
        what = f"{result.case}, {result.format}, {name}"
        if name not in result.samples:
            if result.case == LLAMA and name in (IN_PLACE, *result.failures):
                yield Target(what, "a measurement", "none", False)
            continue
        if result.case == LLAMA:
            if (result.format, name) in MOST_MS:
                yield at_most(f"{what}: a step", MOST_MS[result.format, name], 1e3 * result.seconds(name), " ms")
            yield at_least(f"{what}: part of the bus's limit", LEAST_OF_BUS, result.of_bus(name), "")
        host = result.host[name]
        yield Target(f"{what}: the host", "does not wait", "waits" if host.waited else "does not", not host.waited)


def warnings(results: Sequence[Result], *, dry: bool) -> list[str]:
    """Return what keeps the results from being quoted, and who is missing."""
    missing: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for failure in result.failures.items():
            missing.setdefault(failure, []).append(f"{result.case}, {result.format}")
    found = ["A dry run on the CPU: no figure means anything."] if dry else []
    return found + [f"{name} was not measured ({'; '.join(where)}): {why}" for (name, why), where in missing.items()]


def tables(results: Sequence[Result]) -> Iterator[Table]:
    """Yield what is asked and what was measured."""
    rows = [[what, wanted, got, "met" if met else "NOT MET"] for what, wanted, got, met in targets(results)]
    note = "Medians. The times are meant for a GPU on PCIe 5: compare the bus's GB/s below."
    yield Table("Targets of state on the host", note, ["target", "wanted", "measured", ""], rows)
    rows = [_row(result, name) for result in results for name in result.samples]
    note = (
        "Medians of the rounds. ×: its time over that of the step in place, within rounds. GB/s: of state, in each "
        "direction; of the bus: as a part of two simultaneous copies' GB/s, within rounds. host ms: until the call "
        "returns while the device is busy; in brackets if the host waited for it. torchao's step includes the copies "
        "of gradients that its hooks begin in backward. bitsandbytes' pages stay on the GPU as long as they fit. state "
        "s: to make all state, in place also to pin its memory."
    )
    header = ["", "ms", f"× {IN_PLACE}", "GB/s", "of the bus", "host ms", "state s"]
    yield Table("State on the host, by way", note, header, rows)


def _row(result: Result, name: str) -> list[str]:
    seconds = result.seconds(name)
    times = ratios(result.samples[name], result.samples[IN_PLACE]) if IN_PLACE in result.samples else None
    over = name in result.moved
    host = result.host.get(name)
    return [
        f"{result.case}, {result.format}: {name}",
        f"{1e3 * seconds:#.3g}".rstrip("."),
        "–" if times is None else f"{times.median:.2f} ({times.low:.2f}–{times.high:.2f})",
        f"{result.moved[name] / seconds / 1e9:.1f}" if over else "–",
        f"{result.of_bus(name).median:.2f}" if over else "–",
        "–" if host is None else f"({1e3 * host.seconds:.2f})" if host.waited else f"{1e3 * host.seconds:.2f}",
        f"{result.made[name]:.2f}" if name in result.made else "–",
    ]


# The command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offload", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=count, default=7, help="of all but the slow contenders (%(default)s)")
    parser.add_argument("--seconds", type=float, default=200.0, help="begin nothing after this (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="tiny tensors on the CPU, whether the script works")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="put the tables between this file's markers")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    until = time.perf_counter()
    parser = _parser()
    options = parser.parse_args(arguments)
    check_page(parser, options.markdown, BEGIN)
    if options.dry and options.markdown is not None:
        parser.error("--dry measures nothing: drop it, or --markdown")
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit(f"This measures on a CUDA device, and torch {torch.__version__} finds none here.")
    torch.manual_seed(0)
    device = torch.device("cpu" if options.dry else "cuda")
    described = timed_machine.description() if options.dry else gpu.description()
    bench = Bench(device, options.dry, options.rounds, until + options.seconds, _bus(device))
    results: list[Result] = []
    for case, name, names in tqdm(CASES, "cases", disable=None):
        results.append(measure(bench, case, KINDS[name], names))
        found = described, warnings(results, dry=options.dry), list(tables(results))
        if options.markdown is not None:  # after each case, so that a run that is cut short leaves something
            write_page(options.markdown, markdown(*found, "###"), BEGIN)
    print(terminal(*found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
