"""Draw the committed results: reads the tables of benchmarks/*.md and writes the pictures of docs/benchmarks.md.

    python -m benchmarks.pictures

Nothing is measured here. Each picture has a digest of its numbers in it, by which the tests see that it is of the
tables as they are now.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pictures"

LUCID, OTHER = "#00695c", "#90a4ae"
PEERS = {
    "torch fused": "#37474f",
    "torch foreach": "#78909c",
    "torch default": "#b0bec5",
    "DeepSpeed CPUAdam": "#bf6f2d",
}
BESIDE = {"lucid": LUCID} | {peer: colour for peer, colour in PEERS.items() if peer.startswith("torch")}
TASKS = ("#00695c", "#5e35b1", "#bf6f2d", "#1565c0")

Row = dict[str, str]
Bars = dict[str, dict[str, float]]  # by row and series


def table(report: str, heading: str) -> list[Row]:
    """Return the rows of the first table below a heading of a report, by their column's name."""
    text = (ROOT / "benchmarks" / report).read_text("utf-8")
    lines = iter(text[text.index(f"\n{heading}\n") :].splitlines())
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in _lines_of_table(lines)]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def _lines_of_table(lines: Any) -> list[str]:
    found: list[str] = []
    for line in lines:
        if line.startswith("|"):
            found.append(line)
        elif found:
            break
    return found


def number(cell: str) -> float | None:
    """Return the first number of a cell such as "1,024", "8.4 (7.6–12.5)"; None where there is none."""
    found = re.match(r"[+-]?[\d,]*\.?\d+", cell)
    return None if found is None else float(found[0].replace(",", ""))


# What is drawn


def cpu_data() -> Bars:
    """How many times as long each peer takes for a step as lucid."""
    cases = {
        "64M": "1 tensor of 67 M",
        "gpt2-small": "GPT-2 small",
        "resnet50": "ResNet-50",
        "1000x1000": "1,000 of 1,000",
        "1000x64": "1,000 of 64",
        "10000x64": "10,000 of 64",
    }
    rows = {row["case"]: row for row in table("RESULTS.md", "## The step alone")}
    return {
        label: {peer: value for peer in PEERS if (value := number(rows[case][f"× {peer}"])) is not None}
        for case, label in cases.items()
    }


def formats_data() -> Bars:
    """Bytes a parameter and times of a step of 67 M, by format."""
    column = "× torch fused"
    return {
        row[""]: {"bytes": _sure(row["bytes a parameter"]), "×": _sure(row[column])}
        for row in table("RESULTS.md", "## Formats: 64M")
    }


def temporary_data() -> Bars:
    """MiB that a step takes beside what was there before."""
    labels = {"64M": "1 tensor of 67 M", "gpt2-small": "GPT-2 small", "resnet50": "ResNet-50"}
    rows = {row["case"]: row for row in table("RESULTS.md", "## Temporary memory")}
    return {label: {peer: _sure(rows[case][peer]) for peer in BESIDE} for case, label in labels.items()}


def gpu_data() -> Bars:
    """Ms of a step of Llama 3.2 1B on a GPU, by contender."""
    rows = table("RESULTS-gpu.md", "## Each contender")
    found = {row[""].removeprefix("llama-1b: "): row for row in rows if row[""].startswith("llama-1b: ")}
    return {
        name: {"ms": _sure(row["ms"]), "bytes": _sure(row["bytes"])} for name, row in found.items() if name != "copy"
    }


def quality_data() -> dict[str, dict[str, tuple[float, float]]]:
    """Loss beside lucid's fp32 in thousandths of a nat, mean and half its interval, by format and task."""
    found = {}
    for row in table("QUALITY.md", "## Differences"):
        name = row.pop("")
        pairs = {task: re.match(r"([+-][\d.]+) ± ([\d.]+)", cell) for task, cell in row.items()}
        found[name] = {task: (float(pair[1]), float(pair[2])) for task, pair in pairs.items() if pair is not None}
    return found


def _sure(cell: str) -> float:
    value = number(cell)
    if value is None:
        raise ValueError(f"expected a number in the table, got {cell!r}")
    return value


# How it is drawn: narrow, with large letters, so that it can be read on a telephone


def _figure(height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=13, x=0, wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=12, left=False)
    return figure, axes


def _grouped(figure: Figure, axes: Axes, data: Bars, colours: dict[str, str], form: Callable[[float], str]) -> None:
    """Draw a group of lying bars for each row, the first on top, each with its number."""
    place, ticks = 0.0, []
    for row in data.values():
        shown = [(series, row[series]) for series in colours if series in row]
        ticks.append(place + (len(shown) - 1) / 2)
        for series, value in shown:
            axes.barh(place, value, height=0.85, color=colours[series], label=series)
            axes.text(value, place, f" {form(value)}", va="center", fontsize=10)
            place += 1
        place += 0.8
    axes.set_yticks(ticks, list(data))
    axes.invert_yaxis()
    axes.margins(y=0.02)
    _legend(figure, axes)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), fontsize=11, frameon=False, loc="outside lower center", ncols=2)


def draw_cpu(data: Bars) -> Figure:
    """Draw the peers' times on a CPU."""
    figure, axes = _figure(7.0, "A step on 2 CPU cores: how many times as long\nas lucid the others take")
    axes.set_xscale("log")
    axes.set_xlim(0.8, 200)
    axes.axvline(1, color=LUCID, linewidth=2)
    _grouped(figure, axes, data, PEERS, lambda value: f"{value:.3g}×")
    axes.set_xticks([1, 10, 100], ["1: lucid", "10×", "100×"])
    return figure


def draw_formats(data: Bars) -> Figure:
    """Draw bytes a parameter."""
    figure, axes = _figure(4.8, "Bytes a parameter: weights, gradients, state")
    for place, (name, row) in enumerate(data.items()):
        axes.barh(place, row["bytes"], height=0.75, color=OTHER if name.startswith("torch") else LUCID)
        axes.text(row["bytes"], place, f" {row['bytes']:.3g}", va="center", fontsize=11)
    names = [name.replace(", ", ",\n") if len(name) > 24 else name for name in data]
    axes.set_yticks(range(len(data)), names, fontsize=10)
    axes.set_xlim(0, 18)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    return figure


def draw_temporary(data: Bars) -> Figure:
    """Draw what a step takes for itself."""
    figure, axes = _figure(4.4, "MiB that a step needs for itself, on a CPU")
    axes.set_xlim(0, 620)
    _grouped(figure, axes, data, BESIDE, lambda value: f"{value:.0f}")
    return figure


def draw_gpu(data: Bars) -> Figure:
    """Draw times on a GPU, with the bytes a parameter that each contender keeps."""
    figure, axes = _figure(7.4, "Llama 3.2 1B on an H100: ms a step,\nand bytes a parameter in brackets")
    ordered = sorted(data.items(), key=lambda item: item[1]["ms"])
    for place, (name, row) in enumerate(ordered):
        axes.barh(place, row["ms"], height=0.75, color=LUCID if name.startswith("lucid") else OTHER)
        axes.text(row["ms"], place, f" {row['ms']:.3g}  ({row['bytes']:.0f})", va="center", fontsize=11)
    axes.set_yticks(range(len(ordered)), [name.replace(", ", ",\n") for name, _ in ordered], fontsize=10)
    axes.set_xlim(0, 1.18 * ordered[-1][1]["ms"])
    axes.margins(y=0.02)
    axes.invert_yaxis()
    return figure


def draw_quality(data: dict[str, dict[str, tuple[float, float]]]) -> Figure:
    """Draw means and intervals of the losses."""
    figure, axes = _figure(
        5.6, "Held-out loss beside lucid fp32's, in thousandths\nof a nat: mean of 8 seeds, 95 % interval"
    )
    axes.axvline(0, color="#455a64", linewidth=1)
    for row, tasks in enumerate(data.values()):
        for offset, (task, (mean, half)) in enumerate(tasks.items()):
            place = row + 0.18 * (offset - (len(tasks) - 1) / 2)
            label = task if row == 0 else None
            axes.errorbar(mean, place, xerr=half, fmt="o", color=TASKS[offset], markersize=5, capsize=2, label=label)
    axes.set_yticks(range(len(data)), list(data))
    axes.invert_yaxis()
    _legend(figure, axes)
    return figure


PICTURES: dict[str, tuple[Callable[[], Any], Callable[[Any], Figure]]] = {
    "cpu": (cpu_data, draw_cpu),
    "formats": (formats_data, draw_formats),
    "temporary": (temporary_data, draw_temporary),
    "gpu": (gpu_data, draw_gpu),
    "quality": (quality_data, draw_quality),
}


def digest(data: Any) -> str:
    """Return what tells these numbers from others."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, (read, draw) in PICTURES.items():
        data = read()
        path = FOLDER / f"{name}.png"
        draw(data).savefig(path, dpi=140, metadata={"Description": digest(data), "Software": None})
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
