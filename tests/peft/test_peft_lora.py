"""PEFT's own conversion of our layers to LoRA: of full rank it is dW, else the nearest."""

import functools
import json

import pytest
import torch
from cli_helpers import KINDS, gpt2, llama
from peft_helpers import (
    Deep,
    accelerated,
    adapted,
    config,
    layers,
    made,
    opened,
    peft,
    randomize,
    relative,
    shake,
)
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import randlora_ext

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of fan_in_fan_out and tied weights
TOKENS = torch.arange(12).view(2, 6)


def changes(model):
    """The product of the matrices of each LoRA layer, or dW."""
    found = []
    for module in model.modules():
        if isinstance(module, (peft.tuners.lora.LoraLayer, peft.tuners.randlora.RandLoraLayer)):
            found.append(module.get_delta_weight("default").detach())
    return found


def converted(model, folder, rank, base):
    peft.save_as_lora(folder, model, rank=rank)
    loaded = opened(folder, base)
    assert isinstance(loaded.base_model, peft.tuners.lora.LoraModel)
    return loaded.eval()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_full_rank_nothing_is_lost(tmp_path, kind, dtype, x):
    def base():
        return Deep().to(dtype)

    model = adapted(base(), "abc", 5, **kind)
    lora = converted(model, tmp_path, 24, base)
    for product, delta in zip(changes(lora), changes(model), strict=True):
        assert product.dtype == delta.dtype == torch.float32
        assert relative(product, delta) < 2e-6  # PEFT decomposes in float32
    with torch.no_grad():
        y, want = lora(x.to(dtype)), model(x.to(dtype))
    assert relative(y, want) < (5e-6 if dtype == torch.float32 else 0.02)


def test_the_scale_of_the_inputs_is_in_it(tmp_path, x):
    accelerated.enable()
    chosen = config(5, accelerated.RandLoraConfig, basis="hadamard")
    model = peft.get_peft_model(Deep(), chosen)
    randlora_ext.calibrate(model, [x * torch.where(torch.arange(24) < 2, 30.0, 1.0)])
    bare = made(basis="hadamard")
    lora = converted(randomize(model), tmp_path, 24, Deep)
    for layer, product, delta in zip(layers(model), changes(lora), changes(bare), strict=True):
        want = delta * layer.input_scales["default"]
        assert relative(product, want) < 2e-6 < 0.05 < relative(delta, want)
    with torch.no_grad():
        assert relative(lora(x), model(x)) < 5e-6


@pytest.mark.parametrize("rank", [3, 0.9])
def test_a_lower_rank_is_the_truncated_svd(tmp_path, rank, x):
    """`rank` below 1 is the energy that each layer keeps; vLLM takes no such file."""
    model = made(basis="hadamard", r=8)
    lora = converted(model, tmp_path, rank, Deep)
    ranks = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    for name, product, delta in zip("abc", changes(lora), changes(model), strict=True):
        U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
        kept = S.square().cumsum(0) / S.square().sum()
        r = ranks.get(name, rank)
        assert (r == 3) if rank == 3 else (kept[r - 1] >= 0.9 > kept[r - 2])
        assert relative(product, U[:, :r] @ S[:r].diag() @ Vh[:r]) < 1e-5


def test_the_energy_that_a_rank_keeps():
    """As docs/serve.md computes it: ||B||^2, since the rows of A are orthonormal."""
    model = made(basis="hadamard", r=8)
    _, lora = peft.convert_to_lora(model, rank=8)
    kept = sum(t.square().sum() for name, t in lora.items() if "lora_B" in name)
    squares = [torch.linalg.svdvals(delta.double()).square() for delta in changes(model)]
    want = sum(s[:8].sum() for s in squares) / sum(s.sum() for s in squares)
    whole = sum(delta.square().sum() for delta in changes(model))
    assert float(kept / whole) == pytest.approx(float(want), rel=1e-5)


def test_conv1d(tmp_path):
    """Of which some are square, and the head, which is tied to the embedding, is no Conv1D."""
    base = gpt2(tmp_path / "base")
    load = type(base).from_pretrained
    options = {"basis": "hadamard", "fan_in_fan_out": True}
    model = adapted(base, ["c_attn", "c_proj"], 5, **options).eval()
    lora = converted(model, tmp_path / "lora", 32, lambda: load(tmp_path / "base"))
    assert {type(m.get_base_layer()) for m in layers(model)} == {Conv1D}
    assert relative(lora(TOKENS).logits, model(TOKENS).logits) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": r".*\.1\..*(v|down)_proj"},
    ],
    ids=["tied head", "modules_to_save", "regular expression"],
)
def test_targets(tmp_path, options):
    def base():
        return llama(tie_word_embeddings="lm_head" in options["target_modules"])

    accelerated.enable()
    chosen = accelerated.RandLoraConfig(r=5, basis="hadamard", **options)
    model = randomize(peft.get_peft_model(base(), chosen)).eval()
    shake(model)
    lora = converted(model, tmp_path, 16, base)
    with torch.no_grad():
        assert relative(model(TOKENS).logits, base()(TOKENS).logits) > 0.01
        for product, delta in zip(changes(lora), changes(model), strict=True):
            U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
            assert relative(product, U[:, :16] @ S[:16].diag() @ Vh[:16]) < 1e-5
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("lm_head.weight" in key for key in saved) == ("modules_to_save" in options)


def test_over_quantized_bases(tmp_path):
    """Of dW alone: the converted adapter stands over the same quantized base."""
    bnb = pytest.importorskip("bitsandbytes")
    eight = functools.partial(bnb.nn.Linear8bitLt, has_fp16_weights=False)
    for kind in (bnb.nn.Linear4bit, eight):

        def base(kind=kind):
            torch.manual_seed(0)
            net = nn.Sequential(kind(64, 96))
            net.load_state_dict(nn.Sequential(nn.Linear(64, 96)).state_dict())
            return net.to("cpu")  # quantizes

        model = adapted(base(), "0", 8, basis="hadamard").eval()
        lora = converted(model, tmp_path, 64, base)
        assert relative(*(changes(each)[0] for each in (lora, model))) < 2e-6
        x = torch.randn(3, 64)
        with torch.no_grad():  # bitsandbytes keeps its state in 16 bits
            assert relative(lora(x), model(x)) < 0.01 < 0.1 < relative(base()(x), model(x))


def test_what_peft_refuses(tmp_path):
    for options, told in (({"bias": "all"}, "bias=all"), ({}, "rank 25 is larger")):
        with pytest.raises(ValueError, match=told):
            peft.save_as_lora(tmp_path, made(sparse=True, **options), rank=25)
    assert not list(tmp_path.iterdir())
