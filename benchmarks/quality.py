"""Train small real tasks in every number format, and tell whether they end as float32 does.

    python -m benchmarks.quality --jobs 2                # what has not been run yet; all of it takes 75 minutes
    python -m benchmarks.quality --quick                 # a look: a tenth of the steps, not for quoting
    python -m benchmarks.quality --task vit convnet --seeds 3
    python -m benchmarks.quality --report --markdown benchmarks/QUALITY.md --plot docs/quality.png

`quality_tasks` says what is trained, `quality_report` how a verdict is found. Every run that ends is appended to a file
of JSON lines, under a key of all that it depends on: the task with its hyperparameters and data, the configuration and
the bits that its optimizer computes, seed and versions. A run that stands there under the same key is not repeated, so
after Ctrl-C the same command goes on. Only a change of the networks' own code goes unseen: then begin a new file.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from . import quality_report as report
from .arguments import check_page, count, write_page
from .quality_tasks import BASELINE, CONFIGURATIONS, TASKS, Configuration, Outcome, Task, bits, train, versions

SEEDS = 8


class Run(NamedTuple):
    """One training: `train(*run)` is its outcome."""

    task: Task
    configuration: Configuration
    seed: int

    @property
    def title(self) -> str:
        return f"{self.task.name}, {self.configuration.name}, seed {self.seed}"

    def key(self, digest: str) -> str:
        """Return all that the outcome depends on; `digest` is what `bits(configuration)` returned."""
        configuration = asdict(self.configuration) | {"bits": digest}
        parts = {"task": self.task.identity(), "configuration": configuration, "seed": self.seed} | versions()
        return json.dumps(parts, sort_keys=True)


class Ended(NamedTuple):
    """A run that came to its end, and the seconds that it took."""

    outcome: Outcome
    seconds: float


class Journal:
    """The file of runs that have ended, one in a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Ended]:
        """Return them by key. A line that was cut off by a crash counts as not written."""
        found = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[json.dumps(entry["key"], sort_keys=True)] = Ended(Outcome(**entry["outcome"]), entry["seconds"])
        return found

    def append(self, key: str, ended: Ended) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"key": json.loads(key), "outcome": ended.outcome._asdict(), "seconds": round(ended.seconds, 1)}
        with self.path.open("a+b") as file:
            file.seek(max(0, file.seek(0, 2) - 1))
            if file.read() not in (b"", b"\n"):
                file.write(b"\n")  # a torn line stays alone
            file.write(json.dumps(entry).encode() + b"\n")


def serve(pipe: Connection) -> None:
    """In a worker: take runs from `pipe`; send None for each step, then Ended, or the stack of what was raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    faulthandler.enable()
    torch.set_num_threads(1)
    while True:
        try:
            run: Run = pipe.recv()
        except EOFError:
            return
        started = time.perf_counter()
        try:
            outcome = train(*run, advanced=lambda: pipe.send(None))
        except Exception:
            pipe.send(traceback.format_exc())
        else:
            pipe.send(Ended(outcome, time.perf_counter() - started))


class Worker:
    """A process that trains in one thread, one run after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads as they are
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=serve, args=(far,), daemon=True)
        self.process.start()
        far.close()
        self.run: Run | None = None
        self.steps = 0  # of that run, done

    def start(self, run: Run) -> None:
        self.pipe.send(run)
        self.run, self.steps = run, 0

    def receive(self) -> Ended | str | None:
        """Return the next message of a run; a crash of the process is one as well."""
        try:
            message: Ended | str | None = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return f"the worker died, with exit code {self.process.exitcode}; its stack stands above\n"
        return message

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()


def execute(runs: Sequence[Run], jobs: int, ended: Callable[[Run, Ended], object]) -> list[str]:
    """Run them all in `jobs` processes; return the titles of those that failed."""
    waiting = list(reversed(runs))
    failed: list[str] = []
    workers = [Worker() for _ in range(min(jobs, len(runs)))]
    bar = tqdm(total=sum(run.task.steps for run in runs), unit="step", smoothing=0, disable=None)
    try:
        while True:
            for worker in workers:
                if worker.run is None and waiting:
                    worker.start(waiting.pop())
            busy = {worker.pipe: worker for worker in workers if worker.run is not None}
            if not busy:
                return failed
            names = " | ".join(worker.run.title for worker in busy.values() if worker.run is not None)
            bar.set_postfix_str(f"{len(waiting) + len(busy)} runs left: {names}", refresh=False)
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]  # `wait` says that it may return sockets
                run, message = worker.run, worker.receive()
                assert run is not None
                if message is None:
                    worker.steps += 1
                    bar.update()
                    continue
                if isinstance(message, Ended):
                    ended(run, message)
                else:
                    failed.append(run.title)
                    bar.write(f"{run.title} failed:\n{message}")
                    bar.update(run.task.steps - worker.steps)
                worker.run = None
                if not worker.process.is_alive():
                    workers[workers.index(worker)] = Worker()
    finally:
        bar.close()
        for worker in workers:
            worker.stop()


@dataclass(frozen=True, slots=True)
class Study:
    """The runs that were asked for, by key, and the file where those that have ended stand."""

    runs: dict[str, Run]
    journal: Journal

    def missing(self) -> list[Run]:
        done = self.journal.read()
        return [run for key, run in self.runs.items() if key not in done]

    def execute(self, jobs: int) -> list[str]:
        keys = {run: key for key, run in self.runs.items()}
        return execute(self.missing(), jobs, lambda run, ended: self.journal.append(keys[run], ended))

    def results(self) -> tuple[dict[Task, report.Runs], dict[Task, float]]:
        """Return what the report is made of, and the median seconds of a run, by task."""
        done = self.journal.read()
        results: dict[Task, dict[str, dict[int, Outcome]]] = {}
        seconds: dict[Task, list[float]] = {}
        for key, run in self.runs.items():
            if key in done:
                of_task = results.setdefault(run.task, {name: {} for name in CONFIGURATIONS})
                of_task[run.configuration.name][run.seed] = done[key].outcome
                seconds.setdefault(run.task, []).append(done[key].seconds)
        return dict(results), {task: statistics.median(taken) for task, taken in seconds.items()}


def study(tasks: Sequence[Task], configurations: Sequence[Configuration], seeds: int, journal: Journal) -> Study:
    """Return a study whose runs go seed by seed: what is there after a while is whole for the seeds that it has."""
    digests = {configuration: bits(configuration) for configuration in configurations}
    runs = [Run(t, c, seed) for seed in range(seeds) for t in tasks for c in configurations]
    return Study({run.key(digests[run.configuration]): run for run in runs}, journal)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.partition("\n")[0])
    choice: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--task", **choice, choices=TASKS, default=list(TASKS), help=", ".join(TASKS))
    names = list(CONFIGURATIONS)
    parser.add_argument("--configuration", **choice, choices=names, default=names, help=", ".join(names))
    parser.add_argument("--seeds", type=count, default=SEEDS, help=f"of each: 0 … SEEDS - 1 ({SEEDS})")
    parser.add_argument("--jobs", type=count, default=1, help="runs at a time, each in a process of one thread (1)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps: a look, not for quoting")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    parser.add_argument("--journal", type=Path, default=Path("runs/quality.jsonl"), help="file of the runs that ended")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="put the tables between this file's markers")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the differences into this PNG")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    check_page(parser, options.markdown, report.BEGIN, quick=options.quick)
    torch.set_num_threads(1)
    tasks = [TASKS[name] for name in dict.fromkeys(options.task)]
    if options.quick:
        tasks = [replace(task, steps=task.steps // 10) for task in tasks]
    # fp32 comes with every choice: there is nothing to compare with otherwise.
    configurations = [c for name, c in CONFIGURATIONS.items() if name in {BASELINE, *options.configuration}]
    asked = study(tasks, configurations, options.seeds, Journal(options.journal))
    failed = []
    if not options.report:
        try:
            failed = asked.execute(options.jobs)
        except KeyboardInterrupt:
            print(f"\nstopped, {len(asked.missing())} of {len(asked.runs)} runs to go: the same command goes on")
            return 130

    results, seconds = asked.results()
    print(report.terminal(results, seconds))
    if options.markdown is not None:
        write_page(options.markdown, report.markdown(results, seconds), report.BEGIN)
    if options.plot is not None:
        try:
            report.draw(results, options.plot)
        except (OSError, ValueError) as error:
            parser.error(f"--plot {options.plot}: {error}")
    if failed:
        print("\nfailed:\n" + "\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
