"""Models by the hundred against the loop written by hand: gradients, and what is left on the module.

.. code-block:: text

    python -m tests.sweep transformers            # the architectures of the slow test
    python -m tests.sweep transformers all        # every causal language model that can be built from a tiny configuration
    python -m tests.sweep timm all                # after `make test-slow`, which installs timm
    python -m tests.sweep timm resnet18 vit_tiny_patch16_224

Every model is random and tiny (timm's: as it is, up to a number of parameters), in float64, in training mode.
"""

import sys
import time
import warnings
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from tests import models, vision

ARCHITECTURES = [
    "arctic", "bamba", "bart", "bert-generation", "bigbird_pegasus", "biogpt", "bloom", "cohere", "ctrl", "dbrx", "deepseek_v3",
    "electra", "ernie", "falcon", "falcon_mamba", "gemma", "gemma2", "gemma3_text", "glm", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gptj", "granite", "granitemoe", "jamba", "llama", "mamba", "mamba2", "mistral", "mixtral", "mpt", "nemotron",
    "olmo", "olmo2", "olmoe", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "roberta",
    "rwkv", "smollm3", "stablelm", "starcoder2", "xglm", "zamba",
]  # fmt: skip
"""Of transformers, in the slow test; those that a tiny configuration does not fit are passed over."""
TESTS_OF_TIMM = [
    "test_vit", "test_resnet", "test_convnext", "test_efficientnet", "test_nfnet", "test_byobnet", "test_mambaout",
    "resnet18", "mobilenetv3_small_050",
]  # fmt: skip
"""Of timm."""
SOME = {"transformers": ARCHITECTURES, "timm": TESTS_OF_TIMM}
LARGEST = 20_000_000
TINY = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_local_experts=4, num_experts=4,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1, attn_implementation="eager",
    experts_implementation="eager",
)  # fmt: skip


class Outcome(NamedTuple):
    """Of one model."""

    parameters: int
    difference: float
    """The largest relative difference of a gradient, by the norm of all."""
    unchanged: bool
    """Whether tensors, hooks and attributes of the module are as before."""
    seconds: float

    @property
    def good(self):
        return self.difference < 1e-9 and self.unchanged


class CannotRunError(Exception):
    """The model itself cannot be built from the tiny configuration, or its loop by hand does not run."""


def compare(make, inputs):
    """One model, made by ``make()``, called with each of ``inputs``, which are dicts."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        try:
            torch.manual_seed(0)
            module = make()
            if sum(param.numel() for param in module.parameters()) > LARGEST:
                raise CannotRunError("too large")
            module = module.double().train()
            before = models.state(module)
            torch.manual_seed(1)
            expected, _ = models.by_hand(module, _loss, inputs)
        except CannotRunError:
            raise
        except Exception as error:
            raise CannotRunError(f"{type(error).__name__}: {error}"[:200]) from error
        torch.manual_seed(1)
        actual, _ = models.ours(module, _loss, inputs)
    assert actual.keys() == expected.keys()
    norm = torch.stack([grad.norm() for grad in expected.values()]).norm().item()
    if not 0 < norm < float("inf"):
        raise CannotRunError(f"its gradient by hand has the norm {norm}")
    difference = max((actual[name] - expected[name]).abs().max().item() for name in expected) / norm
    count = sum(param.numel() for param in module.parameters())
    return Outcome(count, difference, models.state(module) == before, time.perf_counter() - began)


def _loss(call, inputs):
    outputs = call(**inputs)
    leaves = torch.utils._pytree.tree_leaves(outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs)
    return sum(leaf.square().mean() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad)


def of_transformers(name):
    """A tiny random model of that ``model_type``, and three micro-batches."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    transformers.logging.set_verbosity_error()

    def make() -> nn.Module:
        config_class = transformers.CONFIG_MAPPING[name]
        config = config_class(**TINY)
        return MODEL_FOR_CAUSAL_LM_MAPPING[config_class](config)

    generator = torch.Generator().manual_seed(0)
    flags = dict(output_hidden_states=True, use_cache=False)
    batches = [dict(input_ids=torch.randint(3, 60, (2, 8), generator=generator), **flags) for _ in range(3)]
    return make, batches


def of_timm(name):
    """A random model of timm, and three micro-batches."""
    timm = _timm()

    def make():
        return timm.create_model(name, num_classes=5, pretrained=False)

    size = timm.get_pretrained_cfg(name).input_size if timm.get_pretrained_cfg(name) else (3, 64, 64)
    generator = torch.Generator().manual_seed(0)
    return make, [{"x": torch.randn(2, *size, generator=generator).double()} for _ in range(3)]


def _timm():
    vision.find()
    import timm

    return timm


FAMILIES = {"transformers": of_transformers, "timm": of_timm}


def every(family):
    """All names of a family."""
    if family == "timm":
        return [name for name in _timm().list_models() if not name.endswith(("_so400m", "_giant"))]
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def main(family, *names):
    """Compare and print; how many were equal, different and passed over."""
    names = every(family) if names == ("all",) else names or SOME[family]
    tally = Counter()
    for name in names:
        try:
            outcome = compare(*FAMILIES[family](name))
        except CannotRunError as error:
            tally["passed over"] += 1
            print(f"{name:32} passed over: {str(error).splitlines()[0][:90]}", flush=True)
        except Exception as error:
            tally["different"] += 1
            print(f"{name:32} ERROR {type(error).__name__}: {error}"[:300], flush=True)
        else:
            tally["equal" if outcome.good else "different"] += 1
            what = "" if outcome.good else "  DIFFERENT" if outcome.unchanged else "  THE MODULE CHANGED"
            count = f"{outcome.parameters:>10,}"
            print(f"{name:32}{count}  {outcome.difference:.0e}  {outcome.seconds:6.1f} s{what}", flush=True)
    print(dict(tally))
    return tally


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:])["different"])
