"""``lucid inspect``: describe a checkpoint's optimizer state, and what is odd about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import Tensor
from tqdm import tqdm

from lucid.engine import codecs
from lucid.engine.conversion import converted_entry
from lucid.engine.formats import format_for
from lucid.engine.shards import is_sharded
from lucid.engine.spikes import SPAN
from lucid.engine.values import as_float, number_in, shown
from lucid.optim.matching import SPIKES
from lucid.optim.spike_memory import checked as checked_memory

from . import oddities, output
from .checkpoints import Checkpoint, Parameter, read
from .convert import stand_in, uncertain_count
from .error import CommandError
from .matching import matched
from .reading import first_line

_NAMED = 3  # parameters in a sentence


@dataclass(frozen=True, slots=True)
class Found:
    """A parameter's state.

    `max_m_over_sqrt_v`: the largest of any element. `update_ratio`: RMS of the next update over RMS of the weight.
    `ema_distance`: RMS of the average of the weights minus the weight, over RMS of the weight. `ema_bytes`: of that
    average. `no_weight`: why no weight is matched to this parameter. `spike_memory`: the optimizer's memory of
    gradient norms, if it was saved.
    """

    name: str
    shape: list[int]
    format: str
    step: float | None
    m_norm: float = math.nan
    root_v_norm: float = math.nan
    max_m_over_sqrt_v: float = math.nan
    update_ratio: float = math.nan
    ema_distance: float = math.nan
    state_bytes: int = 0
    ema_bytes: int = 0
    no_weight: str | None = None
    spike_memory: list[Any] | None = None
    oddities: tuple[str, ...] = ()


def looked_at(parameter: Parameter, weight: Tensor | None) -> Found:
    """Return a description of a parameter's state; `weight`: the parameter itself, if known."""
    entry = parameter.entry
    odd = list(oddities.of_keys(entry))
    tensors = {key: value.detach() for key, value in entry.items() if isinstance(value, Tensor)}
    weight = None if weight is None else weight.detach()
    size = sum(value.nbytes for value in tensors.values() if value.layout is torch.strided)
    step = _number(entry.get("step"))
    if step is None or not (step >= 0 and step.is_integer()):
        odd.append(f"step is {shown(entry.get('step', 'missing'))}, no count")
    elif uncertain := uncertain_count(entry):
        odd.append(uncertain)
    if not odd and (refusal := _refusal(parameter)):
        odd.append(f"it could not be loaded: {refusal}")
    moment = tensors.get("exp_avg_code", tensors.get("exp_avg"))
    found = Found(parameter.called, [] if moment is None else list(moment.shape), _format(tensors), step)
    if SPIKES in parameter.group:
        try:
            found = replace(found, spike_memory=checked_memory(parameter.group[SPIKES]))
        except ValueError as error:
            odd.append(f"it could not be loaded with a spike_threshold: {error}")
    moments = None if odd else _moments(tensors, odd)
    if weight is not None and (not _has_numbers(weight) or is_sharded(weight)):
        weight = None
    if weight is not None and moment is not None:
        odd += oddities.of_weight(weight, {key: each for key, each in tensors.items() if _has_numbers(each)}, moment)
    if moments is None:
        return replace(found, state_bytes=size, oddities=tuple(odd))
    m, v = moments
    odd += oddities.of_values(m, v, step or 0.0)
    ema = tensors.get("ema")
    if ema is not None:
        odd += oddities.not_finite("ema", ema)
    w = tensors.get(oddities.MAXIMUM)
    if w is not None and w.is_complex():
        w = torch.view_as_real(w)
    if w is not None and w.shape == v.shape:
        odd += oddities.not_finite(oddities.MAXIMUM, w)
        if negative := int((w < 0).sum()):
            odd.append(f"{oddities.MAXIMUM} is negative in {negative:,}")
    denominator = (v if w is None or w.shape != v.shape else w).double().sqrt()
    ratios = torch.where(m == 0, 0.0, m.abs() / denominator)
    ratio = float(ratios.max()) if ratios.numel() else 0.0
    return replace(
        found,
        m_norm=float(torch.linalg.vector_norm(m)),
        root_v_norm=math.sqrt(max(0.0, float(v.double().sum()))) if not bool((v < 0).any()) else math.nan,
        max_m_over_sqrt_v=ratio,
        update_ratio=_update_ratio(parameter.group, m, denominator, step or 0.0, weight),
        ema_distance=math.nan if ema is None or weight is None else _distance(ema, weight),
        state_bytes=size,
        ema_bytes=0 if ema is None else ema.nbytes,
        oddities=tuple(odd),
    )


def _distance(ema: Tensor, weight: Tensor) -> float:
    wide = torch.complex128 if weight.is_complex() else torch.float64
    size = float(torch.linalg.vector_norm(weight.to(wide))) if weight.shape == ema.shape else 0.0
    return float(torch.linalg.vector_norm(ema.to(wide) - weight.to(wide))) / size if size else math.nan


def _has_numbers(tensor: Tensor) -> bool:
    return not (tensor.is_meta or tensor.is_quantized) and tensor.layout is torch.strided


def _refusal(parameter: Parameter) -> str:
    """Return why `load_state_dict` would raise for this state, or an empty string."""
    entry = parameter.entry
    codes = "exp_avg_code" in entry
    try:
        param = stand_in(entry, parameter.called)
        kept = format_for(param, "8bit" if codes else "fp32", True, parameter.called, ema="ema" in entry)
        converted_entry(kept, param, entry, parameter.called, (0, 0))
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return number_in(value)
    return as_float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _format(tensors: Mapping[str, Tensor]) -> str:
    """Return the format of the moments, plus residual or master and amsgrad."""
    if "exp_avg_code" in tensors:
        moments = "8bit"
    elif "exp_avg" not in tensors:
        moments = "unknown"
    elif tensors["exp_avg"].dtype == torch.float32:
        moments = "fp32"
    elif "stream" in tensors:
        moments = "bf16"
    else:
        moments = str(tensors["exp_avg"].dtype).removeprefix("torch.")
    more = [key for key in ("residual", "master", "ema") if key in tensors] + ["amsgrad"] * (
        oddities.MAXIMUM in tensors
    )
    return " + ".join([moments, *more])


def _moments(tensors: Mapping[str, Tensor], odd: list[str]) -> tuple[Tensor, Tensor]:
    """Return both moments as float64, complex ones as pairs; append what is odd about codes to `odd`."""
    if "exp_avg_code" in tensors:
        for key in ("exp_avg_scale", "exp_avg_sq_scale"):
            odd += oddities.not_finite(key, tensors[key])
        m = codecs.decode_signed(tensors["exp_avg_code"], tensors["exp_avg_scale"].float())
        v = codecs.decode_unsigned(tensors["exp_avg_sq_code"], tensors["exp_avg_sq_scale"].float())
        return m.double(), v.double()
    m, v = tensors["exp_avg"], tensors["exp_avg_sq"]
    odd += [*oddities.not_finite("exp_avg", m), *oddities.not_finite("exp_avg_sq", v)]
    if m.is_complex():
        m, v = torch.view_as_real(m), torch.view_as_real(v) if v.is_complex() else v
    return m.double(), v.double()


def _update_ratio(
    group: Mapping[str, Any], m: Tensor, denominator: Tensor, step: float, weight: Tensor | None
) -> float:
    """RMS of the update that the next step would make with these moments, over RMS of the weight."""
    betas = group.get("betas", (group.get("beta1"), group.get("beta2")))
    betas = betas if isinstance(betas, list | tuple) else ()
    options = [_number(each) for each in (group.get("lr"), group.get("eps"), group.get("weight_decay"), *betas)]
    known = [each for each in options if each is not None]
    if weight is None or not weight.numel() or step == 0 or len(known) != 5:
        return math.nan
    lr, eps, decay, beta1, beta2 = known
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        return math.nan
    theta = (torch.view_as_real(weight) if weight.is_complex() else weight).double()
    if theta.shape != m.shape:
        return math.nan
    update = m / (1 - beta1**step) / (denominator / math.sqrt(1 - beta2**step) + eps)
    size = float((lr * (update + decay * theta)).square().mean().sqrt())
    rms = float(theta.square().mean().sqrt())
    return size / rms if rms else math.nan


def inspected(
    checkpoint: Checkpoint, source: Checkpoint, models: Sequence[Mapping[str, Tensor]]
) -> dict[str, list[Found]]:
    """Return the states of each optimizer, by its place in the checkpoint; `models`: those in `source`."""
    found: dict[str, list[Found]] = {}
    for saved in checkpoint.optimizers():
        pairs = list(zip(saved.parameters, matched(saved, source, models), strict=True))
        bar = tqdm(pairs, saved.called, leave=False, disable=None)
        try:
            states = [
                replace(looked_at(parameter, match.weight), no_weight=match.reason)
                for parameter, match in bar
                if parameter.entry
            ]
        except RuntimeError as error:  # out of memory
            raise CommandError(f"{checkpoint.path}: {first_line(error)}") from error
        states += [
            Found(_stray(key), [], "unknown", None, oddities=("it has state and is in no group",))
            for key in saved.strays
        ]
        called = saved.called
        while called in found:  # keys of other types can read alike
            called += "'"
        found[called] = states
    return found


def _stray(key: Any) -> str:
    return f"parameter {key}" if str(key).isdecimal() else f"key {shown(key)}"


def run(path: Path, *, weights: Path | None, json: bool, plot: Path | None) -> int:
    """Print the description; return 1 if anything is odd."""
    output.check_picture(plot)
    checkpoint = read(path)
    source = checkpoint if weights is None else read(weights)
    models = source.models() if weights is None else [source.weights()]
    if weights is not None and not models[0]:
        raise CommandError(f"--weights {weights}: expected a model's weights in it, found none")
    found = inspected(checkpoint, source, models)
    odd = {name: [each for each in states if each.oddities] for name, states in found.items()}
    if plot is not None:
        draw(found, plot)
    if json:
        output.print_json({name: [asdict(each) for each in states] for name, states in found.items()})
    else:
        for name, states in found.items():
            _print(name, states)
    return 1 if any(odd.values()) else 0


def _print(name: str, states: list[Found]) -> None:
    console = output.console()
    averages = sum(each.ema_bytes for each in states)
    header = ["parameter", "shape", "format", "step", "‖m‖", "‖√v‖", "max |m|/√v", "update/weight"]
    header += ["ema − weight"] if averages else []
    rows: list[list[str | Text]] = [
        [
            Text(output.printable(each.name), output.BAD if each.oddities else ""),
            "x".join(map(str, each.shape)) or "()",
            each.format,
            "–" if each.step is None else f"{each.step:g}",
            *(_figure(value) for value in (each.m_norm, each.root_v_norm, each.max_m_over_sqrt_v, each.update_ratio)),
            *([_figure(each.ema_distance)] if averages else []),
        ]
        for each in states
    ]
    size = output.size(sum(each.state_bytes for each in states))
    size += f", {output.size(averages)} of it averages of weights" if averages else ""
    console.print(output.table(header, rows, f"{output.printable(name)}: state of {len(states)} parameters, {size}"))
    for reason, names in _without_weight(states).items():
        console.print(Text(output.printable(f"no update/weight for {names}: {reason}"), output.FAINT))
    for each in states:
        for oddity in each.oddities:
            console.print(Text(output.printable(f"{each.name}: {oddity}"), output.BAD))
    if memory := next((each.spike_memory for each in states if each.spike_memory), None):
        mean, square, seen, in_a_row = memory
        told = f"{mean:.4g} on average, ±{math.sqrt(square):.2g}, {in_a_row} spikes in a row since"
        console.print(Text(f"gradient norms ({'at least ' * (seen == SPAN)}{seen} steps): {told}", output.FAINT))
    if not any(each.oddities for each in states):
        console.print(Text("nothing odd", output.GOOD))


def _without_weight(states: Sequence[Found]) -> dict[str, str]:
    """Return the names of parameters without a weight, by reason."""
    names: dict[str, list[str]] = {}
    for each in states:
        if each.no_weight is not None:
            names.setdefault(each.no_weight, []).append(each.name)
    listed = {}
    for reason, those in names.items():
        more = f" and {len(those) - _NAMED:,} more" if len(those) > _NAMED else ""
        listed[reason] = "any parameter" if len(those) == len(states) else ", ".join(those[:_NAMED]) + more
    return listed


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else output.digits(value)


def draw(found: Mapping[str, list[Found]], path: Path) -> None:
    """Plot the RMS of each parameter's moments, and its ratios."""
    from matplotlib.figure import Figure

    states = [each for group in found.values() for each in group]
    if not states:
        raise CommandError("--plot: there is no state to draw")
    places = range(len(states))
    roots = [math.sqrt(max(1, math.prod(each.shape))) for each in states]
    figure = Figure(figsize=(max(6.4, 2 + 0.12 * len(states)), 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.semilogy(places, [each.m_norm / n for each, n in zip(states, roots, strict=True)], "o", label="m")
    above.semilogy(places, [each.root_v_norm / n for each, n in zip(states, roots, strict=True)], "s", label="√v")
    above.set_ylabel("RMS over the parameter")
    above.legend()
    below.semilogy(places, [each.max_m_over_sqrt_v for each in states], "o", color="C2", label="largest |m|/√v")
    below.semilogy(places, [each.update_ratio for each in states], "^", color="C3", label="update over weight")
    below.set_ylabel("ratio")
    below.legend()
    odd = [place for place, each in enumerate(states) if each.oddities]
    for axes in (above, below):
        axes.grid(alpha=0.3)
        for place in odd:
            axes.axvspan(place - 0.4, place + 0.4, color="red", alpha=0.2)
    if len(states) <= 80:
        below.set_xticks(list(places), [each.name for each in states], rotation=90, fontsize=7)
    else:
        below.set_xlabel("parameter, in the optimizer's order")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise CommandError(f"--plot {path}: {error}") from error
