"""What the quality study trains: four real tasks, and the optimizers and number formats that are compared on them.

Every configuration runs the same code. The network always computes in float32, from float32 copies of the weights; the
weights are *stored* in the configuration's format, and the gradients arrive in it. So nothing differs but what the
optimizer reads and writes: its own formats are measured, not the arithmetic of bf16 kernels.

A task and a seed give the initial weights (before they are rounded to bf16) and the batches, the same for every
configuration: final losses are compared in pairs.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import sklearn
import torch
from examples.train_gpt import GPT, Config, Corpus, lr_factor
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import lucid.optim as optim

StateFormat = Literal["fp32", "bf16", "8bit"]


@dataclass(frozen=True, slots=True)
class Configuration:
    """An optimizer, the format of its state, how it keeps the weights, whether its decay is cautious, and how strong.

    Under lucid bf16 weights have their residual (``master_weights=True``, the default) unless they are stochastically
    rounded; under torch nothing, and the moments are bf16 as well, as torch's always are for bf16 parameters.
    """

    name: str
    package: Literal["lucid", "torch"]
    state: StateFormat = "fp32"
    weights: Literal["fp32", "bf16", "bf16 stochastic"] = "fp32"
    cautious: bool = False
    decay: float = 1.0  # as a part of the task's

    @property
    def dtype(self) -> torch.dtype:
        """The type of parameters and gradients."""
        return torch.float32 if self.weights == "fp32" else torch.bfloat16

    def optimizer(
        self, named: list[tuple[str, nn.Parameter]], lr: float, beta2: float, weight_decay: float, seed: int
    ) -> torch.optim.Optimizer:
        """Make the optimizer; matrices decay, and biases and the gains of norms do not.

        torch's is the fused one: of its bf16 steps the kindest, that rounds each result once.
        """
        groups: list[dict[str, Any]] = [
            {"params": [(n, p) for n, p in named if p.ndim >= 2], "weight_decay": self.decay * weight_decay},
            {"params": [(n, p) for n, p in named if p.ndim < 2], "weight_decay": 0.0},
        ]
        betas = (0.9, beta2)
        if self.package == "torch":
            return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
        return optim.AdamW(
            groups,
            lr=lr,
            betas=betas,
            state_format=self.state,
            seed=seed,
            master_weights="stochastic" if self.weights == "bf16 stochastic" else True,
            cautious_decay=self.cautious,
        )


BASELINE = "lucid fp32"
TORCH = "torch fp32"
CONFIGURATIONS = {
    configuration.name: configuration
    for configuration in (
        Configuration(BASELINE, "lucid"),
        Configuration("bf16 + residual", "lucid", weights="bf16"),
        Configuration("state bf16", "lucid", state="bf16"),
        Configuration("state 8bit", "lucid", state="8bit"),
        Configuration("8bit + residual", "lucid", state="8bit", weights="bf16"),
        Configuration("bf16 stochastic", "lucid", weights="bf16 stochastic"),
        Configuration("8bit + stochastic", "lucid", state="8bit", weights="bf16 stochastic"),
        Configuration("cautious decay", "lucid", cautious=True),
        Configuration("half the decay", "lucid", decay=0.5),
        Configuration(TORCH, "torch"),
        Configuration("torch bf16", "torch", state="bf16", weights="bf16"),
    )
}


class Examples(NamedTuple):
    """Inputs of a network, and the class that it should name for each or for each position of each."""

    inputs: Tensor
    targets: Tensor


class Text(Corpus):
    """The characters of Python's language reference, cut into windows of `context`."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.context = context

    def draw(self, count: int, generator: torch.Generator) -> Examples:
        starts = torch.randint(len(self.train) - self.context, (count, 1), generator=generator)
        codes = self.train[starts + torch.arange(self.context + 1)]
        return Examples(codes[:, :-1], codes[:, 1:])

    def rest(self) -> Examples:
        """Return all of the held-out text, in windows side by side."""
        windows = self.held_out.unfold(0, self.context + 1, self.context)
        return Examples(windows[:, :-1], windows[:, 1:])


class Digits:
    """1,797 handwritten digits of 8×8 pixels; the last 500, by other hands, are held out.

    A drawn image is moved by up to one pixel each way: the training images alone are soon known by heart.
    """

    def __init__(self) -> None:
        pixels, labels = load_digits(return_X_y=True)
        self.images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
        self.labels = torch.from_numpy(labels).long()
        self.digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:12]

    def draw(self, count: int, generator: torch.Generator) -> Examples:
        chosen = torch.randint(len(self.images) - 500, (count,), generator=generator)
        padded = F.pad(self.images[chosen], (1, 1, 1, 1), value=-1.0)
        down, right = torch.randint(3, (2, count, 1, 1), generator=generator)
        rows, columns = down + torch.arange(8)[:, None], right + torch.arange(8)
        moved = padded[torch.arange(count)[:, None, None], 0, rows, columns]
        return Examples(moved[:, None], self.labels[chosen])

    def rest(self) -> Examples:
        return Examples(self.images[-500:], self.labels[-500:])


class ViT(nn.Module):
    """A transformer over the 16 patches of 2×2 pixels, whose mean it classifies."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.position = nn.Parameter(0.3 * torch.randn(16, width))
        block = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        scores: Tensor = self.head(self.blocks(patches + self.position).mean(dim=1))
        return scores


class ConvNet(nn.Sequential):
    """3×3 convolutions with normed groups of 8 channels; `layers` of them at 4×4, where there are twice as many."""

    def __init__(self, width: int, layers: int) -> None:
        def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
            kernel = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            return [kernel, nn.GroupNorm(outputs // 8, outputs), nn.ReLU()]

        super().__init__(
            *convolution(1, width),
            *convolution(width, 2 * width, stride=2),
            *(module for _ in range(layers - 1) for module in convolution(2 * width, 2 * width)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 10),
        )


@dataclass(frozen=True, slots=True)
class Task:
    """A network, its data and its schedule; a seed, steps and all this together give a run, but for the optimizer."""

    name: str
    title: str
    model: Literal["gpt", "vit", "convnet"]
    width: int
    layers: int
    steps: int
    batch: int
    lr: float  # at its peak
    beta2: float
    weight_decay: float
    warmup: float  # of the steps
    context: int = 0  # characters a window

    def network(self) -> nn.Module:
        if self.model == "gpt":
            return GPT(self.schedule())
        return (ViT if self.model == "vit" else ConvNet)(self.width, self.layers)

    def schedule(self) -> Config:
        """Return what the example's GPT and its learning rate's schedule are made from."""
        return Config(
            width=self.width,
            layers=self.layers,
            heads=self.width // 32,
            context=self.context,
            steps=self.steps,
            warmup=self.warmup,
        )

    def data(self) -> Text | Digits:
        return _text(self.context) if self.model == "gpt" else _digits()

    def identity(self) -> dict[str, Any]:
        """Return all that a result depends on but for optimizer and seed; not its title."""
        fields = asdict(self)
        del fields["title"]
        return fields | {"data": self.data().digest}


@cache
def _text(context: int) -> Text:
    return Text(context)


@cache
def _digits() -> Digits:
    return Digits()


# Peak rates: from a few tried by hand under torch fp32, by held-out loss, mostly one seed: 2e-3 to 8e-3 for the small
# GPT (when it had 700 steps), 2e-3 and 3e-3 for the large, 1e-3 to 3e-3 for the ViT, 1e-3 to 5e-3 for the ConvNet.
TASKS = {
    task.name: task
    for task in (
        Task("gpt-small", "GPT, 0.35 M", "gpt", 96, 3, 1000, 8, 3e-3, 0.99, 0.1, 0.05, context=64),
        Task("gpt-large", "GPT, 0.82 M", "gpt", 128, 4, 1000, 8, 2e-3, 0.99, 0.1, 0.05, context=64),
        Task("vit", "digits, ViT", "vit", 64, 3, 400, 64, 2e-3, 0.999, 0.05, 0.1),
        Task("convnet", "digits, ConvNet", "convnet", 64, 2, 300, 64, 4e-3, 0.999, 0.05, 0.1),
    )
}


class Outcome(NamedTuple):
    """How a run ended, over all that was held out; `train` is the mean loss of the last tenth of the steps."""

    loss: float
    accuracy: float
    train: float


def train(task: Task, configuration: Configuration, seed: int, advanced: Callable[[], object] = int) -> Outcome:
    """Run one training from start to end; `advanced` is called after each step."""
    torch.manual_seed(seed)
    network, data = task.network(), task.data()
    parameters = {name: nn.Parameter(p.detach().to(configuration.dtype)) for name, p in network.named_parameters()}
    named = list(parameters.items())
    optimizer = configuration.optimizer(named, task.lr, task.beta2, task.weight_decay, seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, task.schedule()))

    def scores(inputs: Tensor) -> Tensor:
        copies = {name: parameter.float() for name, parameter in parameters.items()}
        found: Tensor = torch.func.functional_call(network, copies, inputs)
        return found.flatten(0, -2)

    losses: list[float] = []
    for step in range(task.steps):
        inputs, targets = data.draw(task.batch, torch.Generator().manual_seed((seed << 32) + step))
        loss = F.cross_entropy(scores(inputs), targets.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        advanced()

    inputs, targets = data.rest()
    with torch.no_grad():
        found = torch.cat([scores(part) for part in torch.split(inputs, 64)])
    targets = targets.flatten()
    return Outcome(
        loss=F.cross_entropy(found, targets).item(),
        accuracy=(found.argmax(-1) == targets).double().mean().item(),
        train=statistics.fmean(losses[-math.ceil(len(losses) / 10) :]),
    )


def bits(configuration: Configuration) -> str:
    """Name the bits that the optimizer computes: the digest of what some steps on made-up gradients lead to.

    A result is taken up again only where this is the same, so no change of rounding or format goes unseen.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (96, 200), "vector": (300,)}
    named = [
        (name, nn.Parameter(torch.randn(shape, generator=generator).to(configuration.dtype)))
        for name, shape in shapes.items()
    ]
    optimizer = configuration.optimizer(named, 1e-3, 0.99, 0.1, seed=0)
    for step in range(20):
        for _, parameter in named:
            gradient = torch.randn(parameter.shape, generator=generator) * 10.0 ** -(step % 5)
            parameter.grad = gradient.to(configuration.dtype)
        optimizer.step()
    values = b"".join(parameter.detach().float().numpy().tobytes() for _, parameter in named)
    return hashlib.sha256(values).hexdigest()[:12]


def versions() -> dict[str, str]:
    """Return the versions of what trains and of where the digits come from."""
    return {"torch": torch.__version__, "scikit-learn": sklearn.__version__}
