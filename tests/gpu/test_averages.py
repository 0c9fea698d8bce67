"""Guards averages of the weights, stochastic weights and the two kinds of decay on a real GPU: the CPU engine's bits.

Run by `make test-gpu`; elsewhere the same kernels are interpreted (tests/test_cuda_averages.py).
"""

import math

import pytest
import torch
from test_cuda import SHAPES, Pair

from bits import assert_same, draw

EVERYTHING = {"ema_decay": 0.999, "cautious_decay": True, "weight_decay_schedule": "independent", "weight_decay": 0.1}
KINDS = [
    (torch.float32, {}),
    (torch.float32, {"state_format": "8bit", "amsgrad": True}),
    (torch.float64, {}),
    (torch.bfloat16, {}),
    *((torch.bfloat16, {"state_format": name, "master_weights": "stochastic"}) for name in ("fp32", "bf16", "8bit")),
    (torch.float16, {"master_weights": False, "state_format": "8bit"}),
]


@pytest.mark.parametrize("ema_decay", [None, 0.3, 0.999])
@pytest.mark.parametrize(("dtype", "options"), KINDS, ids=str)
def test_steps_have_the_cpu_engines_bits(dtype, options, ema_decay):
    pair = Pair(SHAPES, dtype, **{**EVERYTHING, **options, "ema_decay": ema_decay})
    assert pair.theirs[1].engine_for(pair.theirs[0][0]) == "cuda"
    for number in range(50):
        pair.step()
        if number in (0, 9, 49):
            pair.compare(number)


@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2), torch.tensor(1e-2, dtype=torch.float64)], ids=str)
def test_decisions_are_those_of_the_cpu_engine(rate):
    """A step that the device leaves out moves no average."""
    pair = Pair(SHAPES, lr=rate, max_grad_norm=0.05, nonfinite="skip", **EVERYTHING)
    for number in range(12):
        gradients = pair.gradients()
        if number % 4 == 3:
            gradients[number % 3].view(-1)[0] = math.nan
        pair.step(gradients)
    pair.compare()
    assert [optimizer.skipped_steps for _, optimizer in pair.sides] == [3, 3]


@pytest.mark.parametrize(("dtype", "options"), [KINDS[0], KINDS[6]], ids=str)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_captured_steps_and_steps_that_never_wait(dtype, options):
    both = [Pair(SHAPES[:5], dtype, torch.tensor(1e-2), max_grad_norm=0.05, **EVERYTHING, **options) for _ in range(2)]
    (captured_params, captured), (params, eager) = (pair.theirs for pair in both)

    def put(number):
        for own in (captured_params, params):
            for index, param in enumerate(own):
                gradient = (draw(100 * number + index, param.shape) * 1e-3).to(dtype).to(param.device)
                param.grad = gradient if param.grad is None else param.grad.copy_(gradient)
        for optimizer in (captured, eager):
            optimizer.param_groups[0]["lr"].fill_(1e-3 * number)

    put(0)
    captured.step()
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for number in range(1, 9):
        put(number)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
            eager.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_same(Pair.bits(captured_params, captured), Pair.bits(params, eager))
