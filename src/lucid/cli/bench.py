"""``lucid bench``: time a step of your shapes, beside other optimizers and memory bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.text import Text

from lucid.bench import machine
from lucid.bench.contenders import (
    DEEPSPEED,
    DEFAULT,
    FOREACH,
    FUSED,
    LIBRARY_PEERS,
    LIMIT,
    LUCID,
    SLOW,
    Contender,
    Format,
    is_installed,
    optimizers,
)
from lucid.bench.paired import Quartiles
from lucid.bench.steps import StepTimes, described, draw_roofline, time_steps
from lucid.engine.formats import StateFormatName

from . import output
from .error import CommandError
from .shapes import DTYPES, Model

_TORCHS = {"fused": FUSED, "foreach": FOREACH, "default": DEFAULT}
_TEMPORARIES = {FOREACH: 4, DEFAULT: 1}  # temporary memory of a step, about, as a multiple of the weights


def _contenders(dtype: str, formats: Sequence[str], peers: Sequence[str] | None, device: str) -> list[Contender]:
    kind = DTYPES[dtype]
    found = [_own(dtype, state_format) for state_format in dict.fromkeys(formats)]
    for peer in dict.fromkeys(_TORCHS if peers is None else peers):
        if peer in _TORCHS:
            make = optimizers()[_TORCHS[peer]]
            found.append(Contender(_TORCHS[peer], lambda params, make=make: make(params).step, kind, 2 * kind.itemsize))  # type: ignore[misc]
            continue
        if not is_installed(peer):
            raise CommandError(f"--peer {peer}: {peer} is not installed; pip install {peer}, or remove the option")
        if peer == "deepspeed":
            if device != "cpu" or kind is not torch.float32:
                raise CommandError("--peer deepspeed: its CPUAdam runs in float32 on the cpu only; remove the option")
            make = optimizers()[DEEPSPEED]
            found.append(Contender(DEEPSPEED, lambda params, make=make: make(params).step))  # type: ignore[misc]
            continue
        theirs = [each.contender() for each in LIBRARY_PEERS if each.library == peer and each.dtype is kind]
        if not theirs:
            raise CommandError(f"--peer {peer}: expected --dtype float32 or bfloat16 with it, got {dtype}")
        found += theirs
    return found


def _own(dtype: str, state_format: str) -> Contender:
    name: StateFormatName = state_format  # type: ignore[assignment]
    return Format(f"{LUCID} {state_format}", DTYPES[dtype], name).contender()


def _check_memory(model: Model, contenders: Sequence[Contender], device: str) -> None:
    """Raise if memory would not suffice: each contender has its own weights, gradients and state."""
    needed = float(16 * min(model.elements, 2**26))
    for each in contenders:
        own = each.dtype.itemsize * model.elements
        needed += 2 * own + each.state_bytes(model.shapes)
    needed += model.elements * max(_TEMPORARIES.get(each.name, 0) * each.dtype.itemsize for each in contenders)
    free = machine.free_memory() if device == "cpu" else float(torch.cuda.mem_get_info(device)[0])
    if needed > free:
        raise CommandError(
            f"{model.name} with {len(contenders)} optimizers takes {output.size(needed)}, and {output.size(free)} are "
            "free: name fewer with --format and --peer, or use --dtype bfloat16"
        )


def _checked_device(device: str) -> str:
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise CommandError(f"--device: expected cpu, cuda or cuda:1 and so on, got {device!r}") from error
    if kind.type not in ("cpu", "cuda"):
        raise CommandError(f"--device: expected cpu or cuda, the devices with a native engine, got {device!r}")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {device}: torch {torch.__version__} finds no such device here")
    return device


def run(
    model: Model,
    dtype: str,
    formats: Sequence[str],
    peers: Sequence[str] | None,
    device: str,
    rounds: int,
    *,
    json: bool,
    plot: Path | None,
) -> int:
    """Time and print; return 1 if a contender could not be measured."""
    if not model.elements:
        raise CommandError(f"{model.name}: expected parameters to step, got tensors without elements")
    contenders = _contenders(dtype, formats, peers, _checked_device(device))
    _check_memory(model, contenders, device)
    output.check_picture(plot)
    torch.manual_seed(0)
    neighbours = machine.Neighbours()
    times = time_steps(contenders, model.shapes, rounds, device)
    others = neighbours.share()
    if plot is not None:
        try:
            draw_roofline(times, f"{model.described}, {dtype} weights", plot)
        except OSError as error:
            raise CommandError(f"--plot {plot}: {error}") from error
    about = machine.description() | {"neighbours": f"took {others:.1%} of all cores' time meanwhile"}
    if json:
        output.print_json(
            {"model": model.name, "tensors": len(model.shapes), "parameters": model.elements, "dtype": dtype}
            | {"device": device, "machine": about, "limit_gigabytes_a_second": times.gigabytes(LIMIT)}
            | {"contenders": described(times), "failures": times.failures, "samples": times.samples}
        )
    else:
        _print(model, dtype, times, about, busy=others > machine.BUSY)
    return 1 if times.failures else 0


def _print(model: Model, dtype: str, times: StepTimes, about: dict[str, str], *, busy: bool) -> None:
    console = output.console()
    console.print(output.facts({name: about[name] for name in ("CPU", "threads", "versions", "neighbours")}))
    if busy:
        console.print(Text("The machine is busy, so do not rely on these times.", output.BAD))
    names = [name for name in times.samples if name != LIMIT]
    first = next((name for name in names if name.startswith(LUCID)), None)
    header = ["step of", "ms", "GB/s", "of the limit", *([] if first is None else [f"time over {first}'s"]), "rounds"]
    rows: list[list[str | Text]] = []
    for name in names:
        row: list[str | Text] = [name, output.digits(1e3 * times.seconds(name)), output.digits(times.gigabytes(name))]
        row.append(output.digits(times.of_limit(name).median))
        if first is not None:
            row.append(_spread(times.times(name, first)))
        rows.append([*row, str(len(times.samples[name]))])
    console.print()
    console.print(output.table(header, rows, f"{model.described}, {dtype} weights"))
    console.print(
        f"Medians (quartiles) of paired rounds. limit: memory bandwidth, measured by only moving bytes, "
        f"{output.digits(times.gigabytes(LIMIT))} GB/s. GB/s: counts the bytes that a step must move.",
        style=output.FAINT,
    )
    if any(name in SLOW for name in names):
        console.print("Slow optimizers take part in the first rounds only.", style=output.FAINT)
    for name, why in times.failures.items():
        console.print(Text(f"{name} was not measured. {why}", output.BAD))


def _spread(found: Quartiles) -> str:
    return f"{output.digits(found.median)} ({output.digits(found.low)}–{output.digits(found.high)})"
