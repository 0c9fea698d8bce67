"""Fine-tune a bfloat16 GPT with all optimizer state in the host's memory and updates in backward.

    python examples/finetune_host.py --device cpu    # without a GPU: half a minute on 2 cores
    python examples/finetune_host.py                 # on a GPU, which keeps weights and activations only
    python examples/finetune_host.py --width 4096 --layers 32 --steps 20  # 6.4 billion parameters from random weights

The model is that of train_gpt.py and starts from its checkpoint, or from random weights if there is none. It learns the
source code of some of Python's modules. Moments are in 8 bits, beside the residual of each weight, both on the host.
Backward updates each weight as soon as its gradient is complete, and frees the gradient. So the GPU holds 2 bytes per
parameter and the largest gradient beside activations, the host 4.06 bytes per parameter.

A run writes `checkpoint.pt` into `--out`, with weights and optimizer state.
"""

import argparse
import hashlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lucid.optim as optim
from train_gpt import GPT, Config, Corpus, cross_entropy, encode, lr_factor  # type: ignore[import-not-found]

MODULES = ("argparse", "ast", "dataclasses", "inspect", "shutil", "statistics", "subprocess", "tarfile", "typing")
DTYPE = torch.bfloat16
HEAD = 32  # the width of an attention head
WINDOWS = 64  # of the held-out text


class Code(Corpus):  # type: ignore[misc]
    """The source code of Python's modules as codes, the last tenth held out."""

    def __init__(self) -> None:
        folder = Path(argparse.__file__).parent
        text = "\n\n".join((folder / f"{name}.py").read_text("utf-8") for name in MODULES)
        codes = encode(text)
        self.train, self.held_out = codes[: -len(codes) // 10], codes[-len(codes) // 10 :]
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:12]


class FineTuning:
    """A model, its optimizer, and the text that it learns."""

    def __init__(self, config: Config, device: torch.device, weights: dict[str, Tensor] | None) -> None:
        self.config, self.device, self.corpus = config, device, Code()
        torch.manual_seed(config.seed)
        self.model = GPT(config)
        if weights is not None:
            self.model.load_state_dict(weights)
        self.model.to(device, DTYPE)
        groups = optim.decay_groups(self.model, config.weight_decay)
        self.optimizer = optim.AdamW(
            groups, lr=config.lr, betas=config.betas, state_format="8bit", state_device="cpu", seed=config.seed
        )
        self.optimizer.step_in_backward()
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: lr_factor(step, config))
        self.losses: list[float] = []

    def advance(self) -> None:
        """Do one training step."""
        codes = self.corpus.batch(self.config, len(self.losses)).to(self.device)
        loss = cross_entropy(self.model, codes)
        loss.backward()  # also updates the weights
        self.optimizer.step()  # for schedulers and hooks: no gradient is left
        self.schedule.step()
        self.losses.append(loss.item())

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the mean loss of the held-out text's first windows."""
        context = self.config.context
        windows = self.corpus.held_out.unfold(0, context + 1, context)[:WINDOWS].to(self.device)
        return statistics.fmean(cross_entropy(self.model, batch).item() for batch in windows.split(self.config.batch))

    def memory(self) -> Iterator[str]:
        """Yield how many bytes are where."""
        weights: list[nn.Parameter] = list(self.model.parameters())
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        largest = [max(weights, key=lambda weight: weight.nbytes)]
        for name, tensors in (("weights", weights), ("largest gradient", largest), ("state", state)):
            for kind in sorted({tensor.device.type for tensor in tensors}):
                size = sum(tensor.nbytes for tensor in tensors if tensor.device.type == kind)
                yield f"{name:<18}{size:>16,} bytes on {kind}"
        if self.device.type == "cuda":
            yield f"{'peak, all':<18}{torch.cuda.max_memory_allocated(self.device):>16,} bytes on cuda"


def start(path: Path, options: argparse.Namespace) -> tuple[Config, dict[str, Tensor] | None]:
    """Return the model's size and weights: of the checkpoint, or as asked for and None."""
    steps, lr = options.steps, options.lr
    if options.width or options.layers or not path.exists():
        width, layers = options.width or Config().width, options.layers or Config().layers
        return Config(width=width, heads=width // HEAD, layers=layers, steps=steps, lr=lr), None
    saved = torch.load(path, weights_only=True)
    sizes = {name: saved["identity"][name] for name in ("width", "heads", "layers", "context")}
    return Config(steps=steps, lr=lr, **sizes), saved["model"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Fine-tune a bfloat16 GPT with optimizer state on the host.")
    parser.add_argument("--device", default="cuda", help="where the model is: cuda, cuda:1, or cpu")
    parser.add_argument("--weights", type=Path, default=Path("runs/train_gpt/checkpoint.pt"), help="of train_gpt.py")
    parser.add_argument("--width", type=int, help="start from random weights of this width, a multiple of 32")
    parser.add_argument("--layers", type=int, help="start from random weights with this many layers")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=5e-4, help="peak of the schedule")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="output folder")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.width is not None and (options.width < HEAD or options.width % HEAD):
        parser.error(f"--width must be a multiple of {HEAD}, got {options.width}")
    if options.layers is not None and options.layers < 1:
        parser.error("--layers must be at least 1")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU: add --device cpu")

    config, weights = start(options.weights, options)
    run = FineTuning(config, device, weights)
    size = sum(weight.numel() for weight in run.model.parameters())
    origin = "random weights" if weights is None else options.weights
    print(f"{size:,} parameters from {origin}, held-out loss {run.held_out_loss():.3f}", flush=True)
    for _ in (bar := tqdm(range(config.steps), disable=None, unit="step")):
        run.advance()
        bar.set_postfix_str(f"loss {statistics.fmean(run.losses[-20:]):.3f}", refresh=False)
    print(f"after {config.steps} steps: held-out loss {run.held_out_loss():.3f}")
    print("\n".join(run.memory()))
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "losses": run.losses}
    torch.save(checkpoint, options.out / "checkpoint.pt")
    print(f"written to {options.out / 'checkpoint.pt'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
