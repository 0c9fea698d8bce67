"""Guards the CUDA engine on a real GPU, with compiled kernels: the CPU engine's bits, and a step that never waits.

Run by `make test-gpu`; elsewhere the same kernels are interpreted (tests/test_cuda_*.py).
"""

import copy
import math

import pytest
import torch
from torch.nn import Parameter

import lucid.optim as optim
from bits import World, assert_same, draw, results, same
from lucid.bench.shapes import gpt2_small, resnet50

GPU = torch.device("cuda", 0)
FORMATS = [
    (dtype, options)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for options in (
        {},
        {"state_format": "bf16"},
        {"state_format": "8bit"},
        {"amsgrad": True, "maximize": True},
        {"master_weights": False, "state_format": "8bit"},
    )
]


class Pair:
    """The same parameters on the CPU and on a GPU, stepped with the same gradients."""

    def __init__(self, shapes, dtype=torch.float32, lr=1e-2, device=GPU, **options):
        self.values = [(draw(number, shape) * 0.02).to(dtype) for number, shape in enumerate(shapes)]
        self.sides = []
        for side in (torch.device("cpu"), device):
            params = [Parameter(value.clone().to(side)) for value in self.values]
            rate = lr.to(side) if isinstance(lr, torch.Tensor) else lr
            self.sides.append((params, optim.AdamW(params, rate, **options)))
        self.done = 0

    @property
    def theirs(self):
        return self.sides[1]

    def gradients(self, scale=1e-3):
        self.done += 1
        return [
            (draw(1000 * self.done + number, value.shape) * scale).to(value.dtype)
            for number, value in enumerate(self.values)
        ]

    def step(self, gradients=None):
        gradients = self.gradients() if gradients is None else gradients
        for params, optimizer in self.sides:
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = None if gradient is None else gradient.to(param.device)
            optimizer.step()

    def compare(self, what=""):
        ours, theirs = (
            [{key: value.cpu() for key, value in row.items()} for row in self.bits(*side)] for side in self.sides
        )
        assert_same(ours, theirs, what)

    @staticmethod
    def bits(params, optimizer):
        """What training gives, on the CPU."""
        _ = optimizer.state  # step counts may be a guess until someone asks
        return [{key: value.cpu() for key, value in row.items()} for row in results(optimizer)]


SHAPES = [(128, 256), (100, 200), (7,), (), (1000,), (3, 5, 7), (4096, 33), (64, 3, 7, 7), (0, 4), (1, 4096)]


@pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=str)
def test_a_hundred_steps_have_the_cpu_engines_bits(dtype, options):
    pair = Pair(SHAPES, dtype, **options)
    assert pair.theirs[1].engine_for(pair.theirs[0][0]) == "cuda"
    for number in range(100):
        pair.step()
        if number in (0, 9, 99):
            pair.compare(number)


@pytest.mark.parametrize("shapes", [gpt2_small(), resnet50()], ids=["gpt2-small", "resnet50"])
@pytest.mark.parametrize("options", [{}, {"state_format": "8bit", "max_grad_norm": 0.5}], ids=str)
def test_real_shapes(shapes, options):
    pair = Pair(shapes, torch.bfloat16, **options)
    for _ in range(3):
        pair.step()
    pair.compare()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_of_another_dtype(dtype, gradient):
    pair = Pair(SHAPES, dtype)
    for params, _ in pair.sides:
        for param in params:
            param.grad_dtype = None
    for _ in range(3):
        pair.step([value.to(gradient) for value in pair.gradients()])
    pair.compare()


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "8bit"])
def test_layouts(state_format):
    """Channels-last, transposed and strided parameters, at odd addresses; what lies between stays as it is."""
    runs = []
    for side in ("cpu", GPU):
        base = draw(1, (300, 400)).to(side)
        around = base.clone()
        flat = draw(2, (100_001,)).to(side)
        views = [
            base[:, ::2],
            flat[1:].view(100, 1000),
            draw(3, (64, 32, 3, 3)).to(side).to(memory_format=torch.channels_last),
            draw(4, (256, 128)).to(side).t(),
        ]
        params = [Parameter(view) for view in views]
        optimizer = optim.AdamW(params, 1e-2, state_format=state_format)
        for step in range(5):
            for number, param in enumerate(params):
                gradient = draw(100 * step + number, param.shape).to(side)
                param.grad = (
                    gradient
                    if (step + number) % 2
                    else gradient.t().contiguous().t()
                    if gradient.dim() == 2
                    else gradient
                )
            optimizer.step()
        assert torch.equal(base[:, 1::2], around[:, 1::2])
        runs.append(Pair.bits(params, optimizer))
    assert_same(*runs)


def test_complex_parameters():
    runs = []
    for side in ("cpu", GPU):
        param = Parameter(draw(1, (50, 30), torch.complex64).to(side))
        optimizer = optim.AdamW([param], 1e-2, max_grad_norm=1.0)
        for step in range(5):
            param.grad = draw(step + 2, param.shape, torch.complex64).to(side)
            optimizer.step()
        runs.append(Pair.bits([param], optimizer))
    assert_same(*runs)


def test_more_than_2_to_the_31_elements():
    count = 2**31 + 4096 + 77
    param = Parameter(torch.empty(count, dtype=torch.bfloat16, device=GPU).fill_(0.5))
    param.grad = torch.empty_like(param).fill_(1e-3)
    tail, head = draw(1, (5000,)).bfloat16(), draw(2, (5000,)).bfloat16()
    with torch.no_grad():
        param.grad[-5000:], param.grad[:5000] = tail.to(GPU), head.to(GPU)
    optimizer = optim.AdamW([param], 1e-2, master_weights=False, max_grad_norm=math.inf)
    twins = [Parameter(torch.full((5000,), 0.5, dtype=torch.bfloat16)) for _ in range(2)]
    twins[0].grad, twins[1].grad = tail, head
    other = optim.AdamW(twins, 1e-2, master_weights=False)
    for _ in range(2):
        optimizer.step()
        other.step()
    state = optimizer.state[param]
    for twin, part in zip(twins, (slice(-5000, None), slice(None, 5000)), strict=True):
        assert same(param.detach()[part].cpu(), twin.detach())
        for key in ("exp_avg", "exp_avg_sq"):
            assert same(state[key][part].cpu(), other.state[twin][key])
    rest = (count - 10_000) * float(torch.tensor(1e-3, dtype=torch.bfloat16)) ** 2
    wanted = math.sqrt(rest + float(tail.double().square().sum() + head.double().square().sum()))
    assert optimizer.grad_norm.item() == pytest.approx(wanted, rel=1e-9)


# What is decided on the device


DECIDED = [
    {"max_grad_norm": 0.05},
    {"max_grad_norm": 1e6},
    {"nonfinite": "skip"},
    {"max_grad_norm": 0.05, "nonfinite": "skip", "state_format": "8bit"},
]


@pytest.mark.parametrize("options", DECIDED, ids=str)
@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2), torch.tensor(1e-2, dtype=torch.float64)], ids=str)
def test_decisions_are_those_of_the_cpu_engine(options, rate):
    pair = Pair(SHAPES, lr=rate, **options)
    for number in range(30):
        gradients = pair.gradients()
        if number % 7 == 3 and "nonfinite" in options:
            gradients[number % 3].view(-1)[0] = [math.nan, math.inf, 1e30][number % 3]
        if number % 5 == 4:
            gradients[2] = None
        pair.step(gradients)
        if number % 10 == 9:
            pair.compare(number)
            (_, ours), (_, theirs) = pair.sides
            assert ours.skipped_steps == theirs.skipped_steps
            assert (
                torch.equal(ours.grad_norm, theirs.grad_norm.cpu())
                or ours.grad_norm.isnan() == theirs.grad_norm.isnan().cpu()
            )


def test_grad_scaler():
    runs = []
    for side in ("cpu", GPU):
        params = [Parameter(draw(number, (50, 70)).to(side)) for number in range(3)]
        optimizer = optim.AdamW(params, 1e-2, max_grad_norm=1.0)
        scaler = torch.amp.GradScaler(torch.device(side).type, init_scale=2.0**10, growth_interval=5)
        for step in range(25):
            loss = sum(
                (param * draw(10 * step + number, param.shape).to(side)).sum() for number, param in enumerate(params)
            )
            optimizer.zero_grad()
            scaler.scale(loss * (math.inf if step in (8, 17) else 1.0)).backward()
            if side == "cpu":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        counts = [optimizer.state[param]["step"].item() for param in params]
        runs.append((counts, scaler.get_scale(), [param.detach().cpu() for param in params]))
    (counts, scale, ours), (other_counts, other_scale, theirs) = runs
    assert counts == other_counts == [23.0] * 3
    assert scale == other_scale
    for one, other in zip(ours, theirs, strict=True):  # unscaled before the step and in it, by a power of two
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_format": "8bit"},
        {"max_grad_norm": 0.1},
        {"nonfinite": "skip"},
        {"max_grad_norm": 0.1, "nonfinite": "skip"},
    ],
    ids=str,
)
@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_step_never_waits(options, observe):
    pair = Pair(SHAPES, lr=torch.tensor(1e-2), **options)
    params, optimizer = pair.theirs
    optimizer.observe(observe)
    for _ in range(12):
        pair.step()
    fresh = [draw(5, param.shape).to(GPU) for param in params]  # at other addresses
    scale, found_inf = torch.tensor(2.0, device=GPU), torch.zeros((), device=GPU)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(4):
            for param, gradient in zip(params, fresh, strict=True):
                param.grad = gradient if number % 2 else gradient.clone()
            optimizer.grad_scale, optimizer.found_inf = scale, found_inf
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.state[params[0]]["step"] == 16


# Graphs, streams, devices


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_format": "8bit"},
        {"max_grad_norm": 0.05},
        {"nonfinite": "skip", "state_format": "bf16", "amsgrad": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tensor_rate", [False, True])
def test_capture_and_replay(options, tensor_rate):
    shapes = SHAPES[:5]
    pairs = [Pair(shapes, lr=torch.tensor(1e-2) if tensor_rate else 1e-2, **options).theirs for _ in range(2)]
    bad = (7, 11) if "nonfinite" in options else ()

    def put(number):
        for params, _ in pairs:
            for index, param in enumerate(params):
                gradient = draw(100 * number + index, param.shape) * 1e-3
                if number in bad and index == 2:
                    gradient[0] = math.nan
                if param.grad is None:
                    param.grad = torch.empty_like(param)
                param.grad.copy_(gradient)

    (captured_params, captured), (params, eager) = pairs
    put(0)
    captured.step()
    eager.step()
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:
        with torch.cuda.graph(graph):
            captured.step()
    for number in range(1, 16):
        put(number)
        if tensor_rate and number == 9:
            for _, optimizer in pairs:
                optimizer.param_groups[0]["lr"].fill_(3e-3)
        if number in (5, 10):
            captured.step()
        else:
            graphs[number % 2].replay()
        eager.step()
        if number % 4 == 0:
            assert captured.state[captured_params[0]]["step"] == eager.state[params[0]]["step"]
    assert captured.skipped_steps == eager.skipped_steps == len(bad)
    assert_same(Pair.bits(*pairs[0]), Pair.bits(*pairs[1]))


def test_capture_of_a_whole_training_step():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 1)).to(GPU)
    twin = copy.deepcopy(model)
    x = torch.randn(32, 64, device=GPU)
    optimizers = [optim.AdamW(each.parameters(), 1e-2, max_grad_norm=1.0) for each in (model, twin)]

    def train(each, optimizer):
        optimizer.zero_grad(set_to_none=True)
        each(x).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(model, optimizers[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(model, optimizers[0])
    for _ in range(10):
        graph.replay()
    for _ in range(13):
        train(twin, optimizers[1])
    assert optimizers[0].state[model[0].weight]["step"] == 13
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_a_first_step_cannot_be_captured():
    params, optimizer = Pair(SHAPES[:2]).theirs
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.init_state()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="take a step"), torch.cuda.graph(graph):
        optimizer.step()


def test_streams():
    pair = Pair(SHAPES, max_grad_norm=0.1, nonfinite="skip")
    streams = [torch.cuda.Stream() for _ in range(3)]
    for number in range(9):
        with torch.cuda.stream(streams[number % 3]):
            streams[number % 3].wait_stream(streams[(number - 1) % 3])
            pair.step()
    torch.cuda.synchronize()
    pair.compare()


def test_one_optimizer_on_two_kinds_of_device():
    """The CPU's rows and the GPU's are one unit: one norm, one decision."""
    runs = []
    for second in ("cpu", GPU):
        params = [Parameter(draw(1, (40, 50))), Parameter(draw(2, (30,)).to(second))]
        optimizer = optim.AdamW(params, 1e-2, max_grad_norm=0.5, nonfinite="skip")
        for step in range(8):
            for number, param in enumerate(params):
                param.grad = draw(10 * step + number, param.shape).to(param.device)
            if step == 4:
                params[0].grad[0, 0] = math.nan
            optimizer.step()
        assert optimizer.skipped_steps == 1
        runs.append(Pair.bits(params, optimizer))
    assert_same(*runs)


@pytest.mark.parametrize("index", range(torch.cuda.device_count()))
def test_every_device(index):
    pair = Pair(SHAPES, device=torch.device("cuda", index), max_grad_norm=0.1)
    for _ in range(5):
        pair.step()
    pair.compare()


def test_a_model_that_moves():
    pair = Pair(SHAPES[:3])
    pair.step()
    params, optimizer = pair.theirs
    with torch.no_grad():
        for param in params:
            param.data = param.data.cpu()
    optimizer.load_state_dict(optimizer.state_dict())
    pair.step()
    assert params[0].device.type == "cpu"
    pair.compare()


# Around a step


@pytest.mark.parametrize("options", [{}, {"state_format": "8bit", "nonfinite": "skip"}], ids=str)
def test_step_in_backward(options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).to(GPU)
    twin = copy.deepcopy(model)
    x = torch.randn(32, 96, device=GPU)
    first, second = (optim.AdamW(each.parameters(), 1e-2, **options) for each in (model, twin))
    first.step_in_backward()
    for _ in range(5):
        model(x).square().mean().backward()
        assert all(param.grad is None for param in model.parameters())
        twin(x).square().mean().backward()
        second.step()
        second.zero_grad()
    assert_same(Pair.bits(list(model.parameters()), first), Pair.bits(list(twin.parameters()), second))


def test_statistics_agree_with_the_cpu_engines():
    pair = Pair(SHAPES)
    for _, optimizer in pair.sides:
        optimizer.observe()
    for _ in range(3):
        pair.step()
    ours, theirs = (optimizer.statistics() for _, optimizer in pair.sides)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert theirs[name] == pytest.approx(value, rel=1e-5), name


def test_a_step_takes_no_memory_of_its_own():
    param = Parameter(torch.empty(4096, 4096, device=GPU).normal_())
    param.grad = torch.empty_like(param).normal_()
    optimizer = optim.AdamW([param], 1e-2, max_grad_norm=1.0)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(10):
        optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before < 100_000


def test_resume_between_engines():
    """A checkpoint of one engine goes on in the other, to the bit."""
    reference = World(shapes=((64, 128), (7,)), state_format="8bit").run(8)
    first = World(shapes=((64, 128), (7,)), state_format="8bit").run(4)
    second = World(shapes=((64, 128), (7,)), state_format="8bit")
    second.done = 4
    with torch.no_grad():
        for param, value in zip(second.params, first.params, strict=True):
            param.data = value.detach().to(GPU)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    for _ in range(4):
        for index, param in enumerate(second.params):
            param.grad = second.draw(1000 + 100 * second.done + index, param.shape).to(GPU)
        second.optimizer.step()
        second.done += 1
    assert second.optimizer.engine_for(second.params[0]) == "cuda"
    assert_same(
        results(reference.optimizer), [{k: v.cpu() for k, v in row.items()} for row in results(second.optimizer)]
    )
