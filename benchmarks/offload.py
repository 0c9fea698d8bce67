"""Time a step whose state is on the host (`state_device="cpu"`), on a CUDA device, beside what it is made of.

python -m benchmarks.offload
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import lucid.optim
from lucid.bench.paired import Quartiles, ratios, rounds, sampler
from lucid.bench.shapes import llama_1b
from lucid.engine import offload

from . import machine
from .report import Table, terminal

LUCID, COPIES, UPDATE, BY_HAND = "state_device", "its copies alone", "its update alone", "torch fused on the host"


def _steps(dtype: torch.dtype, **options: Any) -> dict[str, Callable[[], object]]:
    device = torch.device("cuda")
    params = [Parameter(torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)) for shape in llama_1b()]
    for param in params:
        param.grad = torch.empty_like(param).normal_(std=1e-3)
    optimizer = lucid.optim.AdamW(params, 1e-4, state_device="cpu", **options)

    here = [Parameter(param.detach().cpu()) for param in params]
    for own, param in zip(here, params, strict=True):
        own.grad = _gradient(param).cpu()
    update = lucid.optim.AdamW(here, 1e-4, **options)

    copies = offload.copies_for(device)
    stages = [(copies.staging(offload.PIECE_BYTES), copies.staging(offload.PIECE_BYTES)) for _ in range(offload.SLOTS)]

    chunks = [pair for param in params for pair in zip(_cut(param.detach()), _cut(_gradient(param)), strict=True)]

    def copy() -> None:
        def fetch(number: int) -> Tensor:
            slot, pair = number % offload.SLOTS, chunks[number]
            at = [stage[: part.nbytes].view(dtype) for stage, part in zip(stages[slot], pair, strict=True)]
            copies.fetch(slot, list(zip(at, pair, strict=True)))
            return at[0]

        copies.begin()
        ready = fetch(0)
        for number, (param, _) in enumerate(chunks):
            coming = fetch(number + 1) if number + 1 < len(chunks) else ready
            copies.wait(number % offload.SLOTS)
            copies.send(number % offload.SLOTS, param, ready)
            ready = coming
        copies.end()

    steps: dict[str, Callable[[], object]] = {LUCID: optimizer.step, COPIES: copy, UPDATE: update.step}
    if dtype == torch.float32:
        steps[BY_HAND] = _by_hand(params, here)
    return {name: _synchronized(step) for name, step in steps.items()}


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def _cut(tensor: Tensor) -> Sequence[Tensor]:
    size = offload.PIECE_BYTES // tensor.element_size()
    return [tensor.view(-1)[begin : begin + size] for begin in range(0, tensor.numel(), size)]


def _by_hand(params: Sequence[Tensor], here: Sequence[Parameter]) -> Callable[[], None]:
    """What one writes without help: all gradients over, torch's fused step there, all parameters back."""
    own = [Parameter(param.detach().clone().pin_memory()) for param in here]
    for param in own:
        param.grad = torch.empty_like(param).pin_memory()
    optimizer = torch.optim.AdamW(own, 1e-4, fused=True)

    def step() -> None:
        for param, mine in zip(params, own, strict=True):
            assert mine.grad is not None
            mine.grad.copy_(_gradient(param), non_blocking=True)
        torch.cuda.synchronize()
        optimizer.step()
        with torch.no_grad():
            for param, mine in zip(params, own, strict=True):
                param.copy_(mine, non_blocking=True)

    return step


def _synchronized(step: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run


CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bf16 weights + residual, 8bit": (torch.bfloat16, {"state_format": "8bit"}),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offload", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit(f"This measures on a CUDA device, and torch {torch.__version__} finds none here.")
    rows = []
    for case, (dtype, kind) in CASES.items():
        steps = _steps(dtype, **kind)
        samplers = {name: sampler(step, warm=False) for name, step in steps.items()}
        samples = rounds(samplers, dict.fromkeys(steps, options.rounds), case)
        for name, taken in samples.items():
            times = ratios(taken, samples[LUCID])
            spread = f"{times.median:.2f} ({times.low:.2f}–{times.high:.2f})"
            rows.append([case, name, f"{1e3 * Quartiles.of(taken).median:.0f}", spread])
        del steps
        torch.cuda.empty_cache()
    table = Table("State on the host", "Llama 3.2 1B.", ["case", "", "ms", "× state_device"], rows)
    print(terminal(machine.description(), [], [table]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
