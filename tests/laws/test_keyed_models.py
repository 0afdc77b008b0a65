"""Law 13 for models of other libraries, unchanged, in training mode."""

import functools

import pytest
import torch
import torch.nn.functional as F
import transformers

import gradacc
from gradacc import random
from tests import vision
from tests.helpers import assert_trees_close, some_slow

N = 8
STEPS = [1, 2, 3, 8]
IDS = torch.arange(N * 6).view(N, 6) * 7 % 47 + 3
KEYS = random.split(random.key(2), N)
IMAGES = torch.arange(N * 3 * 64, dtype=torch.float64).view(N, 3, 8, 8).sin()
TOKENS = dict(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def gpt2(attention):
    sizes = dict(n_embd=16, n_layer=2, n_head=4, n_positions=16)  # dropout of 0.1 in three places
    config = transformers.GPT2Config(**TOKENS, **sizes, attn_implementation=attention)
    return transformers.GPT2LMHeadModel(config)


def bert(attention):
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.BertConfig(**TOKENS, **sizes, max_position_embeddings=16, attn_implementation=attention)
    return transformers.BertForMaskedLM(config)


def vit():
    from timm.models.vision_transformer import VisionTransformer

    drops = dict(drop_path_rate=0.4, drop_rate=0.1, attn_drop_rate=0.1, proj_drop_rate=0.1)
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=4, num_classes=5, **drops)


def causal(model, batch):
    logits = model(input_ids=batch["x"], use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["x"][:, 1:].flatten())


def masked(model, batch):
    return F.cross_entropy(model(input_ids=batch["x"]).logits.flatten(0, 1), batch["x"].flatten())


def classes(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["x"][:, 0, 0, 0].gt(0).long())


TEXT = {("GPT-2", attention): (functools.partial(gpt2, attention), causal, IDS) for attention in ("sdpa", "eager")} | {
    ("BERT", attention): (functools.partial(bert, attention), masked, IDS) for attention in ("sdpa", "eager")
}


def check(make, loss, x, steps, checkpoints=False):
    torch.manual_seed(0)
    model, batch = make().double().train(), {"x": x, "keys": KEYS}
    with random.keyed(KEYS):
        value = loss(model, batch)
    value.backward()
    expected = {name: leaf.grad for name, leaf in model.named_parameters()}
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    apply, params, _ = gradacc.functional(model)

    def loss_fn(params, batch):
        with random.keyed(batch["keys"]):
            return loss(functools.partial(apply, params), batch)

    result = gradacc.accumulate_and_value(loss_fn, steps=steps)(params, batch)
    assert_trees_close(result, ({name: expected[name] for name in params}, value.detach()))
    with pytest.raises(AssertionError):  # the model draws
        assert_trees_close(loss(model.eval(), batch).detach(), value.detach())


CASES = [(name, steps, checkpoints) for name in TEXT for steps in STEPS for checkpoints in (False, True)]
FAST = [(("GPT-2", "sdpa"), 3, False), (("GPT-2", "sdpa"), 3, True), (("BERT", "eager"), 2, False)]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "steps", "checkpoints"), some_slow(CASES, *FAST), ids=str)
def test_language_models(name, steps, checkpoints):
    check(*TEXT[name], steps, checkpoints)


@pytest.mark.slow
@pytest.mark.skipif(not vision.has("timm"), reason="timm is not installed: `make test-slow` does it")
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("steps", STEPS)
def test_a_vision_transformer_with_stochastic_depth(steps, checkpoints):
    vision.find()

    def make():
        model = vit()
        model.gradient_checkpointing_enable = lambda **_: model.set_grad_checkpointing()
        return model

    check(make, classes, IMAGES, steps, checkpoints)
