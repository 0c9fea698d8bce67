"""Time the AdamW step on a CUDA device beside its peers and a plain copy, with what it takes of memory.

    python -m benchmarks.gpu                            # all of it: some five minutes on an H100
    python -m benchmarks.gpu --quick --case 256M        # a look: few rounds, not for quoting
    python -m benchmarks.gpu --markdown benchmarks/RESULTS-gpu.md
    python -m benchmarks.gpu --report --markdown benchmarks/RESULTS-gpu.md  # measures nothing anew

A sample is a queue of steps and the wait for its end: what a training loop sees, where nothing waits
between. Contenders that do not fit on the device together are made anew for each of their samples.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import lucid.optim
from lucid.bench.contenders import BITSANDBYTES_32, FOREACH, FUSED, FUSED_BF16, LIBRARIES, LUCID, Contender, Step
from lucid.bench.paired import Quartiles, Timed, rounds
from lucid.bench.shapes import CASES as SHAPES
from lucid.bench.shapes import Case, llama_1b

from . import machine, report
from .arguments import check_page, count, write_page
from .averages import AVERAGED, FUSED_AVERAGED
from .averages import CASES as AVERAGES
from .clipping import CLIPPED, FUSED_CLIPPED
from .gpu_contenders import (
    COPY,
    EVERY_FORMAT,
    FUSED_GRAPH,
    GRAPH,
    OWN,
    contenders,
    rivals,
)
from .report import Table

BEGIN = "<!-- measured: written by `python -m benchmarks.gpu --markdown`; notes go outside -->"

SAMPLE_SECONDS = 0.05  # at least, for each sample
BUDGET_SECONDS = 4.0  # for a contender's samples in one case: the slow ones take part in the first rounds only
LEAST_ROUNDS = 3
WARM_UP = 3  # steps: state is created, kernels are compiled
PART_FILLED = 0.8  # of the free memory, by contenders that stay

FLOAT32 = (LUCID, FUSED, FOREACH, BITSANDBYTES_32)
STEPS = {
    "1G": (Case("1G", [(2**20, 2**10)]), (COPY, LUCID, FUSED)),
    "256M": (Case("256M", [(2**18, 2**10)]), EVERY_FORMAT),
    "llama-1b": (Case("llama-1b", llama_1b()), EVERY_FORMAT),
    "gpt2-small": (SHAPES["gpt2-small"], (COPY, *FLOAT32)),
    "1000x1000": (SHAPES["1000x1000"], FLOAT32),
    "10000x64": (SHAPES["10000x64"], FLOAT32),
}
GRAPHS = {f"graph-{name}": (SHAPES[name], (LUCID, GRAPH, FUSED_GRAPH)) for name in ("gpt2-small", "10000x64")}
CLIPPING = {"clip-llama-1b": (STEPS["llama-1b"][0], (LUCID, CLIPPED, FUSED, FUSED_CLIPPED))}
AVERAGING = {name: (case, (LUCID, AVERAGED, FUSED, FUSED_AVERAGED)) for name, case in AVERAGES.items()}
CASES = STEPS | GRAPHS | CLIPPING | AVERAGING

# Of the cases above that have a table of their own: who is compared with whom.
PAIRS = (
    (GRAPH, FUSED_GRAPH),
    (GRAPH, LUCID),
    (CLIPPED, FUSED_CLIPPED),
    (LUCID, CLIPPED),
    (AVERAGED, FUSED_AVERAGED),
    (LUCID, AVERAGED),
)


class Sample(NamedTuple):
    """Seconds a step: until all was done, and between two events on the device."""

    wall: float
    device: float


@dataclass(frozen=True, slots=True)
class CaseResult(Timed):
    """One case; all by contender."""

    tensors: int
    elements: int
    samples: dict[str, list[float]]  # seconds a step, the n-th of each of the same round
    device: dict[str, list[float]]  # of these, between two events
    moved: dict[str, float]  # bytes a parameter that must move
    held: dict[str, int]  # bytes of weights, gradients and state
    extra: dict[str, int]  # bytes by which a step's peak exceeds what was allocated before
    failures: dict[str, str]

    def gigabytes(self, name: str) -> float:
        """GB/s, of what must move."""
        return self.moved[name] * self.elements / self.seconds(name) / 1e9

    def of_copy(self, name: str) -> float | None:
        """Its bytes a second as a part of the copy's, within rounds; None where the copy did not take part."""
        if COPY not in self.samples:
            return None
        return self.times(COPY, name).median * self.moved[name] / self.moved[COPY]


@dataclass(slots=True)
class Results:
    """One run; what was not asked for is empty."""

    machine: dict[str, str]
    quick: bool
    cases: dict[str, CaseResult] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        saved = json.loads(path.read_text())
        cases = {name: CaseResult(**case) for name, case in saved["cases"].items()}
        return cls(saved["machine"], saved["quick"], cases)


# Measuring


class Trial:
    """A contender in a case: made once to see what it takes, and again for its samples."""

    def __init__(self, contender: Contender, case: Case) -> None:
        self._contender, self._shapes = contender, case.shapes
        self._step: Step | None = None
        self.stays = False
        before = torch.cuda.memory_allocated()
        step = self._made()
        self.held = torch.cuda.memory_allocated() - before
        self.extra = _extra_bytes(step)
        taken = min(_timed(step, 1).wall for _ in range(3))
        self._repetitions = math.ceil(SAMPLE_SECONDS / taken)
        self.seconds = self._repetitions * taken

    def _made(self) -> Step:
        step = self._contender.make(self._shapes, "cuda")
        for _ in range(WARM_UP):
            step()
        torch.cuda.synchronize()
        return step

    def sample(self) -> Sample:
        """Time as many steps as one sample needs."""
        step = self._step or self._made()
        if self.stays:
            self._step = step
        found = _timed(step, self._repetitions)
        del step
        if not self.stays:
            gc.collect()  # what it held is free for the next
        return found


def _timed(step: Step, repetitions: int) -> Sample:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    step()  # wakes the device, and fills what caches there are
    torch.cuda.synchronize()
    started = time.perf_counter()
    begin.record()
    for _ in range(repetitions):
        step()
    end.record()
    torch.cuda.synchronize()
    wall = time.perf_counter() - started
    return Sample(wall / repetitions, begin.elapsed_time(end) / 1e3 / repetitions)


def _extra_bytes(step: Step) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(name: str, count: int) -> CaseResult:
    """Time one case; each contender has parameters, gradients and state of its own."""
    case, names = CASES[name]
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()

    found = contenders()
    trials: dict[str, Trial] = {}
    failures = {}
    for contender in tqdm([found[each] for each in names if each in found], f"{name}: make", leave=False, disable=None):
        try:
            trials[contender.name] = Trial(contender, case)
        except Exception as error:  # what one lacks on this device, or in this version, costs not the others
            failures[contender.name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        gc.collect()

    gc.freeze()  # so that the collections between samples look at little
    needed = sum(trial.held for trial in trials.values()) + max((trial.extra for trial in trials.values()), default=0)
    for trial in trials.values():
        trial.stays = needed <= PART_FILLED * free
    counts = {
        each: min(count, max(LEAST_ROUNDS, int(BUDGET_SECONDS / trial.seconds))) for each, trial in trials.items()
    }
    samples = rounds({each: trial.sample for each, trial in trials.items()}, counts, name) if trials else {}
    return CaseResult(
        len(case.shapes),
        case.elements,
        {each: [sample.wall for sample in taken] for each, taken in samples.items()},
        {each: [sample.device for sample in taken] for each, taken in samples.items()},
        {each: found[each].moved(case.shapes) / case.elements for each in trials},
        {each: trial.held for each, trial in trials.items()},
        {each: trial.extra for each, trial in trials.items()},
        failures,
    )


def description() -> dict[str, str]:
    """Return device, machine, versions and date, each as a line for people."""
    device = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.partition("\n")[0]
    versions = []
    for name in ("triton", *LIBRARIES):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    param = torch.zeros(1, device="cuda", requires_grad=True)
    return {
        "GPU": f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {device.multi_processor_count} multiprocessors, "
        f"driver {driver or 'unknown'}",
        "beside": ", ".join(versions),
        "engine": lucid.optim.AdamW([param]).engine_for(param),
        **machine.description(),
    }


# Reporting


def warnings(results: Results) -> list[str]:
    """Return what keeps the results from being quoted, and who is missing."""
    found = ["A quick run: few rounds, not for quoting."] if results.quick else []
    for name, case in results.cases.items():
        found += [f"{name}: {contender} was not measured. {why}" for contender, why in case.failures.items()]
    return found


def tables(results: Results) -> Iterator[Table]:
    """Yield a table for each thing that was measured."""
    steps = {name: case for name, case in results.cases.items() if name in STEPS}
    others = {name: case for name, case in results.cases.items() if name not in STEPS}
    if steps:
        yield _beside(steps)
    if others:
        yield _pairs(others)
    if steps:
        yield _each(steps)


def _beside(cases: dict[str, CaseResult]) -> Table:
    found = [(name, case, own) for name, case in cases.items() for own in OWN if own in case.samples]
    columns = [
        column
        for column in (FUSED, FUSED_BF16, FOREACH, *LIBRARIES)
        if any(rivals(own).get(column) in case.samples for _, case, own in found)
    ]
    rows = []
    for name, case, own in found:
        beside = (rivals(own).get(column) for column in columns)
        rows.append(
            [
                f"{name}: {own}",
                _milliseconds(case.samples[own]),
                f"{case.gigabytes(own):,.0f}",
                _part(case.of_copy(own)),
                *(_spread(case.times(peer, own)) if peer in case.samples else "–" for peer in beside),
                _mebibytes(case.extra[own]),
            ]
        )
    note = (
        "× peer: its time over lucid's in the same round, median (quartiles); above 1, lucid is faster. Libraries: in "
        "the format that is like the row's. GB/s: what must move. of copy: as a part of a device copy's."
    )
    header = ["", "ms", "GB/s", "of copy", *(f"× {column}" for column in columns), "extra MiB"]
    return Table("Lucid beside its peers", note, header, rows)


def _pairs(cases: dict[str, CaseResult]) -> Table:
    rows = [
        [
            name,
            own,
            _milliseconds(case.samples[own]),
            peer,
            _milliseconds(case.samples[peer]),
            _spread(case.times(peer, own)),
        ]
        for name, case in cases.items()
        for own, peer in PAIRS
        if own in case.samples and peer in case.samples
    ]
    note = "×: the second's time over the first's. Graphs: the step captured once and replayed."
    return Table("CUDA graphs, clipping, averages", note, ["case", "first", "ms", "second", "ms", "×"], rows)


def _each(cases: dict[str, CaseResult]) -> Table:
    rows = [
        [
            f"{name}: {each}",
            _milliseconds(case.samples[each]),
            _milliseconds(case.device[each]),
            f"{case.gigabytes(each):,.0f}",
            _part(case.of_copy(each)),
            f"{case.held[each] / case.elements:.2f}",
            _mebibytes(case.extra[each]),
        ]
        for name, case in cases.items()
        for each in case.samples
    ]
    counts = [len(taken) for case in cases.values() for taken in case.samples.values()]
    note = (
        f"Medians of {max(counts, default=0)} rounds, of slow steps {min(counts, default=0)} at least. GPU ms: between "
        "two events on the device, around the same steps. bytes: a parameter's, of weight, gradient and state. extra "
        "MiB: by which a step's peak of memory exceeds these."
    )
    header = ["", "ms", "GPU ms", "GB/s", "of copy", "bytes", "extra MiB"]
    return Table("Each contender", note, header, rows)


def _milliseconds(seconds: Sequence[float]) -> str:
    return _digits(1e3 * Quartiles.of(seconds).median)


def _part(part: float | None) -> str:
    return "–" if part is None else f"{part:.3f}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _spread(found: Quartiles) -> str:
    return f"{_digits(found.median)} ({_digits(found.low)}–{_digits(found.high)})"


def _digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")  # three, zeros too


# The command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    names = list(CASES)
    parser.add_argument("--case", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rounds", type=count, help="of all but the slow contenders (15)")
    parser.add_argument("--quick", action="store_true", help="few rounds: a look, not for quoting")
    parser.add_argument("--report", action="store_true", help="measure nothing, report what is in --json")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"), help="file of the samples (%(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="put the tables between this file's markers")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    check_page(parser, options.markdown, BEGIN, quick=options.quick)
    if options.report:
        try:
            results = Results.read(options.json)
        except OSError as error:
            parser.error(f"--report: {error}; measure first, without it")
    elif not torch.cuda.is_available():
        raise SystemExit(f"This measures on a CUDA device, and torch {torch.__version__} finds none here.")
    else:
        torch.manual_seed(0)
        results = Results(description(), options.quick)
        bar = tqdm(list(dict.fromkeys(options.case)), "cases", disable=None)
        for name in bar:
            bar.set_postfix_str(name)
            results.cases[name] = measure(name, options.rounds or (LEAST_ROUNDS if options.quick else 15))
            results.write(options.json)  # so that a run that is cut short can be reported
    found = results.machine, warnings(results), list(tables(results))
    print(report.terminal(*found))
    if options.markdown is not None:
        write_page(options.markdown, report.markdown(*found), BEGIN)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
