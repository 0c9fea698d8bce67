"""How far AdamW is from exact arithmetic after thousands of steps, beside torch's: Markdown tables.

Run ``python benchmarks/accuracy.py``. ``tests/test_truth.py`` measures the same problems with the same oracle and
asserts the bounds that ``docs/numerics.md`` states.
"""

from __future__ import annotations

import argparse
import datetime
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mpmath
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

import lucid.optim

Array = NDArray[Any]

MP = mpmath.MPContext()
MP.dps = 50
# Baselines: the exact update with what is stored rounded once at each step, θ alone or all of it.
THETA_ROUNDED = "θ rounded"
STATE_ROUNDED = "θ, m, v rounded"


@dataclass(frozen=True, slots=True)
class Problem:
    """Gradients ~ `scale` · N(0, 1), new at each step, and one parameter θ₀ ~ N(0, 1) for each αλ.

    The parameters start from the same values and see the same gradients.
    """

    decays: tuple[float, ...] = (1e-5, 1e-2)
    alpha: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    scale: float = 1.0
    steps: int = 5_000
    elements: int = 4_096
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def lambdas(self) -> list[float]:
        """Return λ for each αλ."""
        return [decay / self.alpha for decay in self.decays]

    @property
    def numpy_dtype(self) -> type[np.float32] | type[np.float64]:
        """The numpy type of the parameters."""
        return np.float32 if self.dtype == torch.float32 else np.float64

    def draw(self) -> tuple[Array, Iterator[Array]]:
        """Return θ₀, of shape (elements,), and the gradients of the steps; equal at each call."""
        generator = np.random.default_rng(self.seed)
        theta = generator.standard_normal(self.elements).astype(self.numpy_dtype)
        gradients = (
            (generator.standard_normal(self.elements) * self.scale).astype(self.numpy_dtype) for _ in range(self.steps)
        )
        return theta, gradients


DECAYS = Problem(decays=tuple(float(f"1e-{n}") for n in range(2, 11)))

EDGES = {
    "none": Problem(),
    "β = (0, 0)": Problem(betas=(0.0, 0.0)),
    "β = (0, 0.999)": Problem(betas=(0.0, 0.999)),
    "β = (0.9, 0)": Problem(betas=(0.9, 0.0)),
    "β = (0.3, 0.4)": Problem(betas=(0.3, 0.4)),
    "β = (0.9, 0.9999999)": Problem(betas=(0.9, 0.9999999)),
    "β = (0.9999999, 0.999)": Problem(betas=(0.9999999, 0.999)),
    "β = (0.9999999, 0.9999999)": Problem(betas=(0.9999999, 0.9999999)),
    "g ~ 1e-30": Problem(scale=1e-30),
    "g ~ 1e-18": Problem(scale=1e-18),
    "g ~ 1e-14, ε = 1e-20": Problem(scale=1e-14, eps=1e-20),
    "g ~ 1e-12": Problem(scale=1e-12),
    "g ~ 1e-6": Problem(scale=1e-6),
    "g ~ 1e6": Problem(scale=1e6),
    "g ~ 1e18": Problem(scale=1e18),
    "amsgrad": Problem(amsgrad=True),
}


class Exact:
    """AdamW as textbooks print it, on float64 or, with ``mp=True``, on numbers of 50 digits.

    β, α, λ and ε are the real numbers that the Python floats are. 1 − β^t has 50 digits in both. In float64 a step
    adds a few 2⁻⁵³ |θ| of error: 5,000 steps less than 1e-14 of the largest |θ|, as measured against 50 digits, where
    float32 parameters err by 1e-7 of it.

    ``rounded_moments`` makes it the best that any algorithm with moments of the problem's dtype can do: m and v are
    rounded to it, once, at each step.

    Attributes
    ----------
    m, v : array
        The means of gradients and of their squares, before bias correction.
    """

    def __init__(self, problem: Problem, *, mp: bool = False, rounded_moments: bool = False) -> None:
        self._number: Callable[[Any], Any] = MP.mpf if mp else float
        self._mp = mp
        self._dtype = problem.numpy_dtype
        self._rounded_moments = rounded_moments
        beta1, beta2, alpha = (MP.mpf(x) for x in (*problem.betas, problem.alpha))
        self._betas = beta1, beta2
        self._beta1, self._beta2 = self._number(beta1), self._number(beta2)
        self._rest1, self._rest2 = self._number(1 - beta1), self._number(1 - beta2)
        self._alpha, self._eps = self._number(alpha), self._number(problem.eps)
        self._decay = np.array([[self._number(alpha * MP.mpf(x))] for x in problem.lambdas()])
        self._amsgrad = problem.amsgrad
        self._power1 = self._power2 = MP.mpf(1)
        zeros = self.numbers(np.zeros(problem.elements))
        self.m, self.v, self._w = zeros, zeros, zeros
        self._change = zeros

    def numbers(self, x: Array) -> Array:
        """Return `x` in the oracle's arithmetic."""
        exact: Array = np.vectorize(MP.mpf, otypes=[object])(x.astype(np.float64)) if self._mp else x.astype(np.float64)
        return exact

    def rounded(self, x: Array) -> Array:
        """Return `x` rounded to the problem's dtype, as numbers of the oracle."""
        return self.numbers(x.astype(self._dtype))

    def observe(self, g: Array) -> None:
        """Take in the gradient of the next step."""
        g = self.numbers(g)
        self._power1 = self._power1 * self._betas[0]
        self._power2 = self._power2 * self._betas[1]
        self.m = self._beta1 * self.m + self._rest1 * g
        self.v = self._beta2 * self.v + self._rest2 * (g * g)
        if self._rounded_moments:
            self.m, self.v = self.rounded(self.m), self.rounded(self.v)
        self._w = np.maximum(self._w, self.v) if self._amsgrad else self.v
        m_hat = self.m / self._number(1 - self._power1)
        v_hat = self._w / self._number(1 - self._power2)
        self._change = self._alpha * m_hat / (np.sqrt(v_hat) + self._eps)

    def moved(self, theta: Array) -> Array:
        """Return where this step takes θ, of shape (number of αλ, elements)."""
        after: Array = theta - self._change - self._decay * theta
        return after


Contestant = Callable[[list[dict[str, Any]], dict[str, Any]], torch.optim.Optimizer]

CONTESTANTS: dict[str, Contestant] = {
    "lucid": lambda groups, options: lucid.optim.AdamW(groups, **options),
    "torch fused": lambda groups, options: torch.optim.AdamW(groups, fused=True, **options),
    "torch default": lambda groups, options: torch.optim.AdamW(groups, **options),
}


@dataclass(frozen=True, slots=True)
class Errors:
    """After the last step, by contestant.

    ``theta``: mean over elements of |θ − θ_exact|, for each αλ, of the two baselines too. ``bias``: mean over
    elements of (v − v_exact) / v_exact.
    """

    theta: dict[str, Array]
    bias: dict[str, float]

    def torch(self) -> Array:
        """Return the smaller error of torch's contestants."""
        best: Array = np.minimum(self.theta["torch fused"], self.theta["torch default"])
        return best


def measure(
    problem: Problem,
    contestants: Sequence[str] = tuple(CONTESTANTS),
    *,
    mp: bool = False,
    progress: bool = False,
) -> Errors:
    """Run the problem exactly and with each contestant, and compare.

    Parameters
    ----------
    problem : Problem
        What to run.
    contestants : sequence of str
        Keys of ``CONTESTANTS``.
    mp : bool, default False
        Let the oracle compute in 50 digits: some 50 µs an element and step, and needed for float64 parameters.
    progress : bool, default False
        Show a bar.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # changes no bits, and torch's threads spin where the cores are shared
    try:
        return _measured(problem, contestants, mp=mp, progress=progress)
    finally:
        torch.set_num_threads(threads)


def _measured(problem: Problem, contestants: Sequence[str], *, mp: bool, progress: bool) -> Errors:
    start, gradients = problem.draw()
    gradient = torch.zeros(problem.elements, dtype=problem.dtype)
    options = {
        "lr": problem.alpha,
        "betas": problem.betas,
        "eps": problem.eps,
        "amsgrad": problem.amsgrad,
    }
    params: dict[str, list[Tensor]] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name in contestants:
        params[name] = [torch.nn.Parameter(torch.from_numpy(start.copy())) for _ in problem.decays]
        for param in params[name]:
            param.grad = gradient
        groups = [
            {"params": [param], "weight_decay": decay}
            for param, decay in zip(params[name], problem.lambdas(), strict=True)
        ]
        optimizers[name] = CONTESTANTS[name](groups, options)

    oracle = Exact(problem, mp=mp)
    oracle_of_rounded = Exact(problem, mp=mp, rounded_moments=True)
    exact = oracle.numbers(np.stack([start] * len(problem.decays)))
    theta_rounded = state_rounded = exact
    for g in tqdm(gradients, total=problem.steps, disable=not progress, leave=False):
        oracle.observe(g)
        oracle_of_rounded.observe(g)
        exact = oracle.moved(exact)
        theta_rounded = oracle.rounded(oracle.moved(theta_rounded))
        state_rounded = oracle.rounded(oracle_of_rounded.moved(state_rounded))
        gradient.copy_(torch.from_numpy(g))
        for optimizer in optimizers.values():
            optimizer.step()

    theta = {
        THETA_ROUNDED: _mean(np.abs(theta_rounded - exact)),
        STATE_ROUNDED: _mean(np.abs(state_rounded - exact)),
    }
    bias = {}
    for name, optimizer in optimizers.items():
        reached = np.stack([param.detach().numpy() for param in params[name]])
        theta[name] = _mean(np.abs(oracle.numbers(reached) - exact))
        v = oracle.numbers(optimizer.state[params[name][0]]["exp_avg_sq"].numpy())
        bias[name] = float(_mean((v - oracle.v) / oracle.v))
    return Errors(theta, bias)


def _mean(x: Array) -> Array:
    """The mean over the last dimension, in float64."""
    mean: Array = np.asarray(x.mean(axis=-1), dtype=np.float64)
    return mean


COLUMNS = (*CONTESTANTS, THETA_ROUNDED, STATE_ROUNDED)
RATIOS = "torch's better / lucid", f"lucid / {THETA_ROUNDED}", f"lucid / {STATE_ROUNDED}"
EDGE_COLUMNS = "lucid", "torch's better", *RATIOS[1:]


def main() -> None:
    """Print the tables of ``docs/numerics.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=DECAYS.steps)
    parser.add_argument("--elements", type=int, default=DECAYS.elements)
    arguments = parser.parse_args()
    size = {"steps": arguments.steps, "elements": arguments.elements}

    print(
        f"{datetime.date.today()}, {_processor()}, torch {torch.__version__}, numpy {np.__version__}. Mean over "
        f"{arguments.elements:,} elements of |θ − θ_exact| after {arguments.steps:,} steps, θ₀ and g ~ N(0, 1), "
        f"α = {DECAYS.alpha:g}, β = {DECAYS.betas}, ε = {DECAYS.eps:g}.\n"
    )
    _row("αλ", *COLUMNS, *RATIOS)
    _row(*["---"] * (1 + len(COLUMNS) + len(RATIOS)))
    errors = measure(replace(DECAYS, **size), progress=True)
    for index, decay in enumerate(DECAYS.decays):
        _row(f"{decay:.0e}", *_figures(errors, index))

    print("\nEdges: the same at αλ = 1e-5 and 1e-2, but for what is named.\n")
    head = [f"{decay:.0e}: {column}" for decay in Problem().decays for column in EDGE_COLUMNS]
    _row("", *head, "bias of v: lucid", "bias of v: torch's better")
    _row(*["---"] * (3 + len(head)))
    for name, problem in tqdm(EDGES.items(), leave=False):
        errors = measure(replace(problem, **size))
        figures = [figure for index in range(2) for figure in _edge_figures(errors, index)]
        ours, *torchs = (errors.bias[contestant] for contestant in CONTESTANTS)
        _row(name, *figures, f"{ours:+.1e}", f"{min(torchs, key=abs):+.1e}")


def _figures(errors: Errors, index: int) -> Iterator[str]:
    ours = errors.theta["lucid"][index]
    yield from (f"{errors.theta[name][index]:.2e}" for name in COLUMNS)
    yield f"{errors.torch()[index] / ours:.2f}"
    yield f"{ours / errors.theta[THETA_ROUNDED][index]:.2f}"
    yield f"{ours / errors.theta[STATE_ROUNDED][index]:.2f}"


def _edge_figures(errors: Errors, index: int) -> Iterator[str]:
    ours, torchs = errors.theta["lucid"][index], errors.torch()[index]
    yield from (f"{ours:.2e}", f"{torchs:.2e}")
    yield from list(_figures(errors, index))[-2:]


def _row(*cells: str) -> None:
    tqdm.write("| " + " | ".join(cells) + " |")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line for line in lines if line.startswith("model name")).split(":")[1].strip()
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    main()
