"""Features of the optimizer in pairs: a small training with any of them switched on, and which pairs there cannot be.

A feature either changes what is computed (a format, clipping) or must not (sharding, step in backward). A training with
a pair of features is compared with its twin: the plain loop, whole tensors and the CPU engine, with only those of the
features that change what is computed.
"""

import contextlib
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import lucid.optim as optim
from bits import draw, peek, same
from capturing import replay
from sharded import bits_of, whole

FORMATS = {"fp32": "float32 moments", "bf16": "bfloat16 moments", "8bit": "8-bit moments"}
WEIGHTS = {"bf16 weights": torch.bfloat16, "fp16 weights": torch.float16, "stochastic": torch.bfloat16}
DTENSORS = ("fsdp2", "hsdp", "tp")
SHARDED = (*DTENSORS, "shard_group")
TITLES = {
    **FORMATS,
    "bf16 weights": "bfloat16 weights",
    "fp16 weights": "float16 weights",
    "stochastic": '`master_weights="stochastic"`',
    "amsgrad": "`amsgrad`",
    "independent": '`weight_decay_schedule="independent"`',
    "cautious": "`cautious_decay`",
    "ema": "`ema_decay`",
    "clip": "`max_grad_norm`",
    "skip": '`nonfinite="skip"`',
    "error": '`nonfinite="error"`',
    "spike": "`spike_threshold`",
    "scaler": "GradScaler",
    "statistics": "statistics",
    "backward": "step in backward",
    "accumulate": "`accumulate()`",
    "host": "state on the host",
    "capture": "CUDA graph",
    "fsdp2": "FSDP2",
    "hsdp": "HSDP",
    "tp": "tensor parallelism",
    "shard_group": "`shard_group`",
    "dcp": "DCP",
    "tensor lr": "lr tensor, scheduled",
    "compile": "compiled model",
}
TWO_GROUPS = "In two parameter groups."
EXCLUDED = {
    **dict.fromkeys(
        [("clip", "backward"), ("spike", "backward")],
        "The norm of all gradients is known only after the last one; by then parameters are updated.",
    ),
    ("skip", "error"): "`nonfinite` has one value.",
    ("error", "capture"): "A graph cannot raise an error.",
    ("scaler", "backward"): "GradScaler checks the gradients after backward, which has used and freed them.",
    **dict.fromkeys(
        [(each, "shard_group") for each in DTENSORS],
        "DTensors know their processes; a group would count their shards twice.",
    ),
    ("fsdp2", "hsdp"): "HSDP is FSDP2 with replicas.",
    **dict.fromkeys(
        [("capture", each) for each in SHARDED],
        "Refused: a captured exchange between processes has not been tried on GPUs yet.",
    ),
}
OFF_IN_BACKWARD = (
    "Hooks cannot see whether a gradient is still to be averaged, so they do nothing, with a warning, and `step()` "
    "updates everything. Of FSDP2 it is known."
)
NOTED = {
    ("backward", "tp"): OFF_IN_BACKWARD,
    ("backward", "shard_group"): OFF_IN_BACKWARD,
    ("skip", "backward"): "Each parameter is skipped by itself.",
    ("error", "backward"): "Parameters before the bad one stay updated.",
    (
        "fp16 weights",
        "scaler",
    ): "GradScaler does not unscale float16 gradients; set `_step_supports_amp_scaling = True` "
    "where parameters are on the CPU.",
    ("scaler", "capture"): "Set `grad_scale` and `found_inf` to tensors on the GPU; GradScaler's own `step` waits.",
    ("scaler", "shard_group"): "Use torch's `ShardedGradScaler`: GradScaler decides on each process alone.",
    ("shard_group", "dcp"): "Save with `flatten_optimizer_state_dict=True`: processes have different groups.",
    ("fp32", "bf16"): TWO_GROUPS,
    ("fp32", "8bit"): TWO_GROUPS,
    ("bf16", "8bit"): TWO_GROUPS,
    ("bf16 weights", "stochastic"): TWO_GROUPS,
    ("fp16 weights", "stochastic"): TWO_GROUPS,
}


def pair(one, other):
    return tuple(sorted((one, other), key=list(TITLES).index))


def excluded(one, other):
    """Why a pair cannot be, or None."""
    return EXCLUDED.get(pair(one, other))


def matrix():
    """The page's table of pairs, and its notes."""
    names, notes = list(TITLES), {}

    def cell(one, other):
        reason, note = excluded(one, other), NOTED.get(pair(one, other))
        if reason is None and note is None:
            return "✓"
        number = notes.setdefault(reason or note, len(notes) + 1)
        return f"{'–' if reason else '✓'} <sup>{number}</sup>"

    lines = [f"| | | {' | '.join(str(number + 1) for number in range(len(names) - 1))} |"]
    lines.append(f"|--:|:--|{':-:|' * (len(names) - 1)}")
    for number, name in enumerate(names):
        cells = [cell(name, other) for other in names[:number]] + [""] * (len(names) - 1 - number)
        lines.append(f"| {number + 1} | {TITLES[name]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for note, number in notes.items())])


SIZES = ((64, 64), (33,), (66, 80), (5,))  # of two parts, a matrix and a vector each; matrices can have eight bits
STEPS = 6
BAD = 3  # the step with a gradient that is not finite, where a feature does something about it
SPIKES = (2, 3)  # the steps with large gradients, where a feature does something about them
NORMS = [98.0, 9.0, 64, 0]  # what it remembers of the norms before the first step
SAVED = 4  # the step before which training is saved and resumed


class Part(nn.Module):
    """A matrix and a vector. The loss is linear in them, so each gradient is exactly what `forward` is given."""

    def __init__(self, first, dtype):
        super().__init__()
        self.matrix, self.vector = (nn.Parameter(draw(first + i, SIZES[first + i]).to(dtype)) for i in range(2))

    def forward(self, matrix, vector):
        return (self.matrix * matrix).sum().float() + (self.vector * vector).sum().float()


class Net(nn.Module):
    def __init__(self, dtypes):
        super().__init__()
        self.parts = nn.ModuleList(Part(2 * number, dtype) for number, dtype in enumerate(dtypes))

    def forward(self, directions):
        losses = [part(*directions[2 * number : 2 * number + 2]) for number, part in enumerate(self.parts)]
        return losses[0] + losses[1]


class Training:
    """A training with some features on. ``twin``: without those that must not change what is computed."""

    def __init__(self, features, twin=False, capturing=None):
        self.on = frozenset(features)
        self.twin, self.capturing = twin, capturing
        self.shards = None if twin else next((each for each in reversed(SHARDED) if each in self.on), None)
        self.norms = []
        self.make()

    def has(self, feature):
        """Whether a feature that must not change what is computed is on."""
        return feature in self.on and not self.twin

    def of_parts(self, kinds, default):
        """What each of the two parts has: two kinds of one feature are on in one part each."""
        on = [kind for kind in kinds if kind in self.on] or [default]
        return [on[number % len(on)] for number in range(2)]

    # Making

    def make(self):
        dtypes = [WEIGHTS.get(kind, torch.float32) for kind in self.of_parts(WEIGHTS, None)]
        self.net = Net(dtypes)
        self.spread()
        self.optimizer = self.make_optimizer()
        self.scaler = self.make_scaler() if "scaler" in self.on else None
        self.scheduler = None
        if "tensor lr" in self.on:
            self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=0.5)
        self.graph, self.ordinary = None, 0  # ordinary steps come before a captured one
        self.kept = {}  # the gradients that a captured step reads
        self.scale, self.found_inf = torch.tensor(64.0), torch.tensor(0.0)  # GradScaler's, where a graph reads them
        self.forward = torch.compile(self.net, backend="aot_eager") if self.has("compile") else self.net

    def spread(self):
        """Shard the model as the feature has it."""
        if self.shards in (None, "shard_group"):
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        world = distributed.get_world_size()
        names = {"hsdp": ("replicas", "shards"), "fsdp2": ("shards",)}
        dims = next((names[each] for each in ("hsdp", "fsdp2") if self.has(each)), ())
        sizes = [world] if len(dims) < 2 else [2, world // 2]
        if self.has("tp") and dims:
            dims, sizes = (*dims, "tensor"), [*([2] if len(dims) == 1 else [2, 1]), 2]
        elif self.has("tp"):
            dims, sizes = ("tensor",), [world]
        mesh = init_device_mesh("cpu", tuple(sizes), mesh_dim_names=dims)
        if self.has("tp"):
            self.spread_tensors(mesh["tensor"], Shard(1) if len(dims) > 1 else Shard(0))
        if dims[0] != "tensor":
            over = mesh[tuple(dim for dim in dims if dim != "tensor")]
            for part in self.net.parts:
                fully_shard(part, mesh=over)
            fully_shard(self.net, mesh=over)

    def spread_tensors(self, mesh, matrices):
        for part in self.net.parts:
            for name, param in list(part.named_parameters()):
                placement = matrices if param.dim() == 2 else Replicate()
                part.register_parameter(name, nn.Parameter(distribute_tensor(param.detach(), mesh, [placement])))

    def make_optimizer(self):
        formats = self.of_parts(FORMATS, "fp32")
        masters = ["stochastic" if kind == "stochastic" else True for kind in self.of_parts(WEIGHTS, None)]
        lr = torch.tensor(0.01, dtype=torch.float64) if self.has("tensor lr") else 0.01
        groups = [
            {"params": list(part.named_parameters(prefix=f"parts.{number}"))}
            | {"state_format": formats[number], "master_weights": masters[number]}
            for number, part in enumerate(self.net.parts)
        ]
        options = {"lr": lr, "amsgrad": "amsgrad" in self.on, "cautious_decay": "cautious" in self.on}
        if "independent" in self.on:
            options |= {"weight_decay_schedule": "independent", "reference_lr": 0.03}
        if "ema" in self.on:
            options["ema_decay"] = 0.9
        if "clip" in self.on:
            options["max_grad_norm"] = 3.0
        if "skip" in self.on or "error" in self.on:
            options["nonfinite"] = "skip" if "skip" in self.on else "error"
        if "spike" in self.on:
            options["spike_threshold"] = 4.0
            for group in groups:
                group["spike_memory"] = NORMS.copy()
        if self.has("host"):
            options["state_device"] = "cpu"
        if self.shards == "shard_group":
            options["shard_group"] = distributed.group.WORLD
            groups = [groups[distributed.get_rank()]]
        optimizer = optim.AdamW(groups, **options)
        if "statistics" in self.on:
            optimizer.observe()
        if self.has("backward"):
            optimizer.step_in_backward(model=self.net if {"fsdp2", "hsdp"} & self.on else None)
        if self.on >= {"fp16 weights", "scaler"}:  # GradScaler itself does not unscale float16
            optimizer._step_supports_amp_scaling = True
        return optimizer

    def make_scaler(self):
        if self.shards != "shard_group":
            return torch.amp.GradScaler("cpu", init_scale=64.0)
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        return ShardedGradScaler("cpu", init_scale=64.0, process_group=distributed.group.WORLD)

    # Training

    def directions(self, step):
        """The gradients of a step, like the parameters."""
        bad = step == BAD and not self.on.isdisjoint({"skip", "error", "scaler"})
        bad = bad and not self.on.issuperset({"error", "backward"})  # how far backward comes depends on its order
        found = []
        for number, param in enumerate(param for part in self.net.parts for param in part.parameters()):
            value = draw(100 * step + number, SIZES[number])
            if "spike" in self.on and step in SPIKES:
                value *= 64
            if param.dtype == torch.float16:
                value = value.mul_(256).round_().div_(256)  # processes' mean halves it, which must not round
            value = value.to(param.dtype)
            if bad and number == 2:
                value[-1, -1] = torch.inf
            if self.has("tp"):
                tensor_mesh = param.device_mesh["tensor"] if param.device_mesh.ndim > 1 else param.device_mesh
                placement = self.tensor_placement(param)
                value = distribute_tensor(value, tensor_mesh, [placement], src_data_rank=None)
            found.append(value)
        return found

    def tensor_placement(self, param):
        return param.placements[-1]

    def loss(self, directions):
        with warnings.catch_warnings():
            if self.has("compile"):  # torch's compiler looks for the gradients of whatever a graph break leaves
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            loss = self.forward(directions)
        if isinstance(loss, DTensor):
            loss = loss.full_tensor()
        return loss if self.scaler is None else self.scaler.scale(loss)

    def backward(self, directions):
        loss = self.loss(directions)
        with warnings.catch_warnings():
            if self.shards in ("tp", "shard_group"):
                warnings.filterwarnings("ignore", r"step_in_backward\(\) does nothing", RuntimeWarning)
            loss.backward()

    def gradients(self, step):
        directions = self.directions(step)
        if "accumulate" not in self.on:
            with self.optimizer.accumulate() if self.has("capture") else contextlib.nullcontext():
                self.backward(directions)
            return
        first, second = ([direction * share for direction in directions] for share in (0.25, 0.75))
        with self.optimizer.accumulate() if self.has("accumulate") else contextlib.nullcontext():
            self.backward(first)
        self.backward(second)

    def step(self, step):
        if self.has("dcp") and step == SAVED:
            self.resume()
        if self.has("ema"):
            with self.optimizer.averaged(self.net):  # evaluating it must not change the training
                pass
        with contextlib.suppress(FloatingPointError):
            self.optimizer.zero_grad()
            self.gradients(step)
            if self.twin and self.on >= {"backward", "skip"} and step == BAD:
                self.net.parts[1].matrix.grad = None  # in backward, the bad one alone is left out
            if self.has("capture"):
                self.step_by_graph()
            elif self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        if "clip" in self.on or "spike" in self.on:
            self.norms.append(self.optimizer.grad_norm)

    def step_by_graph(self):
        """Take two ordinary steps, capture the next, replay it from then on; gradients stay where they are."""
        for param in self.net.parameters():
            if param.grad is not None:
                param.grad = self.kept.setdefault(param, param.grad).copy_(param.grad)
        if self.scaler is not None:
            bad = not all(param.grad.isfinite().all() for param in self.net.parameters())
            self.found_inf.fill_(float(bad))
        if self.graph is None and self.ordinary < 2:
            self.ordinary += 1
            self.take()
            return
        if self.graph is None:
            with self.capturing.captures(self.optimizer) as self.graph:
                self.take()
        replay(self.graph)
        if self.scaler is not None and self.found_inf:
            self.scale /= 2
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": self.scale.item()})

    def take(self):
        if self.scaler is not None:
            self.optimizer.grad_scale, self.optimizer.found_inf = self.scale, self.found_inf
        if self.has("backward"):
            for param in self.net.parameters():
                self.optimizer._step_alone(param)
        self.optimizer.step()
        self.optimizer._drop_amp()

    def run(self):
        for step in range(STEPS):
            self.step(step)
        return self

    def resume(self):
        """Save with torch's distributed checkpoint, make everything anew, load."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
            set_model_state_dict,
        )

        from lucid.optim.checkpoint import load_optimizer

        with shared_folder() as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            flat = StateDictOptions(flatten_optimizer_state_dict=self.shards == "shard_group")  # each has other groups
            state = get_optimizer_state_dict(self.net, self.optimizer, options=flat)
            dcp.save({"optimizer": state}, checkpoint_id=folder)
            weights = get_model_state_dict(self.net)
            scheduled = None if self.scheduler is None else self.scheduler.state_dict()
            scaled = None if self.scaler is None else self.scaler.state_dict()
            self.make()
            set_model_state_dict(self.net, weights)
            load_optimizer(self.net, self.optimizer, folder)
            if scheduled is not None:
                self.scheduler.load_state_dict(scheduled)
            if scaled is not None:
                self.scaler.load_state_dict(scaled)


@contextlib.contextmanager
def shared_folder():
    """A folder that all processes of the group know."""
    if not distributed.is_initialized():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    first = distributed.get_rank() == 0
    with tempfile.TemporaryDirectory() if first else contextlib.nullcontext() as folder:
        names = [folder]
        distributed.broadcast_object_list(names, src=0)
        yield Path(names[0])
        distributed.barrier()


def assert_alike(ours, theirs, what):
    """Compare a training with its twin: parameters, state, norms and what is remembered of them, what was left out."""
    known = dict(theirs.net.named_parameters())
    names = {param: name for name, param in ours.net.named_parameters()}
    params = [param for group in ours.optimizer.param_groups for param in group["params"]]
    skipped = ours.optimizer.skipped_steps  # known once a device that decides has been waited for
    assert len(params) == (2 if ours.shards == "shard_group" else 4), what
    for param in params:
        name = names[param]
        twin = known[name]
        assert same(whole(param), twin.detach()), (what, name)
        left, right = peek(ours.optimizer).get(param, {}), peek(theirs.optimizer).get(twin, {})
        assert left.keys() == right.keys(), (what, name)
        for key, value in left.items():
            assert torch.equal(bits_of(key, whole(value)), bits_of(key, right[key])), (what, name, key)
    for left, right in zip(ours.norms, theirs.norms, strict=True):
        assert (left is None) == (right is None), what
        assert left is None or same(left.cpu(), right.cpu()), (what, left, right)
    if not ours.on & {"dcp", "scaler"}:  # skipped steps are not saved; GradScaler leaves out steps itself
        assert (skipped > 0) == bool(ours.on & {"skip", "spike"}), what
    left, right = (each.optimizer.state_dict()["param_groups"][0] for each in (ours, theirs))
    assert left.get("spike_memory") == right.get("spike_memory"), what
    if "statistics" in ours.on:
        compare_statistics(ours.optimizer.statistics(), theirs.optimizer.statistics(), what)


def compare_statistics(left, right, what):
    for key, value in left.items():
        if key.startswith("parts.") and "skipped" not in key:
            assert value == pytest.approx(right[key], rel=1e-4), (what, key)
