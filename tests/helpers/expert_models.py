"""Tiny mixture models of transformers with random weights, and what of them is adapted."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 32, "num_experts_per_tok": 2,
}  # fmt: skip
LATENT = {
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8},
    # Stores (experts, in, out); down_proj is square.
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "DeepseekV3": {"moe_intermediate_size": 24, "n_routed_experts": 4, **LATENT},
}
# Stores (experts, in, out) and does not say so; its experts have one implementation of their own.
LLAMA_4 = {
    "intermediate_size": 16, "intermediate_size_mlp": 32, "num_experts_per_tok": 1,
    "num_local_experts": 4, "head_dim": 8, "interleave_moe_layer_step": 1,
}  # fmt: skip
FAMILIES = [*MODELS, "Llama4"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def make(name, **options):
    torch.manual_seed(0)
    if name == "Llama4":
        config = transformers.Llama4TextConfig(**SIZES | LLAMA_4 | options)
    else:
        config = getattr(transformers, f"{name}Config")(**SIZES | MODELS[name] | options)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def batch():
    tokens = torch.randint(1, 50, (2, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


def with_scales(model, own=True):
    """The model, whose layers of experts have random input scales: one each, or one for all."""
    generator = torch.Generator().manual_seed(2)
    for layer in model.modules():
        if hasattr(layer, "set_input_scale") and layer.experts:
            sizes = *(layer.experts if own else ()), layer.in_features
            scale = torch.rand(sizes, generator=generator) + 0.5
            layer.set_input_scale("default", scale)
    return model


def train(model, steps=20):
    """The losses of these steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.train()(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
