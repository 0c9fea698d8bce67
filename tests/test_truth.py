"""AdamW against exact arithmetic: what float32 and float64 lose, in one step and over thousands.

The problems, the oracle and the contestants are those of ``benchmarks/accuracy.py``; the bounds are those that
``docs/numerics.md`` states. Guarded: the form of the update (incremental means, decay subtracted, 1 − β^t without
cancellation). Written any other way it fails here, though every engine may still agree with the reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.accuracy import (
    DECAYS,
    EDGES,
    MP,
    STATE_ROUNDED,
    THETA_ROUNDED,
    Errors,
    Exact,
    Problem,
    measure,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import lucid.optim
from quick import examples

SMALL = 1_024  # elements
UNDERFLOWS = {"g ~ 1e-30"}  # where g² is 0


# The oracle


@pytest.mark.slow
@pytest.mark.parametrize("problem", [DECAYS, *EDGES.values()], ids=["αλ", *EDGES])
def test_the_float64_oracle_is_a_million_times_finer_than_float32(problem: Problem):
    steps = DECAYS.steps if problem is DECAYS else 500
    problem = replace(problem, elements=2, steps=steps)
    start, gradients = problem.draw()
    oracles = Exact(problem), Exact(problem, mp=True)
    thetas = [oracle.numbers(np.stack([start] * len(problem.decays))) for oracle in oracles]
    for g in gradients:
        for index, oracle in enumerate(oracles):
            oracle.observe(g)
            thetas[index] = oracle.moved(thetas[index])
    exactly = oracles[1].numbers
    for fast, exact in zip(exactly(thetas[0]), thetas[1], strict=True):  # of each αλ
        assert np.abs(fast - exact).max() < 1e-14 * np.abs(exact).max()
    assert np.abs(exactly(oracles[0].v) / oracles[1].v - 1).max() < 1e-13


# Thousands of steps in float32


@pytest.fixture(scope="module")
def over_decays() -> Errors:
    return measure(replace(DECAYS, elements=2 * SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS.decays)
def test_theta_beside_torchs_and_beside_the_best_of_float32(over_decays: Errors, decay: float):
    index = DECAYS.decays.index(decay)
    ours = over_decays.theta["lucid"][index]
    torchs = over_decays.torch()[index]
    assert ours <= (torchs / 10 if decay == 1e-5 else torchs * 1.05)
    assert ours <= 2 * over_decays.theta[THETA_ROUNDED][index]


@pytest.mark.slow
def test_bias_of_v(over_decays: Errors):
    assert abs(over_decays.bias["lucid"]) <= 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str):
    """The second αλ, 1e-2, forgets θ's own roundings: what is left there is that m and v are stored in float32."""
    problem = replace(EDGES[name], elements=SMALL)
    errors = measure(problem, ["lucid"])
    ours = errors.theta["lucid"]
    assert ours[0] <= 2 * errors.theta[THETA_ROUNDED][0]
    assert (ours <= 1.5 * errors.theta[STATE_ROUNDED]).all()
    if name not in UNDERFLOWS:
        assert abs(errors.bias["lucid"]) <= 1e-7


def test_amsgrad_beside_torchs():
    errors = measure(replace(EDGES["amsgrad"], elements=SMALL))
    assert errors.theta["lucid"][0] <= errors.torch()[0] / 10


# Thousands of steps in float64


@pytest.mark.slow
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9999999), (0.9999999, 0.9999999)])
def test_float64(betas: tuple[float, float], amsgrad: bool):
    problem = Problem(
        decays=(1e-2, 1e-5),
        betas=betas,
        amsgrad=amsgrad,
        elements=16,
        steps=400,
        dtype=torch.float64,
    )
    errors = measure(problem, ["lucid"], mp=True)
    assert (errors.theta["lucid"] <= 2 * errors.theta[STATE_ROUNDED]).all()
    assert abs(errors.bias["lucid"]) <= 1e-14


# One step


@dataclass(frozen=True)
class Step:
    """One element before a step, and the hyperparameters of the step."""

    theta: float
    g: float
    m: float
    v: float
    w: float | None
    alpha: float
    decay: float
    betas: tuple[float, float]
    eps: float
    step: int


def steps(width: int) -> st.SearchStrategy[Step]:
    """Magnitudes that neither overflow nor leave the normal numbers before θ is formed."""
    magnitude = st.floats(2.0**-40, 2.0**40, width=width)
    signed = st.just(0.0) | magnitude | magnitude.map(lambda x: -x)
    positive = st.just(0.0) | st.floats(2.0**-80, 2.0**80, width=width)
    beta = st.sampled_from([0.0, 1e-3, 0.3, 0.5, 0.9, 0.99, 0.999, 0.9999999])
    return st.builds(
        Step,
        theta=signed,
        g=signed,
        m=signed,
        v=positive,
        w=st.none() | positive,
        alpha=st.floats(2.0**-20, 1.0),
        decay=st.just(0.0) | st.floats(2.0**-20, 1.0),
        betas=st.tuples(beta, beta),
        eps=st.floats(2.0**-40, 2.0**-5),
        step=st.integers(1, 2**20),
    )


def check_one_step(before: Step, dtype: torch.dtype) -> None:
    """Compare a step with exact arithmetic.

    With u = 2⁻²⁴ (2⁻⁵³), A = α·m̂ / (√v̂ + ε), all values the exact ones of this step, and b = min(β1, 1 − β1):

    - m errs by u·(|m| + 3b·|g − m₀|): the sum, and difference, coefficient and product of the increment;
    - v by 5u·v: the same, with an increment of at most v, and g²; by 6u with what is of second order;
    - θ by half an ulp and u·(3·αλ·|θ₀| + 12·|A| + 3b·|g − m₀|·A/m): k, s, ε, k·m, √, √·s, + ε, /, the sum with the
      decay, m, half of v's five. In float64 the host's own roundings make 12 into 24 and 3 into 4.
    """
    single = dtype == torch.float32
    u = MP.mpf(2) ** (-24 if single else -53)
    of_step, of_decay = (12, 3) if single else (24, 4)
    tiny = MP.mpf(2) ** (-147 if single else -1072)

    param, after = one_step(before, dtype)
    theta, g, m0, v0 = (MP.mpf(x) for x in (before.theta, before.g, before.m, before.v))
    alpha, decay, eps = (MP.mpf(x) for x in (before.alpha, before.decay, before.eps))
    beta1, beta2 = (MP.mpf(x) for x in before.betas)
    m = beta1 * m0 + (1 - beta1) * g
    v = beta2 * v0 + (1 - beta2) * g * g
    w = v if before.w is None else max(MP.mpf(before.w), v)
    per_m = alpha / (1 - beta1**before.step) / (MP.sqrt(w / (1 - beta2**before.step)) + eps)
    exact = theta - alpha * decay * theta - per_m * m

    of_m = of_decay * min(beta1, 1 - beta1) * abs(g - m0)
    half_ulp = MP.mpf(float(np.spacing(np.abs(param)))) / 2
    assert abs(MP.mpf(after["exp_avg"].item()) - m) <= u * (abs(m) + of_m) + tiny
    assert abs(MP.mpf(after["exp_avg_sq"].item()) - v) <= 6 * u * v + tiny
    if before.w is not None:
        assert abs(MP.mpf(after["max_exp_avg_sq"].item()) - w) <= 6 * u * w + tiny
    moved = of_decay * alpha * decay * abs(theta) + per_m * (of_step * abs(m) + of_m)
    assert abs(MP.mpf(float(param)) - exact) <= half_ulp + u * moved + tiny


def one_step(before: Step, dtype: torch.dtype) -> tuple[np.floating[Any], dict[str, torch.Tensor]]:
    """Return θ and the state after it."""
    param = torch.nn.Parameter(torch.tensor([before.theta], dtype=dtype))
    param.grad = torch.tensor([before.g], dtype=dtype)
    optimizer = lucid.optim.AdamW(
        [param],
        lr=before.alpha,
        betas=before.betas,
        eps=before.eps,
        weight_decay=before.decay,
        amsgrad=before.w is not None,
    )
    moments = {"exp_avg": before.m, "exp_avg_sq": before.v, "max_exp_avg_sq": before.w}
    optimizer.state[param] = {"step": torch.tensor(before.step - 1.0)} | {
        key: torch.tensor([value], dtype=dtype) for key, value in moments.items() if value is not None
    }
    optimizer.step()
    return param.detach().numpy()[0], optimizer.state[param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_step_errs_by_half_an_ulp_and_little_more(dtype: torch.dtype):
    @settings(max_examples=examples(500), deadline=None, derandomize=True, database=None)
    @given(steps(32 if dtype == torch.float32 else 64))
    def check(before: Step) -> None:
        check_one_step(before, dtype)

    check()


TRAPS = {
    "a rounded 1 − αλ": Step(
        theta=1.9940500259399414, g=0.0, m=0.0, v=0.0, w=None,
        alpha=1e-3, decay=1e-2, betas=(0.9, 0.999), eps=1e-8, step=1,
    ),
    "an increment at β = 0": Step(
        theta=1.0, g=2.0**-20, m=2.0**40, v=2.0**60, w=None,
        alpha=1e-3, decay=1e-2, betas=(0.0, 0.0), eps=1e-8, step=9,
    ),
    "1 − β^t by subtraction": Step(
        theta=1.0, g=1.5, m=0.0, v=0.0, w=None,
        alpha=1.0, decay=0.0, betas=(0.9999999, 0.9999999), eps=1e-8, step=7,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("trap", TRAPS)
def test_one_step_into_the_traps_of_other_forms(trap: str, dtype: torch.dtype):
    check_one_step(TRAPS[trap], dtype)
