"""What the benchmarks compute gradients of: a GPT on real text, a parameter-heavy MLP, and models of almost no arithmetic."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradacc.demo.model import GPT, GPTConfig


class Workload(NamedTuple):
    """A module, a mean-reduced loss of its output, and one large batch, which is taken in `steps` micro-batches."""

    title: str
    module: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]  # loss(output, target): the mean over equally many terms of every example
    inputs: Tensor
    targets: Tensor
    steps: int
    memory: bool = True
    """Whether its memory says anything."""
    threads: int | None = None
    """With how many threads its time is taken; None: with those of the run."""
    repeats: int = 1
    """How many times a timing runs it."""

    @property
    def parameter_bytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self.module.parameters())

    def resized(self, examples: int) -> Workload:
        """The same workload on a batch of `examples` examples: the batch's own, repeated from the start as needed."""
        rows = torch.arange(examples, device=self.inputs.device) % len(self.inputs)
        return self._replace(inputs=self.inputs[rows], targets=self.targets[rows])


def gpt(device: torch.device) -> Workload:
    """The demo's six-layer GPT (5 M parameters), 16 windows of 64 bytes of the standard library's source, 8 steps.

    Plain mean cross-entropy of the next byte; every window is full, so there is no padding: a mean of means is exact.
    """
    return _gpt("GPT, 5 M parameters, 16x64 tokens, 8 steps", GPTConfig(), examples=16, device=device)


def tiny(device: torch.device) -> Workload:
    """The same GPT with 8 channels on 8 windows of 4 bytes, 8 steps: all the calls, none of the arithmetic."""
    config = GPTConfig(width=8, heads=1, context=4)
    work = _gpt("GPT of 8 channels, 8x4 tokens, 8 steps", config, examples=8, device=device)
    return work._replace(memory=False, repeats=10)


class _Logits(nn.Module):
    """Of a transformers model, the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def gpt2(device: torch.device) -> Workload:
    """transformers' GPT-2 of 12 layers and width 64 (165 modules), 32 windows of 16 bytes, 16 steps, one thread."""
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its own
    config = transformers.GPT2Config(vocab_size=256, n_positions=16, n_embd=64, n_layer=12, n_head=4)
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.0
    torch.manual_seed(0)
    module = _Logits(transformers.GPT2LMHeadModel(config)).to(device)
    windows = _text(32 * 17).view(32, 17).to(device)
    title = "transformers' GPT-2, 12 layers, width 64, 32x16 tokens, 16 steps"
    return Workload(title, module, _cross_entropy, windows[:, :-1], windows[:, 1:].contiguous(), 16, False, 1, 2)


def modules(device: torch.device) -> Workload:
    """100 layers of 16 × 16 with an activation each (201 modules), 32 rows, 16 steps, one thread."""
    torch.manual_seed(0)
    layers = [layer for _ in range(100) for layer in (nn.Linear(16, 16), nn.Tanh())]
    for weight in (layer.weight for layer in layers if isinstance(layer, nn.Linear)):
        # So that something arrives at the first one.
        nn.init.orthogonal_(weight, gain=1.1)
    inputs, targets = torch.randn(2, 32, 16).to(device)
    title = "201 modules, 32 rows, 16 steps"
    return Workload(title, nn.Sequential(*layers).to(device), F.mse_loss, inputs, targets, 16, False, 1, 2)


def _gpt(title: str, config: GPTConfig, *, examples: int, device: torch.device) -> Workload:
    torch.manual_seed(0)
    module = GPT(config).to(device)
    windows = _text(examples * (config.context + 1)).view(examples, -1).to(device)
    return Workload(title, module, _cross_entropy, windows[:, :-1], windows[:, 1:].contiguous(), steps=8)


def mlp(device: torch.device) -> Workload:
    """Eight 2048 × 2048 layers with biases (34 M parameters), 32 rows, 4 steps: gradients outweigh the arithmetic."""
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(2048, 2048), nn.ReLU())]
    module = nn.Sequential(*layers[:-1]).to(device)
    inputs, targets = torch.randn(2, 32, 2048).to(device)
    return Workload("MLP, 34 M parameters, 32 rows, 4 steps", module, F.mse_loss, inputs, targets, steps=4)


WORKLOADS: dict[str, Callable[[torch.device], Workload]] = {
    "gpt": gpt,
    "mlp": mlp,
    "tiny": tiny,
    "gpt2": gpt2,
    "modules": modules,
}


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _text(size: int) -> Tensor:
    """The first `size` bytes of the standard library's source, file after file by name, as int64 token ids."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            return torch.tensor(list(text[:size]))
    raise RuntimeError("this Python has no library source to read")
