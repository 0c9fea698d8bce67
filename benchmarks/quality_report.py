"""Whether a format trains as float32 does: the verdict, the tables and the picture of the quality study.

The test, for one task and one configuration over n seeds. dᵢ is its held-out loss at seed i minus lucid fp32's at the
same seed; σ is the standard deviation of lucid fp32's held-out losses over the seeds (torch fp32's add nothing to it:
they see the same seeds). The configuration ends *inside* fp32's seed spread if and only if

- its mean loss lies between the least and the largest of lucid fp32's, and
- the whole 95 % confidence interval of the mean difference, d̄ ± t(0.975, n − 1) · s(d) / √n, lies within ±σ.

The second is a test of equivalence (two one-sided t-tests, each at 2.5 %): too few seeds, or too noisy ones, make it
fail. It takes σ as known, so that it means "by less than what another seed would change, as it was seen here".
Where it fails, the verdict is *worse* or *better* if the interval lies on one side of zero, or a run came to no finite
loss, and *unclear* otherwise: more seeds would tell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student

from . import machine
from .quality_tasks import BASELINE, CONFIGURATIONS, Outcome, Task
from .report import Table
from .tables import markdown_table, terminal_table

BEGIN = "<!-- measured: written by `python -m benchmarks.quality --markdown`; notes go outside -->"

LEAST = 3  # seeds for a verdict

Runs = Mapping[str, Mapping[int, Outcome]]  # of one task: by configuration and seed
Verdict = Literal["inside", "better", "worse", "unclear"]


@dataclass(frozen=True, slots=True)
class Spread:
    """lucid fp32's held-out losses over the seeds."""

    mean: float
    sigma: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, runs: Runs) -> Spread | None:
        losses = [outcome.loss for outcome in runs.get(BASELINE, {}).values()]
        if len(losses) < LEAST:
            return None
        return cls(statistics.fmean(losses), statistics.stdev(losses), min(losses), max(losses), len(losses))


@dataclass(frozen=True, slots=True)
class Difference:
    """Of a configuration from lucid fp32, over the seeds that both have run: d̄ and its 95 % interval's half width."""

    mean: float
    half: float
    loss: float  # the configuration's mean
    spread: Spread

    @classmethod
    def of(cls, runs: Runs, name: str) -> Difference | None:
        spread, own, base = Spread.of(runs), runs.get(name, {}), runs.get(BASELINE, {})
        seeds = sorted(own.keys() & base.keys())
        if spread is None or len(seeds) < LEAST:
            return None
        losses = [own[seed].loss for seed in seeds]
        paired = [loss - base[seed].loss for loss, seed in zip(losses, seeds, strict=True)]
        if not all(map(math.isfinite, paired)):
            return cls(math.nan, math.nan, math.nan, spread)
        half = float(student.ppf(0.975, len(seeds) - 1)) * statistics.stdev(paired) / math.sqrt(len(seeds))
        return cls(statistics.fmean(paired), half, statistics.fmean(losses), spread)

    @property
    def verdict(self) -> Verdict:
        low, high = self.mean - self.half, self.mean + self.half
        if self.spread.low <= self.loss <= self.spread.high and -self.spread.sigma <= low <= high <= self.spread.sigma:
            return "inside"
        if not math.isfinite(self.mean) or low > 0:
            return "worse"
        return "better" if high < 0 else "unclear"


def tables(results: Mapping[Task, Runs], seconds: Mapping[Task, float]) -> Iterator[Table]:
    """Yield the tasks and fp32's spread on them, the differences with their verdicts, and the accuracies."""
    header = ["task", "parameters", "in 8 bits", "steps", "seconds", "peak lr", "seeds"]
    header += ["loss", "σ", "least", "largest"]
    rows = []
    for task, runs in results.items():
        if (spread := Spread.of(runs)) is None:
            continue
        shapes = [parameter.shape for parameter in task.network().parameters()]
        total = sum(map(math.prod, shapes))
        coded = sum(math.prod(s) for s in shapes if len(s) >= 2 and math.prod(s) >= 4096 and math.prod(s[1:]) >= 64)
        row = [task.title, f"{total:,}", f"{coded / total:.1%}", f"{task.steps}", f"{seconds[task]:.0f}"]
        row += [f"{task.lr:g}", f"{spread.seeds}"]
        rows.append([*row, *(f"{loss:.4f}" for loss in (spread.mean, spread.sigma, spread.low, spread.high))])
    note = f"Held-out loss of {BASELINE} in nats: mean, standard deviation and range over the seeds."
    yield Table("Tasks", note, header, rows)

    names = [name for name in CONFIGURATIONS if any(runs.get(name) for runs in results.values())]
    header = ["", *(task.title for task in results)]
    rows = [
        [name, *(_difference(Difference.of(runs, name)) for runs in results.values())]
        for name in names
        if name != BASELINE
    ]
    note = (
        f"Held-out loss minus {BASELINE}'s at the same seed, in thousandths of a nat: mean ± half its 95 % confidence "
        f"interval (Student's t). inside: the mean loss lies in {BASELINE}'s range over the seeds, and the "
        "whole interval within ± σ of the table above. Otherwise worse or better if the interval excludes zero, and "
        "unclear if it does not."
    )
    yield Table("Differences", note, header, rows)

    rows = [[name, *(_accuracy(runs.get(name, {})) for runs in results.values())] for name in names]
    note = "Accuracy on the held-out data in % (GPT: of the next character): mean ± standard deviation over the seeds."
    yield Table("Accuracy", note, header, rows)


def _difference(found: Difference | None) -> str:
    if found is None:
        return "–"
    return f"{1e3 * found.mean:+.2f} ± {1e3 * found.half:.2f} {found.verdict}"


def _accuracy(outcomes: Mapping[int, Outcome]) -> str:
    found = [100 * outcome.accuracy for outcome in outcomes.values()]
    if len(found) < LEAST:
        return "–"
    return f"{statistics.fmean(found):.2f} ± {statistics.stdev(found):.2f}"


def terminal(results: Mapping[Task, Runs], seconds: Mapping[Task, float]) -> str:
    """Return the report for people at a terminal."""
    return "\n\n".join(
        f"{title.upper()}  {note}\n{terminal_table(header, rows)}"
        for title, note, header, rows in tables(results, seconds)
    )


def markdown(results: Mapping[Task, Runs], seconds: Mapping[Task, float]) -> str:
    """Return the same report for QUALITY.md."""
    about = machine.description()
    parts = ["\n".join(f"- {name}: {about[name]}" for name in ("CPU", "versions", "date"))]
    for title, note, header, rows in tables(results, seconds):
        parts.append(f"## {title}\n\n{note}\n\n{markdown_table(header, rows)}")
    return "\n\n".join(parts)


def draw(results: Mapping[Task, Runs], path: Path) -> None:
    """Draw a panel for each task with a row for each configuration."""
    results = {task: runs for task, runs in results.items() if Spread.of(runs)}
    if not results:
        raise ValueError(f"expected at least {LEAST} seeds of {BASELINE} on some task: there is nothing to draw yet")
    names = [name for name in CONFIGURATIONS if any(runs.get(name) for runs in results.values())]
    figure = Figure(figsize=(2 + 2.7 * len(results), 1.6 + 0.5 * len(names)), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (task, runs) in zip(panels, results.items(), strict=True):
        _panel(axes, task, runs, names)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    pairs = zip(*panels[0].get_legend_handles_labels(), strict=True)
    handles = {label: handle for handle, label in reversed(list(pairs))}  # the first of each label
    figure.legend(
        [*handles.values()][::-1], [*handles][::-1], loc="outside lower center", ncols=len(handles), frameon=False
    )
    figure.suptitle(f"Held-out loss minus the mean of {BASELINE}, in thousandths of a nat: left is better")
    figure.savefig(path)


def _panel(axes: Axes, task: Task, runs: Runs, names: Sequence[str]) -> None:
    spread = Spread.of(runs)
    assert spread is not None
    low, high, sigma = (1e3 * x for x in (spread.low - spread.mean, spread.high - spread.mean, spread.sigma))
    edge = 1.7 * max(-low, high)  # what lies beyond is shown there, lest one bad row flattens the others
    axes.axvspan(low, high, color="0.94", label=f"range of {BASELINE}")
    axes.axvspan(-sigma, sigma, color="0.86", label="± σ")
    axes.axvline(0, color="white", linewidth=1)
    for y, name in enumerate(names):
        losses = [outcome.loss for _, outcome in sorted(runs.get(name, {}).items())]
        colour = "C0" if CONFIGURATIONS[name].package == "lucid" else "C1"
        for i, loss in enumerate(losses):
            x = 1e3 * (loss - spread.mean)
            marker = "o" if abs(x) <= edge else "<" if x < 0 else ">"  # NaN: to the right
            at = x if marker == "o" else -edge if marker == "<" else edge
            height = y + 0.3 * (i / max(1, len(losses) - 1) - 0.5)
            label = f"a seed, {CONFIGURATIONS[name].package}"
            axes.plot(at, height, marker, color=colour, alpha=0.65, ms=4.5, mew=0, label=label)
        found = None if name == BASELINE else Difference.of(runs, name)
        if found is None:
            continue
        mean, half, words = 1e3 * found.mean, 1e3 * found.half, f"{found.verdict}"
        if abs(mean) <= edge:
            label = "mean difference by seed, 95 % interval"
            axes.errorbar(mean, y, xerr=half, fmt="k|", ms=9, lw=1.5, capsize=3, label=label)
        else:
            words = f"{mean:+.0f}: {words}"
        inside = found.verdict == "inside"
        axes.text(edge, y - 0.25, words, ha="right", va="center", fontsize=7.5, color="0.4" if inside else "C3")
    axes.set_xlim(-1.05 * edge, 1.05 * edge)
    axes.set_title(task.title, fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.spines[["top", "right", "left"]].set_visible(False)
