"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lucid.engine.formats import NAMES, MasterWeights, StateDevice, StateFormatName
from lucid.engine.values import as_float, checked_flag, checked_lr, checked_number, one_of, shown

from .groups import ParamGroup, pair
from .hyperparameters import Hyperparameters, WeightDecaySchedule, schedule_of
from .optimizer import Optimizer
from .settings import NonFinite
from .stateful import Params

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AdamW(Optimizer):
    """AdamW, Adam with decoupled weight decay: a replacement for ``torch.optim.AdamW``.

    At step t, with gradient g (negated if `maximize`), parameter θ, and m, v and w from 0:

        m = β1·m + (1 − β1)·g
        v = β2·v + (1 − β2)·g²
        w = v, or max(w, v) with amsgrad
        θ = θ − α·λ·θ − α·(m / (1 − β1^t)) / (√(w / (1 − β2^t)) + ε)

    The decay is subtracted from the parameter and never mixed into the gradient. ``docs/numerics.md`` gives the order
    of operations. All engines follow it and give the same bits.

    Parameters
    ----------
    params : iterable of Parameter, of (name, Parameter) pairs, or of dict
        float32, bfloat16, float16, float64, complex64 or complex128, of any shape and dense layout. A group dict has
        ``"params"`` and may override the hyperparameters that ``param_groups`` lists below, with ``betas`` or with
        ``beta1`` and ``beta2``.
    lr : float or 0-dim Tensor, default 1e-3
        Learning rate α, finite and ≥ 0.
    betas : pair of float, default (0.9, 0.999)
        Coefficients β1, β2 of the running averages of the gradient and its square, each in [0, 1): a tuple, a list, an
        array or tensor of two, or any other two numbers in order.
    eps : float, default 1e-8
        ε, added to the denominator, finite and ≥ 0.
    weight_decay : float, default 0.01
        λ, finite and ≥ 0: of a parameter, a step takes away the part α·λ, or what `weight_decay_schedule` says.
    amsgrad : bool, default False
        Divide by the maximum of all v so far. You may switch it on during training.
    maximize : bool, default False
        Maximize the objective instead of minimizing it.
    state_format : {"fp32", "bf16", "8bit"}, default "fp32"
        How the two moments are stored: in 8, 4 or about 2.06 bytes per parameter. ``"8bit"`` applies to parameters
        with at least 2 dimensions, 4,096 elements and 64 elements per row; other parameters keep float32 moments.
        float64 and complex parameters keep moments in their own precision. Choose it before the first step;
        ``load_state_dict`` converts.
    master_weights : bool or "stochastic", default True
        True stores 2 more bytes for bfloat16 parameters and 4 for float16 ones, with which they train as float32
        parameters do. False stores nothing: a new value is rounded to nearest, as in torch, and small updates are lost.
        ``"stochastic"``, for bfloat16, also stores nothing, but rounds up or down at random so that the mean is right:
        small updates count on average, with noise. Other dtypes than bfloat16 and float16 are not affected.
    max_grad_norm : float, optional
        Above 0. If the gradient norm, over all parameters together, is larger, the update scales the gradients down by
        the factor that ``torch.nn.utils.clip_grad_norm_`` uses; ``.grad`` does not change. Infinity only measures.
        ``grad_norm`` holds the norm. You may set this and ``nonfinite`` between steps.
    nonfinite : {"propagate", "skip", "error"}, default "propagate"
        What to do if a gradient has an entry that is NaN, infinite, or too large to be squared. ``"propagate"``
        computes with it, which ruins the parameter. ``"skip"`` skips the whole step and counts it in
        ``skipped_steps``. ``"error"`` raises FloatingPointError and changes nothing. ``"skip"`` and ``"error"`` read
        the gradients once more; together with ``max_grad_norm`` the step still reads them only once more.
    seed : int, default 0
        Seed of all stochastic rounding (``"bf16"``, ``"8bit"``, ``master_weights="stochastic"``), from 0 to 2⁶³ − 1. It
        is used when a parameter's state is created. No global generator is read or changed.
    shard_group : torch.distributed.ProcessGroup, optional
        Processes that hold different parameters, or different parts of plain tensors, as under
        ``ZeroRedundancyOptimizer``, FSDP1 or pipeline parallelism. The gradient norm is then over the gradients of all
        of them, and they skip the same steps. DTensors (FSDP2, tensor parallelism) do not need it.
    state_device : {"cpu", "cpu:moments"} or None, default None
        Where the state of parameters on a GPU is. ``"cpu"`` keeps it in the host's pinned memory, ``"cpu:moments"``
        only the moments, and leaves master weights and averages on the GPU. The GPU reads and writes the state over the
        bus, and the host does not wait. Bits, and what it works with, are as with state on the GPU: ``docs/gpu.md``.
    weight_decay_schedule : {"lr", "independent"}, default "lr"
        The part of a parameter that a step takes away: α·λ under ``"lr"``, as in torch; λ·(α/α₀) under
        ``"independent"``, as in the paper. There the decay follows the schedule but not the size of the learning rate;
        usual values of λ are about α₀ times those for ``"lr"``, so the default of 0.01 is far too large. See
        ``docs/decay.md``.
    reference_lr : float, optional
        α₀ of ``"independent"``, finite and > 0: the learning rate at which a step takes away the part λ. None is the
        group's `lr` when the group is added, so give α₀ if that is 0 or not the peak of the schedule. Later changes of
        `lr` leave it as it is. It is saved.
    cautious_decay : bool, default False
        Take the decay only from elements that the update itself also moves towards 0: those where θ and the
        term after α·λ·θ in the last line above have the same sign and neither is 0.
    spike_threshold : float, optional
        Finite and above 0; 6 is a good start. A step is skipped, and counted in ``skipped_steps``, if its gradient
        norm is more than this many deviations above the mean of the norms before it. A deviation is their standard
        deviation plus half their mean. The first 64 steps are all taken. After 16 such steps in a row the optimizer
        warns and learns the norms anew. ``docs/spikes.md`` gives the formula. You may set it between steps.
    ema_decay : float, optional
        In [0, 1): keep an average of each parameter's weights, and at each of its steps set it to ``ema_decay`` times
        itself plus 1 − ``ema_decay`` times the new weight. It covers about the last 1 / (1 − ``ema_decay``) steps and
        takes 4 bytes per parameter. You may set it between steps: the average starts at the weights as they are.
        `averaged`, `averages` and `copy_averages_to` use it. See ``docs/averages.md``.

    Attributes
    ----------
    param_groups : list of dict
        Each has ``"params"``, ``"lr"``, ``"beta1"``, ``"beta2"``, ``"eps"``, ``"weight_decay"``, ``"amsgrad"``,
        ``"maximize"``, ``"state_format"``, ``"master_weights"``, ``"seed"``, ``"weight_decay_schedule"``,
        ``"reference_lr"``, ``"cautious_decay"`` and ``"ema_decay"``. ``"betas"`` reads and writes ``beta1`` and
        ``beta2``. Under ``spike_threshold`` there is also ``"spike_memory"``. If you change a hyperparameter, the next
        step uses the new value. Other keys are kept; a warning names each that neither the optimizer nor a known tool
        reads, with the nearest hyperparameter.
    defaults : dict
        The same hyperparameters, for groups that do not set their own.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described. The message names the argument, its value and what is allowed.

    Notes
    -----
    Under ``"fp32"`` state takes 8 bytes per float32 parameter, and 4 more with amsgrad. It is created in the first step
    in which the parameter has a gradient. ``docs/formats.md`` describes the other formats and what they do to training.
    A step is all or nothing: it finds errors before the first write.

    References
    ----------
    I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2. In the paper the decay is
    ηₜ λ θ, independent of α; here it is α λ θ, as in PyTorch, or ηₜ λ θ with ηₜ = α/α₀ under ``"independent"``.
    Cautious decay: L. Chen et al., "Cautious Weight Decay", arXiv:2510.12402, 2025. amsgrad: S. J. Reddi, S. Kale, S.
    Kumar, "On the Convergence of Adam and Beyond", ICLR 2018; as in PyTorch, the maximum is of v before its bias
    correction.

    Examples
    --------
    >>> import torch
    >>> import lucid.optim as optim
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    >>> optimizer.zero_grad()
    >>> loss = model(torch.ones(3, 2)).square().mean()
    >>> loss.backward()
    >>> optimizer.step()
    >>> int(optimizer.state[model.weight]["step"])
    1

    A bfloat16 model with 8-bit moments takes 8.06 bytes per parameter for weights, gradients and state.

    >>> model = torch.nn.Linear(256, 256).bfloat16()
    >>> optimizer = optim.AdamW(model.parameters(), lr=1e-2, state_format="8bit")
    >>> model(torch.ones(1, 256, dtype=torch.bfloat16)).sum().backward()
    >>> optimizer.step()
    >>> sorted(optimizer.state[model.weight])
    ['exp_avg_code', 'exp_avg_scale', 'exp_avg_sq_code', 'exp_avg_sq_scale', 'residual', 'step', 'stream']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Iterable[float] | Tensor = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        state_format: StateFormatName = "fp32",
        master_weights: MasterWeights = True,
        max_grad_norm: float | None = None,
        nonfinite: NonFinite = "propagate",
        seed: int = 0,
        shard_group: ProcessGroup | None = None,
        state_device: StateDevice | None = None,
        weight_decay_schedule: WeightDecaySchedule = "lr",
        reference_lr: float | None = None,
        cautious_decay: bool = False,
        ema_decay: float | None = None,
        spike_threshold: float | None = None,
    ) -> None:
        beta1, beta2 = pair(betas)
        defaults = ParamGroup(
            {
                "lr": lr,
                "beta1": beta1,
                "beta2": beta2,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "maximize": maximize,
                "state_format": state_format,
                "master_weights": master_weights,
                "seed": seed,
                "weight_decay_schedule": weight_decay_schedule,
                "reference_lr": reference_lr,
                "cautious_decay": cautious_decay,
                "ema_decay": ema_decay,
            }
        )
        self._hyperparameters(defaults)
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            nonfinite=nonfinite,
            shard_group=shard_group,
            state_device=state_device,
            spike_threshold=spike_threshold,
        )

    def _hyperparameters(self, group: ParamGroup, *, reads: bool = True) -> Hyperparameters:
        try:
            lr, get = group["lr"], group.get
            ema_decay = get("ema_decay")
            return Hyperparameters(
                lr=lr if isinstance(lr, Tensor) and not reads else checked_lr(lr),
                beta1=checked_number("beta1", group["beta1"], below=1.0),
                beta2=checked_number("beta2", group["beta2"], below=1.0),
                eps=checked_number("eps", group["eps"]),
                weight_decay=checked_number("weight_decay", group["weight_decay"]),
                amsgrad=checked_flag("amsgrad", group["amsgrad"]),
                maximize=checked_flag("maximize", group["maximize"]),
                state_format=one_of("state_format", group["state_format"], NAMES),
                master_weights=_master_weights(group["master_weights"]),
                seed=_seed(group["seed"]),
                # Groups that were pickled by an earlier release do not have these.
                weight_decay_schedule=schedule_of(group),
                reference_lr=_reference_lr(group),
                cautious_decay=checked_flag("cautious_decay", get("cautious_decay", False)),
                ema_decay=None if ema_decay is None else checked_number("ema_decay", ema_decay, below=1.0),
            )
        except KeyError as error:
            raise ValueError(f"a parameter group has no {error}; set it, or add the group again") from None


def _reference_lr(group: ParamGroup) -> float | None:
    """Return the group's reference learning rate, above 0, or None; raise if it has none and needs one."""
    value = group.get("reference_lr")
    if value is None and not ("params" in group and schedule_of(group) == "independent"):
        return None
    if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"reference_lr: expected None or a number, got {shown(value)}")
    number = 0.0 if value is None else as_float(value)
    if not 0.0 < number < math.inf:
        raise ValueError(
            f"reference_lr: expected a number above 0, got {shown(value)}; give the learning rate for which "
            "weight_decay is meant, for example the peak of the schedule (None takes lr when the group is added, if "
            "that is above 0)"
        )
    return number


def _master_weights(value: Any) -> MasterWeights:
    if isinstance(value, str) and value == "stochastic":
        return "stochastic"
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"master_weights: expected True, False or 'stochastic', got {shown(value)}")
    return bool(value)


def _seed(value: Any) -> int:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise TypeError(f"seed: expected a whole number, got {shown(value)}")
    seed = int(value)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected a whole number from 0 to 2**63 - 1, got {shown(value)}")
    return seed
