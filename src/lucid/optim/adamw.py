"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lucid.engine.formats import NAMES, MasterWeights, StateFormatName
from lucid.engine.values import checked_flag, checked_lr, checked_number, one_of, shown

from .groups import ParamGroup, pair
from .hyperparameters import Hyperparameters, WeightDecaySchedule
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
        λ, finite and ≥ 0.
    amsgrad : bool, default False
        Divide by the maximum of all v so far. You may switch it on during training.
    maximize : bool, default False
        Maximize the objective instead of minimizing it.
    state_format : {"fp32", "bf16", "8bit"}, default "fp32"
        How the two moments are stored: in 8, 4 or about 2.06 bytes per parameter. ``"8bit"`` applies to parameters
        with at least 2 dimensions, 4,096 elements and 64 elements per row; other parameters keep float32 moments.
        float64 and complex parameters keep moments in their own precision. Choose it before the first step;
        ``load_state_dict`` converts.
    master_weights : bool, default True
        Store 2 more bytes for bfloat16 parameters and 4 for float16 ones, with which they train as float32 parameters
        do. Without them a new value is rounded to nearest, as in torch, and small updates are lost.
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
        Seed of the stochastic rounding of ``"bf16"`` and ``"8bit"``, from 0 to 2⁶³ − 1. It is used when a parameter's
        state is created. No global generator is read or changed.
    shard_group : torch.distributed.ProcessGroup, optional
        Processes that hold different parameters, or different parts of plain tensors, as under
        ``ZeroRedundancyOptimizer``, FSDP1 or pipeline parallelism. The gradient norm is then over the gradients of all
        of them, and they skip the same steps. DTensors (FSDP2, tensor parallelism) do not need it.
    state_device : "cpu" or None, default None
        ``"cpu"`` keeps the state of parameters on a GPU in the host's memory and updates them on the CPU. Gradients
        and parameters are copied to the host in chunks, and parameters are copied back. The bits are the same; the
        speed is that of the host's memory and of the bus. See ``docs/gpu.md``.
    ema_decay : float, optional
        In [0, 1): keep an average of each parameter's weights, and at each of its steps set it to ``ema_decay`` times
        itself plus 1 − ``ema_decay`` times the new weight. It covers about the last 1 / (1 − ``ema_decay``) steps and
        takes 4 bytes per parameter. You may set it between steps: the average starts at the weights as they are.
        `averaged`, `averages` and `copy_averages_to` use it. See ``docs/averages.md``.

    Attributes
    ----------
    param_groups : list of dict
        Each has ``"params"``, ``"lr"``, ``"beta1"``, ``"beta2"``, ``"eps"``, ``"weight_decay"``, ``"amsgrad"``,
        ``"maximize"``, ``"state_format"``, ``"master_weights"``, ``"seed"`` and ``"ema_decay"``. ``"betas"`` reads and
        writes ``beta1`` and ``beta2``. If you change a hyperparameter, the next step uses the new value. Other keys are
        kept; a warning names each that neither the optimizer nor a known tool reads, with the nearest hyperparameter.
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
    ηₜ λ θ, independent of α; here, as in PyTorch, it is α λ θ. amsgrad: S. J. Reddi, S. Kale, S. Kumar, "On the
    Convergence of Adam and Beyond", ICLR 2018; as in PyTorch, the maximum is of v before its bias correction.

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
        state_device: Literal["cpu"] | None = None,
        weight_decay_schedule: WeightDecaySchedule = "lr",
        reference_lr: float | None = None,
        cautious_decay: bool = False,
        ema_decay: float | None = None,
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
                weight_decay_schedule=one_of(
                    "weight_decay_schedule", group.get("weight_decay_schedule", "lr"), _SCHEDULES
                ),
                reference_lr=_reference_lr(group),
                cautious_decay=checked_flag("cautious_decay", get("cautious_decay", False)),
                ema_decay=None if ema_decay is None else checked_number("ema_decay", ema_decay, below=1.0),
            )
        except KeyError as error:
            raise ValueError(f"a parameter group has no {error}; set it, or add the group again") from None


_SCHEDULES: tuple[WeightDecaySchedule, ...] = ("lr", "independent")


def _reference_lr(group: ParamGroup) -> float | None:
    """Return the group's reference learning rate, above 0; None if it has none and needs none."""
    value = group.get("reference_lr")
    if value is None:
        if group.get("weight_decay_schedule") == "independent" and "params" in group:
            raise ValueError(
                'reference_lr: expected a number above 0 in a group with weight_decay_schedule="independent", got '
                "None; set it to the learning rate for which weight_decay is meant"
            )
        return None
    number = checked_number("reference_lr", value)
    if not number:
        raise ValueError(
            "reference_lr: expected a number above 0, got 0; give the learning rate for which weight_decay is meant, "
            "for example the peak of the schedule"
        )
    return number


def _master_weights(value: Any) -> MasterWeights:
    if isinstance(value, str):
        if value != "stochastic":
            raise ValueError(f"master_weights: expected True, False or 'stochastic', got {value!r}")
        return "stochastic"
    return checked_flag("master_weights", value)


def _seed(value: Any) -> int:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise TypeError(f"seed: expected a whole number, got {shown(value)}")
    seed = int(value)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected a whole number from 0 to 2**63 - 1, got {shown(value)}")
    return seed
