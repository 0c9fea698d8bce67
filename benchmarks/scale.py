"""What a rank holds, exchanges and waits for under FSDP2: measured on 1 to 4 processes, and on paper far beyond.

    python -m benchmarks.scale                                                       # two to five minutes
    python -m benchmarks.scale --markdown docs/scale.md --plot docs/scale.png
    python -m benchmarks.scale --report --markdown docs/scale.md --plot docs/scale.png  # measures nothing anew

Measured are processes of one thread each, over gloo, on this machine: as many as it has cores run side by side, more
take turns. All on paper follows from the constants below.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import lucid.optim
from lucid.bench.contenders import LR, WEIGHT_DECAY
from lucid.bench.machine import Neighbours
from lucid.bench.paired import Quartiles, order, ratios
from lucid.bench.shapes import CASES, Case
from lucid.engine.exact_sum import TOTAL_WORDS
from lucid.engine.formats import StateFormatName

from . import machine, report
from .arguments import check_page, count, write_page
from .report import Table

BEGIN = "<!-- measured: written by `python -m benchmarks.scale --markdown`; notes go outside -->"

# Measured

WORLDS = (1, 2, 3, 4)
LIMIT = 240  # seconds that processes may take
FUSED, CLIPPED, FUSED_CLIPPED = "torch fused", "lucid, clipped", "torch fused, clipped"
FORMATS: dict[str, StateFormatName] = {"lucid": "fp32", "lucid bf16": "bf16", "lucid 8bit": "8bit"}
LARGE, SMALL = CASES["gpt2-small"], CASES["1000x64"]
CONTENDERS = {
    LARGE.name: (*FORMATS, CLIPPED, FUSED, FUSED_CLIPPED),
    SMALL.name: ("lucid", CLIPPED, FUSED, FUSED_CLIPPED),
}
# What a clipped step exchanges for each mesh dimension, and what it exchanged before sums were exact.
REDUCED, GATHERED = f"all-reduce of {8 * TOTAL_WORDS} bytes", "all-gather of 16 bytes a rank"
WARM_UP = {LARGE.name: 1, SMALL.name: 12}  # the second: until plans are sealed
ROUNDS = {LARGE.name: 1, SMALL.name: 2}  # for each that is asked for


@dataclass(frozen=True, slots=True)
class Measured:
    """One case on one number of processes."""

    world: int
    held: dict[str, list[list[int]]]  # by contender and rank: bytes of weights, gradients, state
    samples: dict[str, list[float]]  # seconds a step of the slowest rank, the n-th of each of the same round
    cpu: dict[str, list[float]]  # seconds of work in them, the mean of the ranks


@dataclass(slots=True)
class Results:
    """What was measured, by case, and where."""

    machine: dict[str, str]
    cases: dict[str, list[Measured]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        saved = json.loads(path.read_text())
        cases = {name: [Measured(**each) for each in found] for name, found in saved["cases"].items()}
        return cls(saved["machine"], cases)


class Tensors(nn.Module):
    """Parameters of some shapes, to be sharded before they take memory."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        for number, shape in enumerate(case.shapes):
            self.register_parameter(f"p{number}", nn.Parameter(torch.empty(shape, device="meta")))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharded(case: Case) -> list[nn.Parameter]:
    """Parameters under FSDP2, with gradients as its backward leaves them."""
    model = Tensors(case)
    fully_shard(model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    model.to_empty(device="cpu")
    params = list(model.parameters())
    for param in params:
        assert isinstance(param, DTensor)
        _local(param.detach()).normal_(std=0.02)
        gradient = torch.empty_like(_local(param.detach())).normal_(std=1e-3)
        mesh, placements = param.device_mesh, param.placements
        param.grad = DTensor.from_local(gradient, mesh, placements, shape=param.shape, stride=param.stride())
    return params


def _step_of(name: str, params: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
    if name in (FUSED, FUSED_CLIPPED):
        peer = torch.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY, fused=True)

        def clip_and_step() -> None:
            nn.utils.clip_grad_norm_(params, 1e9)  # so large that the gradients stay as they are
            peer.step()

        return peer, peer.step if name == FUSED else clip_and_step
    bound = 1.0 if name == CLIPPED else None
    state_format: StateFormatName = FORMATS.get(name, "fp32")
    own = lucid.optim.AdamW(params, LR, weight_decay=WEIGHT_DECAY, state_format=state_format, max_grad_norm=bound)
    return own, own.step


def _exchanges() -> dict[str, Callable[[], object]]:
    words = torch.zeros(TOTAL_WORDS, dtype=torch.int64)
    own = torch.zeros(2, dtype=torch.float64)
    every = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    return {
        REDUCED: lambda: distributed.all_reduce(words),
        GATHERED: lambda: distributed.all_gather(every, own),
    }


def _measure(case: Case, rounds: int) -> Measured:
    """Step on this rank and all others; the parameters are shared, each contender has a state of its own."""
    world = distributed.get_world_size()
    params = _sharded(case)
    made = {name: _step_of(name, params) for name in CONTENDERS[case.name]}
    sizes = [
        sum(_local(tensor).nbytes for tensor in params),
        sum(_local(p.grad).nbytes for p in params if p.grad is not None),
    ]
    held: dict[str, list[list[int]]] = {}
    for name, (optimizer, step) in made.items():
        step()
        state = sum(_local(value).nbytes for entry in optimizer.state.values() for value in entry.values())
        held[name] = [[] for _ in range(world)]
        distributed.all_gather_object(held[name], [*sizes, state])
        for _ in range(WARM_UP[case.name]):
            step()
    steps_of = {name: step for name, (_, step) in made.items()} | (_exchanges() if case is SMALL else {})
    samples: dict[str, list[float]] = {name: [] for name in steps_of}
    cpu: dict[str, list[float]] = {name: [] for name in steps_of}
    for number in range(rounds * ROUNDS[case.name]):
        for name in order(list(steps_of), number):
            step = steps_of[name]
            steps = 10 if name in (REDUCED, GATHERED) or (case is SMALL and name in ("lucid", CLIPPED)) else 1
            if case is SMALL:
                step()  # brings to the caches what the contender before has driven out
            distributed.barrier()
            started, worked = time.perf_counter(), time.thread_time()
            for _ in range(steps):
                step()
            own = torch.tensor([time.perf_counter() - started, time.thread_time() - worked], dtype=torch.float64)
            every = [torch.empty_like(own) for _ in range(world)]
            distributed.all_gather(every, own)
            seconds, work = (torch.stack(every) / steps).unbind(1)
            samples[name].append(seconds.max().item())
            cpu[name].append(work.mean().item())
    return Measured(world, held, samples, cpu)


def _rank(rank: int, world: int, store: str, rounds: int, pipe: Connection) -> None:
    """Measure all cases as one of the processes."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    gc.disable()
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT)
    )
    found = {case.name: _measure(case, rounds) for case in (LARGE, SMALL)}
    distributed.destroy_process_group()
    pipe.send(found)


def measure(rounds: int) -> Results:
    """Run all numbers of processes one after the other."""
    results = Results(machine.description())
    neighbours = Neighbours()
    context = multiprocessing.get_context("spawn")
    for world in tqdm(WORLDS, "processes", disable=None):
        with tempfile.TemporaryDirectory() as folder:
            pipes, processes = [], []
            for rank in range(world):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_rank, args=(rank, world, f"{folder}/store", rounds, theirs))
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            try:
                found = [pipe.recv() if pipe.poll(LIMIT + 20) else None for pipe in pipes]
            except EOFError:
                found = [None]
            finally:
                for process in processes:
                    process.join(10)
                    if process.exitcode is None:
                        process.kill()
                        process.join()
        first = found[0]
        if first is None or None in found:
            raise RuntimeError(f"one of {world} processes ended or hung; it has said above what happened")
        for name, each in first.items():
            results.cases.setdefault(name, []).append(each)
    results.machine["neighbours"] = f"took {neighbours.share():.1%} of all cores' time meanwhile"
    results.machine["threads"] = "1 a process"
    return results


# On paper

GPU = "H200"
GPU_MEMORY = 141e9
GPU_BANDWIDTH = 4.8e12
BANDWIDTH_REACHED = 0.8
GPU_FLOPS = 989e12
FLOPS_REACHED = 0.4
NODE = 8
NVLINK = 450e9
NETWORK = 50e9
LINK_REACHED = 0.8
HOP = 5e-6
TOKENS = 8192
FLOPS_A_PARAMETER_AND_TOKEN = 6
MEMORY_FOR_THESE = 0.7
GPUS = 1000
LAYERS = {1e9: 24, 1e10: 40, 1e11: 80, 1e12: 128}

ASSUMPTIONS = {
    "GPU_MEMORY": (f"{GPU_MEMORY / 1e9:.0f} GB", f"of an {GPU} (data sheet)"),
    "GPU_BANDWIDTH": (f"{GPU_BANDWIDTH / 1e12:.1f} TB/s", "of its memory (data sheet)"),
    "BANDWIDTH_REACHED": (f"{BANDWIDTH_REACHED}", "of that bandwidth, by an optimizer step"),
    "GPU_FLOPS": (f"{GPU_FLOPS / 1e12:.0f} T/s", "dense bfloat16 (data sheet)"),
    "FLOPS_REACHED": (f"{FLOPS_REACHED}", "of that rate, by forward and backward (Llama 3 reports 0.38 to 0.43)"),
    "FLOPS_A_PARAMETER_AND_TOKEN": (
        f"{FLOPS_A_PARAMETER_AND_TOKEN}",
        "a dense model, without attention and recomputation",
    ),
    "TOKENS": (f"{TOKENS:,}", "per rank and step"),
    "NODE": (f"{NODE}", "GPUs connected by NVLink"),
    "NVLINK": (f"{NVLINK / 1e9:.0f} GB/s", "per GPU, each way (data sheet)"),
    "NETWORK": (f"{NETWORK / 1e9:.0f} GB/s", "per GPU, each way: 400 Gbit/s"),
    "LINK_REACHED": (f"{LINK_REACHED}", "of either bandwidth, by large collectives"),
    "HOP": (f"{1e6 * HOP:.0f} µs", "a small message to the next rank; an all-reduce of few bytes uses a tree"),
    "LAYERS": (
        ", ".join(f"{n}" for n in LAYERS.values()),
        "layers of equal size, for 1, 10, 100 and 1,000 G parameters",
    ),
    "MEMORY_FOR_THESE": (
        f"{MEMORY_FOR_THESE}",
        "of the memory, for weights, gradients and state; the rest is for activations and buffers",
    ),
}


@dataclass(frozen=True, slots=True)
class Format:
    """Bytes a parameter."""

    name: str
    weight: float
    gradient: float
    state: float
    gathered: float = 2  # what a layer works with: bfloat16, by MixedPrecisionPolicy where weights are float32
    torch: bool = False  # clips by clip_grad_norm_: reads, then reads and writes all gradients

    @property
    def kept(self) -> float:
        return self.weight + self.gradient + self.state

    @property
    def moved(self) -> float:
        """What a clipped step reads and writes."""
        return 2 * (self.weight + self.state) + self.gradient + (3 if self.torch else 1) * self.gradient


CODES = 2 * (1 + 4 / 128)  # two moments, a float32 scale for 128 codes
PAPER = (
    Format("torch fp32, clip_grad_norm_", 4, 4, 8, torch=True),
    Format("lucid", 4, 4, 8),
    Format("lucid bf16", 4, 4, 4),
    Format("lucid 8bit", 4, 4, CODES),
    Format("lucid 8bit, bf16 weights + residual", 2, 2, 2 + CODES),
)
DDP, ZERO, KEPT, FULL, HYBRID = "DDP", "ZeRO-1", "FSDP2, kept gathered", "FSDP2", f"FSDP2 in nodes of {NODE} (HSDP)"
SHARDINGS = (DDP, ZERO, KEPT, FULL, HYBRID)


def held(kept: Format, sharding: str, parameters: float, ranks: int) -> float:
    """Return the bytes of weights, gradients and state on a rank, and of the layers that are gathered there."""
    layer = parameters / LAYERS[parameters]
    shards = {ZERO: ranks, KEPT: ranks, FULL: ranks, HYBRID: min(NODE, ranks)}.get(sharding, 1)
    if sharding in (DDP, ZERO):
        return parameters * (kept.weight + kept.gradient + kept.state / shards)
    gathered = parameters if sharding == KEPT else 2 * layer  # one is fetched while the other works
    return parameters * kept.kept / shards + kept.gathered * (gathered + layer)  # and a layer's gradient


def sent(kept: Format, sharding: str, parameters: float, ranks: int) -> tuple[float, float]:
    """Return the bytes that a rank sends in a step: within its node, and to others."""

    def ring(size: float, over: int) -> float:
        return parameters * size * (over - 1) / over

    gathers = 1 if sharding == KEPT else 2
    if sharding == DDP:
        total = 2 * ring(kept.gradient, ranks)
    elif sharding == ZERO:
        total = 2 * ring(kept.gradient, ranks) + ring(kept.weight, ranks)
    elif sharding == HYBRID and ranks > NODE:
        inside = gathers * ring(kept.gathered, NODE) + ring(kept.gradient, NODE)
        return inside, 2 * ring(kept.gradient, ranks // NODE) / NODE
    else:
        total = gathers * ring(kept.gathered, ranks) + ring(kept.gradient, ranks)
    return (total, 0.0) if ranks <= NODE else (0.0, total)


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of a training step's parts on a rank."""

    compute: float
    exchange: float  # at the same time as compute
    update: float
    norm: float  # its exchange

    @property
    def share(self) -> float:
        """The optimizer's part of the whole."""
        own = self.update + self.norm
        return own / (max(self.compute, self.exchange) + own)


def step(kept: Format, sharding: str, parameters: float, ranks: int) -> Step:
    """Return how long the parts of a training step take."""
    inside, outside = sent(kept, sharding, parameters, ranks)
    shards = {DDP: 1, HYBRID: min(NODE, ranks)}.get(sharding, ranks)
    # One all-reduce for each dimension of the mesh; torch adds up within nodes only.
    dimensions = (shards, math.ceil(ranks / NODE)) if sharding == HYBRID and not kept.torch else (shards,)
    hops = sum(2 * math.ceil(math.log2(over)) for over in dimensions)
    return Step(
        FLOPS_A_PARAMETER_AND_TOKEN * parameters * TOKENS / (GPU_FLOPS * FLOPS_REACHED),
        (inside / NVLINK + outside / NETWORK) / LINK_REACHED,
        parameters * kept.moved / shards / (GPU_BANDWIDTH * BANDWIDTH_REACHED),
        hops * HOP,
    )


def fewest_gpus(kept: Format, parameters: float) -> int | None:
    """Return the least whole number of nodes' GPUs on which FSDP2 holds a model; None where a layer is too large."""
    for ranks in range(NODE, 100_000, NODE):
        if held(kept, FULL, parameters, ranks) <= GPU_MEMORY * MEMORY_FOR_THESE:
            return ranks
    return None


# The report


def _milliseconds(found: Measured, name: str) -> float:
    return 1e3 * Quartiles.of(found.samples[name]).median


def _times(over: str, under: str, found: Measured) -> str:
    spread = ratios(found.samples[over], found.samples[under])
    return f"{spread.median:.3g} ({spread.low:.3g}–{spread.high:.3g})"


def measured_tables(results: Results) -> Iterator[Table]:
    """Yield what was measured."""
    large, small = (results.cases[case.name] for case in (LARGE, SMALL))
    tensors = len(SMALL.shapes)
    ranks = [f"{found.world} rank{'s' * (found.world > 1)}" for found in large]
    rows = [
        [
            name,
            *(f"{max(map(sum, found.held[name])) / 1e6:,.1f}" for found in large),
            f"{_bytes_a_parameter(large, name):.3f}",
        ]
        for name in (FUSED, *FORMATS)
    ]
    shapes = f"{LARGE.name}, {len(LARGE.shapes)} tensors, {LARGE.elements / 1e6:.1f} M parameters, float32"
    note = f"{shapes}: MB of weights, gradients and state on the largest rank. The last column is over all ranks."
    yield Table("Measured: bytes a rank", note, ["MB", *ranks, "bytes per parameter"], rows)

    rows = []
    for name in (FUSED, *FORMATS, FUSED_CLIPPED, CLIPPED):
        peer = FUSED_CLIPPED if name in (CLIPPED, FUSED_CLIPPED) else FUSED
        row = [name, *(f"{_milliseconds(found, name):.1f}" for found in large)]
        rows.append([*row, *(_times(peer, name, found) for found in large)])
    note = (
        "The same model: median time of the slowest rank. ×: torch fused's time divided by this one's in the same "
        "round, median (quartiles). clipped: by the global gradient norm; torch fused uses clip_grad_norm_."
    )
    yield Table("Measured: a step", note, ["", *(f"{r}, ms" for r in ranks), *(f"×, {r}" for r in ranks)], rows)

    rows = []
    for found in small:
        own, work = _milliseconds(found, "lucid"), 1e3 * Quartiles.of(found.cpu["lucid"]).median
        row = [f"{found.world}", *(f"{x:.3g}" for x in (own, 1e3 * own / tensors, 1e3 * work / tensors))]
        row += [f"{_milliseconds(found, FUSED):.3g}", _times(FUSED, "lucid", found)]
        row += [f"{_milliseconds(found, name):.3g}" for name in (CLIPPED, FUSED_CLIPPED)]
        rows.append([*row, _times(FUSED_CLIPPED, CLIPPED, found)])
    note = (
        f"{tensors:,} sharded tensors of {SMALL.shapes[0][0]} elements: median time of the slowest rank. × as above. "
        "CPU: CPU time per process, without waiting for a core. Target: × at least 10, at most 1 µs per tensor."
    )
    header = ["ranks", "lucid ms", "µs per tensor", "CPU µs per tensor", "torch fused ms", "×"]
    header += ["lucid, clipped ms", "torch, clipped ms", "×"]
    yield Table("Measured: many small tensors", note, header, rows)

    rows = []
    for found in small:
        if REDUCED in found.samples:
            row = [f"{found.world}", *(f"{1e3 * _milliseconds(found, name):.0f}" for name in (REDUCED, GATHERED))]
            rows.append([*row, f"{8 * TOTAL_WORDS}", f"{16 * found.world}"])
    note = (
        "What a clipped step exchanges for each mesh dimension, now and before the sum was exact, over gloo: µs of the "
        "slowest rank. With so few processes the time is that of waking them."
    )
    header = ["ranks", f"{REDUCED}, µs", f"{GATHERED} (before), µs", "bytes a rank receives", "before"]
    yield Table("Measured: the exchange of the norm", note, header, rows)


def _bytes_a_parameter(found: Sequence[Measured], name: str) -> float:
    return statistics.fmean(sum(map(sum, each.held[name])) for each in found) / LARGE.elements


def paper_tables() -> Iterator[Table]:
    """Yield what follows from the constants."""
    rows = [[f"`{name}`", value, what] for name, (value, what) in ASSUMPTIONS.items()]
    yield Table("On paper: the assumptions", "Constants of `benchmarks/scale.py`.", ["", "value", "what it is"], rows)

    most = max(LAYERS)
    rows = [[kept.name, *(_fitting(held(kept, way, most, GPUS)) for way in SHARDINGS)] for kept in PAPER]
    note = (
        f"1 T parameters on {GPUS:,} GPUs, GB on each: weights, gradients, state and, under FSDP2, "
        f"{3 * PAPER[0].gathered * most / LAYERS[most] / 1e9:.0f} GB of gathered layers. "
        f"**Bold**: fits into {MEMORY_FOR_THESE:.0%} of {GPU_MEMORY / 1e9:.0f} GB."
    )
    yield Table("On paper: bytes a rank", note, ["GB", *SHARDINGS], rows)

    rows = []
    for kept in PAPER:
        fewest = [fewest_gpus(kept, size) for size in LAYERS]
        rows.append([kept.name, *("–" if found is None else f"{found:,}" for found in fewest)])
    note = f"The smallest number of GPUs, in nodes of {NODE}, that holds the same under FSDP2."
    yield Table("On paper: GPUs that it takes", note, ["", *map(_size, LAYERS)], rows)

    torch_fp32, small = PAPER[0], PAPER[-1]
    rows = []
    for size, ranks in ((1e9, NODE), (1e9, GPUS), (1e11, GPUS), (1e12, GPUS)):
        for way in (DDP, FULL, HYBRID) if (size, ranks) == (1e9, GPUS) else (FULL,) if size > 1e9 else (DDP, FULL):
            for kept in (torch_fp32, small):
                found = step(kept, way, size, ranks)
                bytes_sent = sum(sent(kept, way, size, ranks))
                row = [f"{_size(size)} on {ranks:,}, {way}", kept.name, _gigabytes(bytes_sent)]
                row += [_seconds(x) for x in (found.exchange, found.compute, found.update, found.norm)]
                rows.append([*row, _share(found.share)])
    note = (
        "GB sent: by each rank. exchange: the time to send them. compute: forward and backward. step: the clipped "
        "optimizer step. norm: the exchange of the gradient norm. share: step and norm as a part of the whole, if the "
        "exchange overlaps with forward and backward."
    )
    header = ["", "format", "GB sent", "exchange", "compute", "step", "norm", "share"]
    yield Table("On paper: what is exchanged, and how long a step takes", note, header, rows)

    rows = [
        [
            kept.name,
            *(_share(_share_with(kept, ranks, tokens)) for ranks in (1, NODE, GPUS) for tokens in (512, TOKENS)),
        ]
        for kept in PAPER
    ]
    note = (
        "The clipped optimizer step as a part of compute and step, without communication, by the number of ranks that "
        "share the parameters and the tokens per rank. The number of parameters cancels out."
    )
    header = ["", *(f"{_ranks(ranks)}, {n:,} tokens" for ranks in (1, NODE, GPUS) for n in (512, TOKENS))]
    yield Table("On paper: where the optimizer step is a share of the whole", note, header, rows)


def _ranks(ranks: int) -> str:
    return DDP if ranks == 1 else f"FSDP2 on {ranks:,}"


def _fitting(size: float) -> str:
    return f"**{_gigabytes(size)}**" if size <= GPU_MEMORY * MEMORY_FOR_THESE else _gigabytes(size)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.0f}" if size >= 1e11 else f"{size / 1e9:.3g}"


def _size(parameters: float) -> str:
    return f"{parameters / 1e12:.0f} T" if parameters >= 1e12 else f"{parameters / 1e9:.0f} G"


def _seconds(value: float) -> str:
    if value == 0:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 1e-3 else f"{1e6 * value:.0f} ppm"


def _tables(results: Results) -> Iterator[Table]:
    yield from measured_tables(results)
    yield from paper_tables()


def _about(results: Results) -> dict[str, str]:
    """What is told of the machine."""
    return {name: results.machine[name] for name in ("CPU", "versions", "date", "threads", "neighbours")}


COLOURS = dict(zip((FUSED, *FORMATS, PAPER[-1].name), ("C0", "C1", "C4", "C2", "C3"), strict=True))
COLOURS[PAPER[0].name] = COLOURS[FUSED]


def draw(results: Results, path: Path) -> None:
    """Draw what was measured in the upper row, what is on paper in the lower one."""
    figure = Figure(figsize=(11, 8), dpi=150, layout="constrained")
    (bytes_here, time_here), (bytes_far, share_far) = figure.subplots(2, 2)
    _bytes_measured(bytes_here, results)
    _time_measured(time_here, results)
    _bytes_on_paper(bytes_far)
    _share_on_paper(share_far)
    for axes in (bytes_here, time_here, bytes_far, share_far):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path)


def _bytes_measured(axes: Axes, results: Results) -> None:
    large = results.cases[LARGE.name]
    for name, kept in zip(FORMATS, PAPER[1:], strict=False):
        paper = [LARGE.elements * kept.kept / world / 1e6 for world in WORLDS]
        colour = COLOURS[FUSED if name == "lucid" else name]
        axes.plot(WORLDS, paper, color=colour, linewidth=1)
        most = [max(map(sum, found.held[name])) / 1e6 for found in large]
        label = f"{FUSED}, lucid" if name == "lucid" else name
        axes.plot([found.world for found in large], most, "o", color=colour, label=label)
    axes.set(xlabel="ranks", ylabel="MB", xticks=WORLDS, ylim=(0, None))
    title = f"Measured: weights, gradients and state of a rank ({LARGE.name}, float32)\nlines: on paper"
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)


def _time_measured(axes: Axes, results: Results) -> None:
    large = results.cases[LARGE.name]
    for number, name in enumerate((FUSED, *FORMATS)):
        spreads = [Quartiles.of(1e3 * sample for sample in found.samples[name]) for found in large]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        places = [found.world + 0.06 * (number - 1.5) for found in large]
        medians = [s.median for s in spreads]
        axes.errorbar(places, medians, yerr=errors, fmt="o-", label=name, color=COLOURS[name], ms=4, lw=1, capsize=3)
    axes.set(xlabel="ranks, one thread each", ylabel="ms", xticks=WORLDS, ylim=(0, None))
    rounds, cores = len(large[0].samples[FUSED]), results.machine["CPU"].split(", ")[1]
    how = f"{cores}, medians and quartiles of {rounds} rounds"
    axes.set_title(f"Measured: the optimizer's step, slowest rank ({LARGE.name})\n{how}", fontsize=10)
    axes.legend(frameon=False)


def _bytes_on_paper(axes: Axes) -> None:
    ranks = [2**power for power in range(3, 13)]
    for size, style in ((1e12, "-"), (1e11, "--")):
        for kept in (PAPER[0], *PAPER[2:]):
            found = [held(kept, FULL, size, each) / 1e9 for each in ranks]
            label = kept.name.replace(", clip_grad_norm_", ", lucid") if style == "-" else None
            axes.plot(ranks, found, style, color=COLOURS[kept.name], label=label)
        layers = 3 * PAPER[0].gathered * size / LAYERS[size] / 1e9
        axes.axhline(layers, color="0.6", linestyle=":", linewidth=1)
        text = f"{_size(size)}: gathered layers alone"
        axes.text(ranks[-1], 0.95 * layers, text, ha="right", va="top", fontsize=8, color="0.4")
    axes.axhline(GPU_MEMORY / 1e9, color="0.2", linewidth=1)
    axes.text(ranks[-1], 1.08 * GPU_MEMORY / 1e9, f"an {GPU}", ha="right", fontsize=8, color="0.2")
    axes.set(xlabel="GPUs", ylabel="GB a rank", xscale="log", yscale="log", ylim=(5, None))
    axes.set_xticks(ranks[::3], [f"{each:,}" for each in ranks[::3]])
    axes.set_title("On paper: FSDP2, 1 T parameters (solid) and 100 G (dashed)", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _share_on_paper(axes: Axes) -> None:
    ranks = [2**power for power in range(11)]
    for kept in PAPER:
        for tokens, style in ((TOKENS, "-"), (512, "--")):
            shares = [100 * _share_with(kept, each, tokens) for each in ranks]
            label = kept.name if tokens == TOKENS else None
            axes.plot(ranks, shares, style, color=COLOURS[kept.name], label=label)
    axes.set(xlabel="GPUs that share the parameters; 1: DDP", ylabel="%", xscale="log", yscale="log")
    axes.set_xticks(ranks[::2], [f"{each:,}" for each in ranks[::2]])
    title = "On paper: the clipped step in compute and step, for any model size"
    axes.set_title(f"{title}\n{TOKENS:,} tokens a rank (solid), 512 (dashed)", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _share_with(kept: Format, ranks: int, tokens: int) -> float:
    """Of compute and update alone: the parameters cancel out."""
    compute = FLOPS_A_PARAMETER_AND_TOKEN * tokens / (GPU_FLOPS * FLOPS_REACHED)
    update = kept.moved / ranks / (GPU_BANDWIDTH * BANDWIDTH_REACHED)
    return update / (compute + update)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=count, default=9, help="of all contenders (9)")
    parser.add_argument("--report", action="store_true", help="measure nothing, report what is in --json")
    parser.add_argument("--json", type=Path, default=Path("runs/scale.json"), help="file of the samples")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="put the tables between this file's markers")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the picture into this PNG")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    check_page(parser, options.markdown, BEGIN)
    if options.report:
        try:
            results = Results.read(options.json)
        except OSError as error:
            parser.error(f"--report: {error}; measure first, without it")
    else:
        results = measure(options.rounds)
        results.write(options.json)
    found = _about(results), (), list(_tables(results))
    print(report.terminal(*found))
    if options.markdown is not None:
        write_page(options.markdown, report.markdown(*found, "###"), BEGIN)
    if options.plot is not None:
        draw(results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
