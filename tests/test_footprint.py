"""What importing costs, and what is said where an engine is missing."""

import subprocess
import sys
import warnings

import pytest
import torch

import lucid.optim as optim
from lucid import engine


def test_heavy_modules_wait_until_they_are_needed():
    code = "import sys, torch; before = set(sys.modules); import lucid.optim; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    new = run.stdout.split()
    assert "lucid.optim" in new
    heavy = ("triton", "torch.distributed", "torch._dynamo", "torch._inductor", "sympy", "scipy", "matplotlib")
    assert not [name for name in new if name.startswith(heavy)]


def test_a_missing_engine_is_named_once(monkeypatch):
    monkeypatch.setattr(engine.cpu, "missing", "its extension did not load")
    monkeypatch.setattr(engine.plan, "_warned_of", set())
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = optim.AdamW(params)
    for param in params:
        param.grad = torch.ones(3)
    with pytest.warns(RuntimeWarning, match="reference engine: its extension did not load") as said:
        optimizer.step()
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.engine_for(params[0]) == "reference"
    assert optimizer.state[params[1]]["step"] == 2


def test_the_engine_in_use_is_named():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([param])
    assert optimizer.engine_for(param) == "cpu"
    with engine.only("reference"):
        assert optimizer.engine_for(param) == "reference"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_a_compiled_training_step():
    """Compiled code may call step(): the step itself runs as it is."""
    torch._dynamo.reset()
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([param], lr=0.1)

    @torch.compile(backend="eager")
    def train(x):
        loss = (param * x).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(3):
        train(torch.ones(3))
    assert optimizer.state[param]["step"] == 3
    assert (param < 0.8).all()


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as DTensor and FakeTensor are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=True)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(str(func))


def test_wrapped_parameters_are_refused():
    param = Wrapped(torch.ones(3))
    optimizer = optim.AdamW([param])
    with pytest.raises(TypeError, match="Wrapped, expected a plain tensor"):
        optimizer.init_state()
    assert not optimizer.state
