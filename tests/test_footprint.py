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
    assert [warning.filename for warning in said] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.engine_for(params[0]) == "reference"
    assert optimizer.state[params[1]]["step"] == 2


STEPS = """
import sys, warnings
warnings.simplefilter("error")
import torch
import lucid.optim as optim
from lucid import engine
for state_format in ("fp32", "bf16", "8bit"):
    params = [torch.nn.Parameter(torch.ones(64, 128, dtype=kind)) for kind in (torch.float32, torch.bfloat16)]
    optimizer = optim.AdamW(params, lr=0.1, state_format=state_format, max_grad_norm=1.0, nonfinite="skip")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(optimizer.engine_for(param) == "cpu" and (param < 1).all() for param in params)
print(*[name for name in sys.modules if name.startswith("lucid.engine.cuda.")], engine.name_for(torch.device("cuda")))
print(engine.cuda.missing)
"""


def stepped(before=""):
    """What a process says that steps parameters on the CPU: modules of the CUDA engine, a GPU's engine, why not CUDA.

    Triton itself may be there: torch's dynamo imports it, for which torch's own optimizers ask too.
    """
    run = subprocess.run([sys.executable, "-c", before + STEPS], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_triton_waits_for_a_gpu():
    assert stepped() == ["cuda", "None"]


@pytest.mark.slow
def test_steps_where_there_is_no_triton():
    name, reason = stepped('import sys; sys.modules["triton"] = None')  # as if it were not installed
    assert name == "reference"
    assert reason.startswith("Triton is not installed; ")


def test_a_missing_gpu_engine_is_named_once(monkeypatch):
    device = torch.device("cuda")
    assert engine.name_for(device) == "cuda"
    monkeypatch.setattr(engine.cuda, "missing", "Triton is away")
    monkeypatch.setattr(engine.plan, "_warned_of", set())
    assert engine.name_for(device) == "reference"
    with pytest.warns(RuntimeWarning, match="on cuda with its slow reference engine: Triton is away") as said:
        engine.plan._warn_of_reference(device)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.plan._warn_of_reference(torch.device("cuda", 1))


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
