"""``lucid convert``: an optimizer's state from one format, or optimizer, to another, without the model."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.text import Text
from torch import Tensor
from tqdm import tqdm

from lucid.engine.conversion import converted_entry, decoded
from lucid.engine.formats import format_for, step_is_uncertain
from lucid.engine.values import shown
from lucid.optim import AdamW
from lucid.optim.groups import ParamGroup
from lucid.optim.matching import VERSION
from lucid.optim.state_dict import STATE_VERSION, torch_group

from . import output
from .checkpoints import Checkpoint, Parameter, Saved, read, replaced
from .error import CommandError
from .reading import SINGLE_FILE, Kind
from .writing import check_target, write

Target = Literal["fp32", "bf16", "8bit", "torch"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """The result of a conversion: bytes of optimizer state before and after, and notes."""

    source: str
    target: str
    to: Target
    parameters: int
    bytes_before: int
    bytes_after: int
    notes: list[str]


def stand_in(entry: Mapping[str, Any], name: str) -> Tensor:
    """Return a tensor with the shape and dtype of the parameter whose state `entry` is; it takes no memory."""
    moment = entry.get("exp_avg_code", entry.get("exp_avg"))
    if not isinstance(moment, Tensor):
        keys = ", ".join(f"{str(key)[:40]} ({type(value).__name__})" for key, value in list(entry.items())[:8])
        raise ValueError(f"state of {name}: expected a tensor exp_avg or exp_avg_code, as AdamW has it, got {keys}")
    dtype = torch.float32
    if "residual" in entry:
        dtype = torch.bfloat16
    elif "master" in entry:
        dtype = torch.float16
    elif moment.dtype == torch.float64 or moment.is_complex():
        dtype = moment.dtype
    return torch.zeros((), dtype=dtype).expand(moment.shape)


def _entry(parameter: Parameter, to: Target) -> dict[str, Any]:
    """A parameter's state in the format `to`."""
    param = stand_in(parameter.entry, parameter.called)
    if to == "torch":
        return decoded(param, parameter.entry, parameter.called)
    master = "residual" in parameter.entry or "master" in parameter.entry
    kept = format_for(param, to, master, parameter.called, ema="ema" in parameter.entry)
    seed = parameter.group.get("seed", 0)
    name = parameter.name if "param_names" in parameter.group else None  # a folder's keys are not saved names
    rounding_key = (seed, parameter.number if name is None else name)
    found: dict[str, Any] = converted_entry(kept, param, parameter.entry, parameter.called, rounding_key)
    stream = parameter.entry.get("stream")
    if parameter.group.get("master_weights") == "stochastic" and isinstance(stream, Tensor):
        found.setdefault("stream", stream.clone())  # the weights may be drawn from it, whatever the moments' format
    return found


def _group(to: Target, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the group with all keys that the optimizer expects that will load it."""
    nobody = [torch.empty(0, device="cpu")]
    if to == "torch":
        return torch.optim.AdamW(nobody).defaults | torch_group(group)
    own = ParamGroup.saved(group)
    for key, default in AdamW(nobody).defaults.items():
        own.setdefault(key, default)
    return dict(own) | {"betas": own["betas"], "state_format": to, VERSION: STATE_VERSION}


def converted(checkpoint: Checkpoint, saved: Saved, to: Target) -> Checkpoint:
    """Return the checkpoint with an optimizer's state in the format `to`."""
    entries = {}
    if saved.strays:
        raise CommandError(
            f"{checkpoint.path}: expected state under the keys that the groups of {saved.called} have "
            f"({listed([each.key for each in saved.parameters])}), got {listed(saved.strays)}; rename them, or save "
            "optimizer.state_dict() as it is"
        )
    try:
        bar = tqdm(saved.parameters, saved.called, leave=False, disable=None)
        for parameter in bar:
            if parameter.entry:
                entries[parameter.key] = _entry(parameter, to)
        return replaced(checkpoint, saved, entries, functools.partial(_group, to))
    except (TypeError, ValueError, RuntimeError) as error:  # the last: out of memory
        raise CommandError(f"{checkpoint.path}: {error}") from error


def listed(keys: Sequence[Any]) -> str:
    """Return the first keys as text for a message."""
    return ", ".join(shown(key)[:40] for key in keys[:4]) + (", ..." if len(keys) > 4 else "")


def _bytes(savings: list[Saved]) -> int:
    values = (value for saved in savings for parameter in saved.parameters for value in parameter.entry.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor) and value.layout is torch.strided)


def uncertain_count(entry: Mapping[str, Any]) -> str:
    """Return a sentence if a parameter's step count may be rounded or may have stopped, else nothing."""
    step = entry.get("step")
    if not isinstance(step, Tensor) or not step_is_uncertain(step):
        return ""
    return (
        f"step is {float(step.detach()):,.0f}, saved as {step.dtype}, which rounds counts above 256: the true count is "
        "not known; set it by hand, and save it as float32"
    )


def _notes(before: Sequence[Saved], to: Target) -> Iterator[str]:
    """Yield what the user has to know."""
    for saved in before:
        averages = sum("ema" in parameter.entry for parameter in saved.parameters)
        if to == "torch" and averages:
            yield (
                f"averages of the weights of {averages} parameters are left out: torch.optim.AdamW keeps none; save "
                "optimizer.averages() to keep them"
            )
        for parameter in saved.parameters:
            if note := uncertain_count(parameter.entry):
                yield f"{parameter.called}: {note}"


def _kind(checkpoint: Checkpoint, target: str) -> Kind:
    if target.endswith(("/", "\\")):
        return "folder"
    return "file" if Path(target).suffix in SINGLE_FILE else checkpoint.kind


def run(source: Path, target: str, to: Target, *, json: bool) -> int:
    """Convert the state of every optimizer in a checkpoint; the rest stays as it is."""
    path = Path(target)
    same = path.exists() and source.exists() and path.samefile(source)
    checkpoint = read(source, mapped=not same)
    if checkpoint.kind == "safetensors":
        raise CommandError(f"{source}: safetensors files hold no optimizer state that could be converted")
    kind = _kind(checkpoint, target)
    check_target(path, kind)
    before = checkpoint.optimizers()
    for saved in before:
        checkpoint = converted(checkpoint, saved, to)
    after = checkpoint.optimizers()
    write(checkpoint.tree, path, kind)
    done = Conversion(
        str(source),
        str(path),
        to,
        sum(bool(parameter.entry) for saved in before for parameter in saved.parameters),
        _bytes(before),
        _bytes(after),
        list(_notes(before, to)),
    )
    if json:
        output.print_json(asdict(done))
    else:
        output.console().print(
            f"{path}: {to} state of {done.parameters} parameters, {output.size(done.bytes_after)} "
            f"(in {source}: {output.size(done.bytes_before)})"
        )
        for note in done.notes:
            output.console().print(Text(output.printable(note), output.BAD))
    return 0
