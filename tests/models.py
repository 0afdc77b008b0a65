"""Tiny random models of transformers, and the loop written by hand that gradacc is compared with."""

import copy
from collections import OrderedDict

import torch
import transformers
from torch import nn

import gradacc
from tests.helpers import fingerprint

SMALL = dict(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager")
DECODER = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    max_position_embeddings=32, **SMALL,
)  # fmt: skip


def gpt2():
    sizes = dict(n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL, **sizes))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def bert():
    sizes = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **dropout))


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**DECODER, num_local_experts=3, experts_implementation="eager")
    )


def double(make):
    """One of these models, always the same, in float64."""
    torch.manual_seed(0)
    return make().double()


def state(module):
    """What a pass over a model must not change: tensors, modes, hooks, and which attributes there are, with their numbers."""
    hooks = [
        (name, key, list(value))
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, OrderedDict)
    ]
    attributes = {name: sorted(vars(part)) for name, part in module.named_modules()}
    numbers = {
        (name, key): (type(value), value if isinstance(value, (bool, int, float, str)) else _size(value))
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if not isinstance(value, (nn.Module, torch.Tensor))
    }
    return fingerprint(dict(module.state_dict(keep_vars=True))), hooks, attributes, numbers


def _size(value):
    return len(value) if isinstance(value, (list, tuple, dict, set)) else None


def by_hand(module, loss, batches):
    """Sums of the gradients of ``loss(module, batch)``, in the order of the parameters; and the sum of the losses."""
    reference, total = copy.deepcopy(module), 0.0
    for batch in batches:
        value = loss(reference, batch)
        value.backward()
        total += value.item()
    trainable = {name: param for name, param in reference.named_parameters() if param.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable.items()}, total


def ours(module, loss, batches):
    """The same by gradacc."""
    apply, params, _ = gradacc.functional(module)
    grad_fn = gradacc.accumulate_and_value(
        lambda params, batch: loss(lambda *args, **kwargs: apply(params, *args, **kwargs), batch), reduction="sum"
    )
    return grad_fn(params, batches)
