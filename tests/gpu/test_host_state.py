"""Guards state in pinned memory that a real GPU updates where it lies: bits, waits, graphs, overlap, shards, memory.

Run by `make test-gpu`; tests/test_host_state.py, test_overlap.py and test_host_state_ranks.py have it without a GPU.
"""

import copy
import gc
import math

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import Parameter

import lucid.optim as optim
from bits import assert_same, draw, peek, results
from fsdp import Net, adamw, sharded, shards, train
from lucid.engine import pinned
from lucid.engine.shards import local

GPU = torch.device("cuda", 0)
SHAPES = [(1000, 257), (64, 32, 3, 3), (5000,), (), (0, 3), (4, 4096)]
KINDS = [
    (dtype, options)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for options in ({}, {"state_format": "8bit"}, {"state_format": "bf16", "amsgrad": True})
]
HOW = [{}, {"max_grad_norm": 0.5}, {"nonfinite": "skip"}]


def make(state_device, dtype=torch.float32, **options):
    params = [Parameter((draw(number, shape) * 0.02).to(dtype).to(GPU)) for number, shape in enumerate(SHAPES)]
    return params, optim.AdamW(params, 1e-2, state_device=state_device, **options)


def one_step(params, optimizer, step, bad=False):
    for number, param in enumerate(params):
        param.grad = draw(100 * step + number, param.shape).to(param.dtype).to(GPU)
        if bad and number == 1:
            param.grad.view(-1)[7] = math.inf
    optimizer.step()


def run(steps, state_device, dtype=torch.float32, **options):
    params, optimizer = make(state_device, dtype, **options)
    for step in range(steps):
        one_step(params, optimizer, step, bad=step == 3 and "nonfinite" in options)
    assert optimizer.state
    return optimizer, [{key: value.cpu() for key, value in row.items()} for row in results(optimizer)]


def all_pinned(optimizer):
    return all(
        local(value).is_pinned() or not local(value).numel()
        for entry in peek(optimizer).values()
        for key, value in entry.items()
        if key not in ("step", "stream")
    )


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize(("dtype", "options"), KINDS, ids=str)
def test_the_bits_of_state_on_the_device(dtype, options, how):
    ours, found = run(20, "cpu", dtype, **options, **how)
    theirs, wanted = run(20, None, dtype, **options, **how)
    assert_same(found, wanted)
    assert all_pinned(ours)
    assert ours.skipped_steps == theirs.skipped_steps == ("nonfinite" in how)
    assert ours.engine_for(ours.param_groups[0]["params"][0]) == "cuda"


def test_thousands_of_small_tensors():
    runs = []
    for device in ("cpu", None):
        params = [Parameter(draw(number, (64,)).to(GPU)) for number in range(10_000)]
        optimizer = optim.AdamW(params, state_device=device)
        for step in range(3):
            for number, param in enumerate(params):
                param.grad = draw(step + number, (64,)).to(GPU)
            optimizer.step()
        assert optimizer.state
        runs.append(torch.stack([param.detach() for param in params]))
    assert torch.equal(*runs)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_step_never_waits():
    params, optimizer = make("cpu", max_grad_norm=0.5, nonfinite="skip")
    optimizer.observe()
    for step in range(3):
        one_step(params, optimizer, step)
    gradients = [draw(number, param.shape).to(GPU) for number, param in enumerate(params)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(entry["step"] == 6 for entry in optimizer.state.values())


def test_who_reads_state_gets_what_kernels_have_written():
    """While the GPU is busy before the step."""
    params, optimizer = make("cpu")
    twins, twin = make(None)
    one_step(params, optimizer, 0)
    one_step(twins, twin, 0)
    torch.cuda._sleep(200_000_000)
    one_step(params, optimizer, 1)
    one_step(twins, twin, 1)
    for ours, theirs in zip(params, twins, strict=True):
        assert torch.equal(optimizer.state[ours]["exp_avg"], twin.state[theirs]["exp_avg"].cpu())


@pytest.mark.parametrize("options", [{}, {"state_format": "8bit", "max_grad_norm": 0.5}], ids=str)
def test_capture_and_replay(options):
    runs = []
    for device in ("cpu", None):
        params, optimizer = make(device, **options)
        for number, param in enumerate(params):
            param.grad = draw(number, param.shape).to(GPU)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for _ in range(5):
            graph.replay()
        assert all(entry["step"] == 8 for entry in optimizer.state.values())
        runs.append([{key: value.cpu() for key, value in row.items()} for row in results(optimizer)])
        optimizer.release_captured()
    assert_same(*runs)


@pytest.mark.parametrize("options", [{}, {"state_format": "8bit", "nonfinite": "skip"}], ids=str)
def test_in_backward(options):
    """On a stream of its own, while backward goes on, with weights large enough that updates take longer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *[layer for _ in range(4) for layer in (torch.nn.Linear(2048, 2048), torch.nn.Tanh())]
    ).to(GPU)
    twin = copy.deepcopy(model)
    optimizers = [
        optim.AdamW(model.parameters(), 1e-3, state_device="cpu", **options),
        optim.AdamW(twin.parameters(), 1e-3, **options),
    ]
    for optimizer in optimizers:
        optimizer.step_in_backward()
    x = torch.randn(64, 2048, device=GPU)
    for _ in range(20):
        for each in (model, twin):
            each(x).square().mean().backward()
    (lane,) = optimizers[0]._stepper.overlap.lanes.values()
    assert not lane._held
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gradients_in_backward_do_not_add_up():
    """The host runs ahead; what is allocated stays that of a few gradients."""
    model = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, bias=False) for _ in range(12))).to(GPU)
    optimizer = optim.AdamW(model.parameters(), 1e-3, state_device="cpu")
    optimizer.step_in_backward()
    x = torch.randn(16, 4096, device=GPU)
    model(x).square().mean().backward()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        model(x).square().mean().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_reserved() - before < 5 * (64 << 20)  # of 12 gradients


@pytest.fixture
def mesh():
    distributed.init_process_group("cpu:gloo,cuda:nccl", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cuda", (1,))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"state_format": "8bit"}], ids=str)
@pytest.mark.parametrize("in_backward", [False, True])
def test_shards(mesh, options, in_backward):
    runs = []
    for more in ({}, {"state_device": "cpu"}):
        net = sharded(Net().cuda(), mesh)
        optimizer = adamw(net, **options, **more)
        if in_backward and more:
            optimizer.step_in_backward(model=net)
        train(net, optimizer)
        assert optimizer.state
        runs.append([{key: value.cpu() for key, value in row.items()} for row in shards(optimizer)])
    assert all_pinned(optimizer)
    assert_same(*runs)


def test_shards_are_gathered_from_the_host(mesh):
    """By torch's tools for checkpoints, and by ours."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    from lucid.engine.shards import whole

    net = sharded(Net().cuda(), mesh)
    optimizer = adamw(net, state_device="cpu")
    train(net, optimizer, stop=2)
    saved = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    for name, param in net.named_parameters():
        if param in optimizer.state:
            assert torch.equal(saved["state"][name]["exp_avg"], whole(optimizer.state[param]["exp_avg"]).cpu())


def test_a_checkpoint_moves_between_them():
    params, optimizer = make("cpu", torch.bfloat16, state_format="8bit")
    twins, other = make(None, torch.bfloat16, state_format="8bit")
    for step in range(3):
        one_step(params, optimizer, step)
    other.load_state_dict(optimizer.state_dict())
    for param, twin in zip(params, twins, strict=True):
        twin.data.copy_(param)
    for step in (3, 4):
        one_step(params, optimizer, step)
        one_step(twins, other, step)
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param, twin)
    optimizer.load_state_dict(other.state_dict())
    copied = copy.deepcopy(optimizer)
    assert all_pinned(optimizer)
    one_step(copied.param_groups[0]["params"], copied, 5)
    assert all_pinned(copied)


def test_memory_goes_with_the_optimizer():
    before = pinned.arena.reserved
    params, optimizer = make("cpu")
    one_step(params, optimizer, 0)
    assert pinned.arena.reserved > before
    del optimizer
    gc.collect()
    assert pinned.arena.reserved == before
