"""Two ranks of Hugging Face Accelerate beside ours: ``torchrun --nproc-per-node 2 -m tests.sync.with_accelerate FILE``.

Writes, for two recipes, both sides' gradients, and how many collectives each took.
"""

import gc
import sys
import warnings
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradacc
from gradacc.demo.batch import PAD
from gradacc.demo.model import GPT, GPTConfig

warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # Accelerate's imports

from accelerate import Accelerator  # noqa: E402

STEPS, ROWS = 4, 3


class Collectives(TorchDispatchMode):
    """Names of the collectives that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def ragged(rank):
    """Token batches of different lengths on each rank, padded."""
    g = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, 256, (STEPS * ROWS, 17), generator=g)
    lengths = torch.randint(2, 18, (STEPS * ROWS, 1), generator=g)
    return torch.where(torch.arange(17) < lengths, tokens, PAD)


def token_losses(logits, tokens):
    targets = tokens[:, 1:]
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=PAD, reduction="sum"), targets != PAD


def causal_lm(accelerator, model, tokens):
    """Their documented recipe for token-weighted accumulation: count, gather, scale, and undo the division by steps."""
    batches = tokens.chunk(STEPS)
    items = torch.tensor(sum(int((batch[:, 1:] != PAD).sum()) for batch in batches))
    items = accelerator.gather(items).sum().item()
    for number, batch in enumerate(batches):
        with model.no_sync() if number < STEPS - 1 else nullcontext():
            loss, _ = token_losses(model(batch), batch)
            loss = loss * accelerator.gradient_accumulation_steps * accelerator.num_processes / items
            accelerator.backward(loss)
    return gradients(accelerator.unwrap_model(model))


def plain(accelerator, model, x):
    """Their ``with accelerator.accumulate(model)``."""
    for batch in x.chunk(STEPS):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).square().mean())
    return gradients(accelerator.unwrap_model(model))


def gradients(module):
    grads = {name: param.grad.clone() for name, param in module.named_parameters()}
    module.zero_grad()
    return grads


def main(path):
    """Both recipes, both sides."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=STEPS)
    rank, results = accelerator.process_index, {}
    torch.manual_seed(0)
    gpt, mlp = (
        GPT(GPTConfig(layers=2, heads=2, width=16, context=17)),
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)),
    )
    torch.manual_seed(rank)
    tokens, x = ragged(rank), torch.randn(STEPS * ROWS, 5)
    apply_gpt, params_gpt, _ = gradacc.functional(gpt)
    apply_mlp, params_mlp, _ = gradacc.functional(mlp)

    def lm_loss(params, tokens):
        loss, real = token_losses(apply_gpt(params, tokens), tokens)
        return gradacc.Mean(loss, real.sum())

    def mlp_loss(params, x):
        return apply_mlp(params, x).square().mean()

    for name, theirs, module, data, loss, params in (
        ("causal LM", causal_lm, gpt, tokens, lm_loss, params_gpt),
        ("plain", plain, mlp, x, mlp_loss, params_mlp),
    ):
        grad_fn = gradacc.accumulate(loss, steps=STEPS, sync=gradacc.all_reduce())
        grad_fn(params, data)
        with Collectives() as ours:
            mine = grad_fn(params, data)
        model = accelerator.prepare(module)
        for _ in range(2):  # DDP orders its buckets anew after its first step
            theirs(accelerator, model, data)
        with Collectives() as counted:
            other = theirs(accelerator, model, data)
        results[name] = (mine, other, ours.names, counted.names)
    torch.save(results, f"{path}.{rank}")
    # DDP's reducer must not be the last one to hold the group: it would wait for gloo's thread with the interpreter's lock,
    # which that thread may wait for (seen so once, at the end of the process).
    del model
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
