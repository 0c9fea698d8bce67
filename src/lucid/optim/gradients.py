"""The verdict on a step's gradients: unscaling, clipping by the global norm, skipping. The host or a device decides.

Both follow this rule and get the same bits (`host_verdict`, and the kernel ``decide`` in ``engine/cuda/decide.py``):

    scale     GradScaler's scale of the gradients, 1 without it
    norm      = √(the exact sum of all squares) / scale
    clip      = 1 if norm + 1e-6 ≤ max_grad_norm, else max_grad_norm / (norm + 1e-6)
    factor    = clip / scale; the update multiplies each gradient by it
    skip      if found_inf is not 0, or, under nonfinite="skip", if an entry is NaN or infinite, |g|·factor is too large
              to be squared, or the norm is not finite, or, under spike_threshold, if the norm is a spike
              (`lucid.engine.spikes`; a step that something else skips is not judged)

The exact sum comes with counts of such entries (`lucid.engine.exact_sum`), the large ones as for a clip of 1. A smaller
clip makes every |g|·factor at most ``max_grad_norm``, so only a bound near 2⁶⁴ needs a second look.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lucid import engine
from lucid.engine.exact_sum import LIMITS, Count, blank, norm_in
from lucid.engine.spikes import Memory, judged
from lucid.engine.values import as_float, is_on, number_in, shown

from .agreement import Agreement, Finding, worst_in
from .hyperparameters import Hyperparameters
from .settings import Settings


class Amp(NamedTuple):
    """The attributes that GradScaler sets on the optimizer, None for those that it has not set."""

    grad_scale: Any
    found_inf: Any


NO_AMP = Amp(None, None)


class Described(NamedTuple):
    """The name, the parameter and the gradient of a row of this step, for messages."""

    name: str
    param: Tensor
    gradient: Tensor


def host_verdict(
    plan: engine.Plan,
    agreement: Agreement,
    settings: Settings,
    scale: float,
    found_inf: bool,
    begun: bool,
    exchange: Callable[[list[int]], list[int]] | None,
    described: Callable[[], Iterable[Described]],
    untouched: str,
    memory: list[Any] | None = None,
) -> tuple[engine.HostVerdict, bool]:
    """Measure the gradients if the settings need it, decide this step, and return whether any process has begun.

    ``begun``: whether this process has, see `Count.BEGUN`. ``exchange``: `Agreement.total` if processes exchange in
    this step, else None. ``described``: returns the rows of this step. ``untouched``: the words in the error message
    for what was not updated. ``memory``: the memory of norms if there is a threshold for spikes, which is not changed.
    """
    max_norm, nonfinite = settings.max_grad_norm, settings.nonfinite
    if exchange is None and (not settings.judges or (max_norm is None and found_inf)):
        return engine.HostVerdict(1.0 / scale, None, scale, found_inf), begun
    words = plan.measure(scale, agreement.kinds) if settings.judges else blank(agreement.kinds)
    words[Count.BAD] += found_inf
    words[Count.BEGUN] = begun
    total = words if exchange is None else exchange(words)
    finding = worst_in(total)
    check_others(finding)
    begun = total[Count.BEGUN] > 0
    if not settings.judges:
        return engine.HostVerdict(1.0 / scale, None, scale, finding is Finding.BAD), begun
    norm = norm_in(total, scale)
    clip = clip_factor(norm, max_norm)
    verdict = engine.HostVerdict(clip / scale, norm, scale, finding is Finding.BAD)
    if verdict.skip or nonfinite == "propagate":
        return _without_spike(verdict, settings, memory), begun
    found = total[Count.NAN] or total[Count.INFINITE] or (clip == 1 and total[Count.LARGE])
    bad = found or not math.isfinite(norm)
    what = None
    if not bad and clip < 1 and max_norm is not None and max_norm >= _CLOSE:
        what = _first_fault(described(), clip, scale)
        bad = agreement.worst(Finding.BAD if what else Finding.NOTHING) is Finding.BAD
    if not bad:
        return _without_spike(verdict, settings, memory), begun
    if nonfinite == "skip":
        return verdict._replace(skip=True), begun
    what = what or _first_fault(described(), clip, scale)
    if what is None and not found and not math.isfinite(norm):
        what = "the gradient norm overflows float64"
    raise FloatingPointError(
        f"{what or 'a gradient on another process is not finite'}, so {untouched}; look for the cause "
        '(torch.autograd.detect_anomaly), or set nonfinite="skip" to skip such steps'
    )


def _without_spike(verdict: engine.HostVerdict, settings: Settings, memory: list[Any] | None) -> engine.HostVerdict:
    """Return a verdict that also skips a spike."""
    if verdict.skip or verdict.norm is None or settings.spike_threshold is None or memory is None:
        return verdict
    spike = judged(verdict.norm, settings.spike_threshold, Memory(*memory))
    return verdict._replace(skip=spike.spike, spike=spike)


def device_verdict(
    plan: engine.Plan,
    counts: engine.StepCounts,
    settings: Settings,
    amp: Amp,
    hyperparameters: Sequence[Hyperparameters],
    agreement: Agreement,
    exchange: Callable[[Tensor], Tensor] | None,
    memory: list[Any] | None = None,
    *,
    fresh: bool,
) -> engine.DeviceVerdict | None:
    """Return what the device needs to decide this step, so that the host need not wait; None if the host decides.

    ``exchange``: `Agreement.exchange` if processes exchange in this step, else None. They do the same exchange if the
    host decides, so one process's host may decide while another's device does. ``fresh``: whether the step creates
    state. ``memory``: the memory of norms if there is a threshold for spikes.
    """
    device = plan.deciding
    captured = engine.cuda.is_capturing()
    if captured:
        alone = device is not None and not agreement
        _check_capture(settings, alone=alone, ready=plan.begun and not fresh)
    if device is None or not agreement.reaches(device) or (settings.observing and agreement.sharded):
        return None
    if clips_to_large(settings):
        return None
    given, found_inf = amp
    told = any(is_on(device, value) for value in (given, found_inf, *(hyper.lr for hyper in hyperparameters)))
    decides = told or settings.judges or exchange is not None
    if not captured and (fresh or settings.nonfinite == "error" or not decides):
        return None
    scale = given if is_on(device, given) else scale_of(given)
    if found_inf is not None and not is_on(device, found_inf):
        if found_inf_in(found_inf):
            return None
        found_inf = None
    if not plan.assume():
        if captured:
            raise RuntimeError(
                "step() is being captured in a CUDA graph, but the last step updated other parameters; take a step "
                "with the same parameters before you capture"
            )
        counts.confirm()
        if not plan.assume():
            return None
    skips, kinds = settings.nonfinite == "skip", agreement.kinds
    return engine.DeviceVerdict(
        scale, found_inf, settings.max_grad_norm, skips, captured, exchange, kinds, settings.spike_threshold, memory
    )


def _check_capture(settings: Settings, *, alone: bool, ready: bool) -> None:
    if not alone:
        raise RuntimeError(
            "step() is being captured in a CUDA graph: expected all parameters that have gradients on one GPU, "
            "updated by the CUDA engine, and not sharded; step without a graph instead"
        )
    if not ready:
        raise RuntimeError(
            "step() is being captured in a CUDA graph before an ordinary step: each replay would initialize its memory "
            "again; take a step with the same parameters before you capture"
        )
    if clips_to_large(settings):
        raise RuntimeError(
            "step() is being captured in a CUDA graph, where max_grad_norm of 2^63 or more does not work together with "
            f'nonfinite="skip"; got {settings.max_grad_norm:g}'
        )
    if settings.nonfinite == "error":
        raise RuntimeError(
            'step() is being captured in a CUDA graph, which cannot raise an error, so nonfinite="error" does not '
            'work; set nonfinite="skip"'
        )


def check_others(finding: Finding) -> None:
    """Raise if another process cannot step."""
    if finding is Finding.FAILED:
        raise engine.OtherFailedError


def scale_of(value: Any) -> float:
    """Return GradScaler's scale of the gradients as a number, 1 for None; raise unless it is finite and above 0."""
    scale = 1.0 if value is None else _single("grad_scale", value)
    if not 0 < scale < math.inf:
        raise ValueError(f"grad_scale: expected a finite number above 0, got {shown(value)}")
    return scale


def found_inf_in(value: Any) -> bool:
    """Whether GradScaler has found a non-finite gradient, so that this step must be skipped."""
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        value = value.int()
    return value is not None and _single("found_inf", value) != 0


def _single(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and (number := number_in(value)) is not None:
        return number
    if isinstance(value, numbers.Real):
        return as_float(value)
    raise TypeError(f"{name}: expected None or one number, as torch.amp.GradScaler sets it, got {shown(value)}")


def clip_factor(norm: float, max_norm: float | None) -> float:
    """Return the clip factor for gradients of this norm, as in ``torch.nn.utils.clip_grad_norm_``.

    It is never above 1, and NaN if the norm is NaN.
    """
    if max_norm is None or max_norm == math.inf or norm + 1e-6 <= max_norm:
        return 1.0
    return max_norm / (norm + 1e-6)


_CLOSE = 2.0**63  # an entry that was clipped to this norm may be too large to be squared in float32


def clips_to_large(settings: Settings) -> bool:
    """Whether a clipped gradient may have an entry that is too large to be squared, which only the host looks for."""
    bound = settings.max_grad_norm
    return settings.nonfinite == "skip" and bound is not None and _CLOSE <= bound < math.inf


def _first_fault(described: Iterable[Described], clip: float, scale: float) -> str | None:
    """Return what is wrong with the first gradient of this process that no step can use, or None."""
    for name, param, gradient in described:
        found = fault(gradient, clip, scale, param.dtype)
        if found is not None:
            return f"the gradient of {name} has {found}"
    return None


def fault(gradient: Tensor, clip: float, scale: float, dtype: torch.dtype) -> str | None:
    """Return what is wrong with a gradient that no step can use, or None if nothing is wrong. ``dtype``: its
    parameter's.
    """
    compute = engine.COMPUTE[dtype].to_real()
    limit, factor = LIMITS[compute], clip / scale
    reals = torch.view_as_real(gradient) if gradient.is_complex() else gradient
    nan = infinite = large = 0
    for part in torch.split(reals.reshape(-1), 2**20):
        entries = part.to(compute)
        nan += int(entries.isnan().sum())
        infinite += int(entries.isinf().sum())
        size = entries.abs()
        over = size.double() >= limit * scale if clip == 1 else size * factor >= limit
        over |= size.double().square().isinf()
        large += int(over.logical_and(entries.isfinite()).sum())
    found = {"NaN": nan, "infinite": infinite, "too large to be squared": large}
    which = ", ".join(f"{count} {what}" for what, count in found.items() if count)
    return f"{which} of {reals.numel()} entries" if which else None
