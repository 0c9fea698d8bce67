"""Time the AdamW step of `lucid.optim` beside its peers, in paired rounds in one process.

    python -m benchmarks.step                            # all of it
    python -m benchmarks.step --quick                    # a look: few rounds, not for quoting
    python -m benchmarks.step --case 64M loop-gpt        # some of it
    python -m benchmarks.step --markdown benchmarks/RESULTS.md

The step alone is timed with a pause before each sample, so that no other contender's threads still
spin; the training loops are timed with torch's threads as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lucid.bench.contenders import FUSED, LIMIT, LUCID, SLOW, mover, optimizers
from lucid.bench.machine import Neighbours, last_level_cache
from lucid.bench.paired import rounds, sampler
from lucid.bench.shapes import CASES, Case

from . import averages, clipping, footprint, formats, machine, overhead, report
from .arguments import check_page, count, write_page
from .results import Results, StepResult
from .training import TRAININGS, time_training

OTHERS = ("import", "overhead")


def time_step(case: Case, count: int, slow_count: int) -> StepResult:
    """Time one case; each contender has parameters, gradients and state of its own."""
    large = case.bytes >= 4 * last_level_cache()
    values = [torch.empty(shape).normal_(std=0.02) for shape in case.shapes]
    gradients = [torch.empty(shape).normal_(std=1e-3) for shape in case.shapes]

    def params() -> list[Tensor]:
        own = []
        for value, gradient in zip(values, gradients, strict=True):
            param = value.clone().requires_grad_()
            param.grad = gradient.clone()
            own.append(param)
        return own

    steps: dict[str, Callable[[], object]] = {}
    for name, make in optimizers(amsgrad=case.amsgrad).items():
        steps[name] = make(params()).step
    values, gradients = [], []
    if large and not case.amsgrad:
        steps[LIMIT] = mover(case.elements)
    samplers = {name: sampler(step, warm=not large) for name, step in steps.items()}
    counts = {name: slow_count if name in SLOW else count for name in samplers}
    samples = rounds(samplers, counts, case.name)
    temporary = {
        name: size
        for name, step in steps.items()
        if large and name != LIMIT and (size := footprint.temporary_bytes(step)) is not None
    }
    return StepResult.of(case, samples, temporary)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.partition("\n")[0])
    names = [*CASES, *formats.CASES, *clipping.CASES, *averages.CASES, *TRAININGS, *OTHERS]
    parser.add_argument("--case", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rounds", type=count, help="pairs of lucid and its fast peers (61)")
    parser.add_argument("--quick", action="store_true", help="few rounds: a look, not for quoting")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every sample there")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="put the tables between this file's markers")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    check_page(parser, options.markdown, quick=options.quick)
    rounds_wanted: int = options.rounds or (5 if options.quick else 61)
    slow_count = min(rounds_wanted, 1 if options.quick else 9)
    trained = {name: make for name, make in optimizers().items() if name in (LUCID, FUSED)}

    results = Results(machine.description(), options.quick)
    torch.manual_seed(0)
    neighbours = Neighbours()
    bar = tqdm(list(dict.fromkeys(options.case)), "cases", disable=None)
    for name in bar:
        bar.set_postfix_str(name)
        if name in CASES:
            results.steps[name] = time_step(CASES[name], rounds_wanted, slow_count)
        elif name in formats.CASES:
            results.formats[name] = formats.time_formats(name, rounds_wanted)
        elif name in clipping.CASES:
            results.clipping[name] = clipping.time_clipping(name, rounds_wanted)
        elif name in averages.CASES:
            results.averages[name] = averages.time_averages(name, rounds_wanted)
        elif name in TRAININGS:
            results.loops[name] = time_training(TRAININGS[name], trained, rounds_wanted)
        elif name == "import":
            results.imports = footprint.import_seconds(2 if options.quick else max(9, rounds_wanted // 4))
        else:
            results.overhead = overhead.accounts()
    results.neighbours = neighbours.share()
    results.machine["neighbours"] = f"took {results.neighbours:.1%} of all cores' time meanwhile"
    found = results.machine, report.warnings(results), list(report.tables(results))
    print(report.terminal(*found))
    if options.json is not None:
        report.write_json(results, options.json)
    if options.markdown is not None:
        write_page(options.markdown, report.markdown(*found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
