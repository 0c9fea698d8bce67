"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from .formats import NAMES, StateFormatName
from .gradients import NonFinite
from .groups import ParamGroup, pair
from .optimizer import Hyperparameters, Optimizer, Params
from .values import checked_flag, checked_lr, checked_number, one_of, shown

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AdamW(Optimizer):
    """AdamW, Adam with decoupled weight decay; takes the place of ``torch.optim.AdamW``.

    At step t, with gradient g (negated if `maximize`), parameter θ, and m, v and w from 0:

        m = β1·m + (1 − β1)·g
        v = β2·v + (1 − β2)·g²
        w = v, or max(w, v) with amsgrad
        θ = θ − α·λ·θ − α·(m / (1 − β1^t)) / (√(w / (1 − β2^t)) + ε)

    The decay is taken from the parameter and is never mixed into the gradient. ``docs/numerics.md`` gives the
    order of operations, which every engine keeps to the bit.

    Parameters
    ----------
    params : iterable of Parameter, of (name, Parameter) pairs, or of dict
        float32, bfloat16, float16, float64, complex64 or complex128, of any shape and dense layout. A group dict has
        ``"params"`` and may override every hyperparameter below; ``betas`` or ``beta1`` and ``beta2``.
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
        Divide by the maximum of all v so far. It may be switched on later.
    maximize : bool, default False
        Ascend instead of descend.
    state_format : {"fp32", "bf16", "8bit"}, default "fp32"
        How the two moments are kept: 8, 4 or about 2.06 bytes a parameter. ``"8bit"`` applies to parameters with at
        least 2 dimensions, 4,096 elements and 64 elements a row; the others keep float32. float64 and complex
        parameters keep their moments in full. To be chosen before the first step; ``load_state_dict`` converts.
    master_weights : bool, default True
        Keep for bfloat16 parameters 2 bytes, and for float16 ones 4, that make them train as float32 does. Without,
        a new value is rounded to the nearest, as torch does, and small updates are lost.
    max_grad_norm : float, optional
        Above 0. Where the norm of all gradients together is larger, they are scaled down in the update, by the factor
        that ``torch.nn.utils.clip_grad_norm_`` takes; ``.grad`` stays as it is. Infinity measures only. ``grad_norm``
        tells the norm. This and the next may be set between steps.
    nonfinite : {"propagate", "skip", "error"}, default "propagate"
        What to do where a gradient has an entry that is NaN, infinite, or too large to be squared. ``"propagate"``
        computes with it, which spoils the parameter; ``"skip"`` leaves the whole step out and counts it in
        ``skipped_steps``; ``"error"`` raises FloatingPointError and changes nothing. The last two read the gradients
        once more, as ``max_grad_norm`` does, and together they read them once.
    seed : int, default 0
        Of the random rounding that ``"bf16"`` and ``"8bit"`` need, from 0 to 2⁶³ − 1. It counts when a parameter's
        state is created; no global generator is read or changed.
    shard_group : torch.distributed.ProcessGroup, optional
        Processes that hold different parameters, or different parts of plain ones, as under
        ``ZeroRedundancyOptimizer``, the first FSDP, or pipeline stages: the gradient norm is then of all their
        gradients, and they leave out the same steps. DTensors (FSDP2, tensor parallelism) need none.
    state_device : "cpu" or None, default None
        Keep the state of parameters on a GPU in the host's memory, and update them there: chunks of gradients and
        parameters come over and go back while others are updated. The same bits, at the speed of the host's memory and
        of the bus. ``docs/gpu.md``.

    Attributes
    ----------
    param_groups : list of dict
        Each with ``"params"``, ``"lr"``, ``"beta1"``, ``"beta2"``, ``"eps"``, ``"weight_decay"``, ``"amsgrad"``,
        ``"maximize"``, ``"state_format"``, ``"master_weights"`` and ``"seed"``; ``"betas"`` reads and writes the two.
        A change of a hyperparameter takes effect at the next step.
    defaults : dict
        The hyperparameters of groups that do not give their own, under the same names.

    Raises
    ------
    TypeError, ValueError
        Where an argument is not as described; the message names it, its value and what is allowed.

    Notes
    -----
    State is 8 bytes a float32 parameter under ``"fp32"``, 4 more with amsgrad, created at a parameter's first gradient;
    ``docs/formats.md`` has the other formats and what they do to training. A step is all or nothing: whatever is wrong
    is found before the first write.

    References
    ----------
    I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2. There the decay is
    ηₜ λ θ with λ apart from α; here, as in PyTorch, it is α λ θ. amsgrad: S. J. Reddi, S. Kale, S. Kumar, "On the
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

    A bfloat16 model with 8-bit moments: 8 bytes a parameter for weights, gradients and state.

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
        master_weights: bool = True,
        max_grad_norm: float | None = None,
        nonfinite: NonFinite = "propagate",
        seed: int = 0,
        shard_group: ProcessGroup | None = None,
        state_device: Literal["cpu"] | None = None,
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
            lr = group["lr"]
            return Hyperparameters(
                lr=lr if isinstance(lr, Tensor) and not reads else checked_lr(lr),
                beta1=checked_number("beta1", group["beta1"], below=1.0),
                beta2=checked_number("beta2", group["beta2"], below=1.0),
                eps=checked_number("eps", group["eps"]),
                weight_decay=checked_number("weight_decay", group["weight_decay"]),
                amsgrad=checked_flag("amsgrad", group["amsgrad"]),
                maximize=checked_flag("maximize", group["maximize"]),
                state_format=one_of("state_format", group["state_format"], NAMES),
                master_weights=checked_flag("master_weights", group["master_weights"]),
                seed=_seed(group["seed"]),
            )
        except KeyError as error:
            raise ValueError(f"a parameter group has no {error}; set it, or add the group anew") from None


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"seed: expected a whole number, got {shown(value)}")
    seed = int(value)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected a whole number from 0 to 2**63 - 1, got {shown(value)}")
    return seed
