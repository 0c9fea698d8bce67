"""The public interface of our optimizers: the step, clipping and skipping, step in backward, statistics."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lucid import engine
from lucid.engine.formats import StateDevice
from lucid.engine.values import checked_flag, one_of, shown

from .averages import AveragingOptimizer
from .backward import NO_SKIP, StepInBackward, no_norm_in_backward
from .fsdp import Sharded
from .gradients import NO_AMP, Amp
from .groups import ParamGroup
from .inputs import Inputs
from .members import params_of
from .settings import NON_FINITE, NonFinite, Settings, checked_max_norm, checked_threshold
from .spike_memory import shared_memory
from .stateful import Params
from .statistics import summed_up
from .unheard import hooked

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Optimizer(AveragingOptimizer):
    """Base class of the optimizers of ``lucid.optim``.

    A subclass gives the defaults and reads a group's hyperparameters; this class checks, steps and saves.

    Parameters
    ----------
    params : iterable
        Parameters, (name, Parameter) pairs, or group dicts with ``"params"`` and any hyperparameter.
    defaults : ParamGroup
        The hyperparameters for groups that do not set their own.
    max_grad_norm : float, optional
        Bound of the global gradient norm. `AdamW` describes this and the following parameters in detail.
    nonfinite : {"propagate", "skip", "error"}, default "propagate"
        What a step does if a gradient is non-finite (NaN or infinite) or overflows.
    shard_group : ProcessGroup, optional
        The processes that together compute the gradient norm and decide whether to skip the step.
    state_device : {"cpu", "cpu:moments"} or None, default None
        Where the state is, None for each parameter's device.
    spike_threshold : float, optional
        How far above those before a gradient norm may be before the step is skipped.
    """

    def __init__(
        self,
        params: Params,
        defaults: ParamGroup,
        *,
        max_grad_norm: float | None = None,
        nonfinite: NonFinite = "propagate",
        shard_group: ProcessGroup | None = None,
        state_device: StateDevice | None = None,
        spike_threshold: float | None = None,
    ) -> None:
        settings = Settings(max_grad_norm, nonfinite, shard_group, state_device, spike_threshold)
        super().__init__(params, defaults, settings)

    def _begin(self, settings: Settings) -> None:
        super()._begin(settings)
        self._stepper.alone = weakref.ref(self)  # this object: a wrapper may live shorter

    # The step

    profile_hook_step = staticmethod(hooked)  # torch wraps the ``step`` of each class with it

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every parameter that has a gradient: all of them or none.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and the gradients. It is called first, with gradients enabled.

        Returns
        -------
        Tensor or None
            The return value of the closure.

        Raises
        ------
        TypeError, ValueError
            If a gradient, parameter, hyperparameter or state is invalid. The message names it. Parameters, state and
            step counts are unchanged, bit for bit.
        FloatingPointError
            If a gradient is non-finite or overflows and ``nonfinite`` is ``"error"``. Nothing is changed.
        RuntimeError
            For example, if you give a closure while `step_in_backward` is on, if ``step`` is called within itself, if
            another process cannot step, or if the step cannot be captured in a CUDA graph. Nothing is changed.
        """
        loss = None
        if closure is not None:
            if self._stepper.backward is not None:
                raise RuntimeError(
                    "step(closure) does not work after step_in_backward(): the closure's backward would already update "
                    "the parameters; call step_in_backward(False) first"
                )
            with torch.enable_grad():
                loss = closure()
        self._stepper.step(self._inputs(), self._drop_amp)
        if self._stepper.backward is not None:
            for param in params_of(self.param_groups):
                param.grad = None  # the step has used it
            self._follow_hooks()
        return loss

    def _inputs(self) -> Inputs:
        """Return what a step reads, with its current values."""
        own = vars(self)
        set_by_scaler = "grad_scale" in own or "found_inf" in own
        amp = Amp(own.get("grad_scale"), own.get("found_inf")) if set_by_scaler else NO_AMP
        stepper = self._stepper
        left = None if stepper.backward is None else stepper.backward.left
        return Inputs(
            self.param_groups, self._hyperparameters, self._settings, self._box, amp, stepper.skipped.whole, left
        )

    def _drop_amp(self) -> None:
        """Drop the attributes that GradScaler sets: it deletes them only after a step that returns.

        If they stayed, GradScaler would take them for the user's.
        """
        vars(self).pop("grad_scale", None)
        vars(self).pop("found_inf", None)

    def _step_alone(self, param: Tensor) -> None:
        """Update `param`, whose gradient is complete in this backward."""
        self._stepper.step_alone(param, self._inputs, self._drop_amp)

    # Clipping and skipping

    @property
    def max_grad_norm(self) -> float | None:
        """The bound of the global gradient norm; if the norm is larger, steps scale gradients down. None: no bound."""
        return self._settings.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        bound = checked_max_norm(value)
        if bound is not None and self._stepper.backward is not None:
            raise ValueError(no_norm_in_backward("max_grad_norm", bound))
        self._settings.max_grad_norm = bound

    @property
    def spike_threshold(self) -> float | None:
        """How far above those before a gradient norm may be before the step is skipped. None: steps do not look."""
        return self._settings.spike_threshold

    @spike_threshold.setter
    def spike_threshold(self, value: float | None) -> None:
        threshold = checked_threshold(value)
        if threshold is not None and self._stepper.backward is not None:
            raise ValueError(no_norm_in_backward("spike_threshold", threshold))
        if threshold is not None:
            shared_memory(self.param_groups)
        self._settings.spike_threshold = threshold

    @property
    def nonfinite(self) -> NonFinite:
        """What a step does with non-finite gradients: ``"propagate"``, ``"skip"`` or ``"error"``."""
        return self._settings.nonfinite

    @nonfinite.setter
    def nonfinite(self, value: NonFinite) -> None:
        chosen = one_of("nonfinite", value, NON_FINITE)
        if chosen == "skip" and self._stepper.backward is not None and self._stepper.backward.left is not None:
            raise ValueError(NO_SKIP)
        self._settings.nonfinite = chosen

    @property
    def grad_norm(self) -> Tensor | None:
        """The global gradient norm of the last step, unscaled and before clipping: a 0-dim float64 tensor.

        If the GPU decided the last step, the tensor is on the GPU, and nothing waits for it; otherwise it is on the
        CPU. A step measures the norm under ``max_grad_norm`` (infinity measures and never clips), under
        ``spike_threshold`` and under ``nonfinite="skip"`` or ``"error"``. If the last step did not measure it, this is
        None.
        """
        norm = self._stepper.grad_norm
        if isinstance(norm, Tensor):
            return norm.clone()
        return None if norm is None else torch.tensor(norm, dtype=torch.float64, device="cpu")

    @property
    def skipped_steps(self) -> int:
        """The number of steps that were skipped because of non-finite gradients or spikes of the gradient norm.

        In backward, each skipped update of a parameter counts. To read this waits for a GPU that decides steps.
        """
        self._stepper.confirm()
        return self._stepper.skipped.total

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether the step unscales the gradients instead of GradScaler. Settable; None restores the default.

        The default is True only if every parameter is on an accelerator. If it is True, Lightning raises an error when
        it is asked to clip, and Accelerate counts a skipped step as taken.
        """
        if self._stepper.backward is not None:  # no gradient is left for GradScaler, which raises its own error
            return False
        if self._settings.amp_scaling is not None:
            return self._settings.amp_scaling
        params = params_of(self.param_groups)
        return bool(params) and all(param.device.type not in ("cpu", "meta") for param in params)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool | None) -> None:
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"_step_supports_amp_scaling: expected True, False or None, got {shown(value)}")
        self._settings.amp_scaling = value

    # Step in backward

    def step_in_backward(self, on: bool = True, *, model: nn.Module | None = None) -> None:
        """Update each parameter during backward, as soon as its gradient is complete, and free the gradient.

        The bits are those of ordinary steps. This saves the memory of all gradients except the largest few. The rest of
        your training loop may stay as it is: `step` updates the parameters that still have a gradient, usually none.
        Put all micro-batches except the last into `accumulate`.

        While a ``torch.distributed`` process group is initialized, gradients may have to be averaged first. FSDP2
        averages before it calls hooks: give the model, and backward updates the parameters that its FSDP2 modules
        shard. The hooks of all other parameters do nothing and `step` updates them, without ``model`` with a warning.

        Parameters
        ----------
        on : bool, default True
            False removes the hooks and switches back to ordinary steps.
        model : torch.nn.Module, optional
            The model after ``fully_shard``. Call `step` after each backward then, on all processes: what fails in
            backward on one process raises there, on all of them.

        Raises
        ------
        ValueError
            If ``max_grad_norm`` or ``spike_threshold`` is set: the gradient norm is known only after the last gradient.
            If FSDP2 shards parameters of ``model``, and the optimizer has none of them or ``nonfinite`` is ``"skip"``.

        Notes
        -----
        Each parameter's update is all or nothing, and ``nonfinite`` applies to each parameter separately: ``"skip"``
        skips single parameters; with ``"error"``, parameters that came before stay updated.
        ``docs/step_in_backward.md`` has the details.

        Examples
        --------
        >>> import torch
        >>> import lucid.optim as optim
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = optim.AdamW(model.parameters())
        >>> optimizer.step_in_backward()
        >>> model(torch.ones(3, 2)).sum().backward()
        >>> model.weight.grad is None, int(optimizer.state[model.weight]["step"])
        (True, 1)
        """
        checked_flag("on", on)
        stepper, settings = self._stepper, self._settings
        for option in ("max_grad_norm", "spike_threshold"):
            if on and (value := getattr(settings, option)) is not None:
                raise ValueError(no_norm_in_backward(option, value))
        if on:
            sharded = Sharded(model, params_of(self.param_groups))
            if sharded.params and self._settings.nonfinite == "skip":
                raise ValueError(NO_SKIP)
            if stepper.backward is None:
                stepper.backward = StepInBackward(stepper.alone)
                stepper.observations.clear()
            stepper.backward.tell(sharded)
        elif stepper.backward is not None:
            stepper.backward.remove()
            stepper.backward = None
        self._follow_hooks()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Return a context manager in which backward only accumulates gradients and updates nothing.

        Use it for all micro-batches of a step except the last. Without `step_in_backward` it does nothing, because
        backward then only accumulates anyway.
        """
        with self._stepper.accumulated():
            yield

    # CUDA graphs

    def release_captured(self) -> None:
        """Release steps that were captured in CUDA graphs, and all memory that they need.

        Call this when you no longer replay these graphs, or before a step of other parameters than theirs. Do not
        replay the graphs afterwards: the memory that they read and write may have been freed. Without captured steps
        this does nothing.
        """
        self._stepper.release_captured()

    # Statistics

    def observe(self, on: bool = True) -> None:
        """Measure what `statistics` returns, in the same pass in which steps update the parameters.

        Parameters
        ----------
        on : bool, default True
            False stops measuring and drops what was measured. If parameters are sharded (DTensors), call this on all
            processes, because each step then exchanges the measurements.
        """
        self._settings.observing = checked_flag("on", on)
        if not on:
            self._stepper.observations.clear()

    def statistics(self) -> dict[str, float]:
        """Return statistics of the last step as plain numbers by name, ready for a logger.

        Returns
        -------
        dict of str to float
            For each group, as ``"group0/..."``, and each named parameter: ``grad_norm`` (unscaled, before clipping),
            ``update_rms``, ``param_rms`` after the update (both before rounding to 16 bits), ``update_ratio``
            (``update_rms`` / ``param_rms``), ``max_m_over_sqrt_v`` (the largest |m|/√v of an element), ``step`` (of a
            group: the largest) and ``skipped_steps``. For all parameters together: ``grad_norm``,
            ``skipped_steps`` and ``skipped_spikes``, how many of these were spikes of the gradient norm.

        Raises
        ------
        RuntimeError
            If no step has been observed yet.
        """
        stepper = self._stepper
        if not stepper.observations.seen:
            raise RuntimeError("statistics: no step has been observed; call observe() before step()")
        stepper.confirm()
        skipped = stepper.skipped
        counted = (skipped.total, skipped.spikes, skipped.of)
        return summed_up(self.param_groups, self._box.peek(), stepper.observations, *counted)

    def engine_for(self, param: Tensor) -> str:
        """Return the name of the engine that updates `param`: ``"cpu"``, ``"cuda"`` or ``"reference"``."""
        staged = self._settings.state_device is not None and not engine.in_place(param.device)
        return engine.name_for(torch.device("cpu") if staged and param.device.type != "meta" else param.device)
