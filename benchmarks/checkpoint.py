"""How large an adapter's file is, by PEFT's own state dict of a model on the meta device.

python benchmarks/checkpoint.py            Llama-3.2-3B, q_proj and v_proj, r = 32
"""

import argparse
import warnings
from collections.abc import Callable

import peft
import torch
from model_step import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM

import randlora_ext.peft


def saved_bytes(shape: dict, make_config: Callable[..., peft.PeftConfig], **options) -> int:
    """Bytes of all entries of the state dict: a file has a copy for every key."""
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**shape))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save")
        config = make_config(target_modules=["q_proj", "v_proj"], **options)
        model = peft.get_peft_model(base, config, low_cpu_mem_usage=True)
    state = peft.get_peft_model_state_dict(model)
    return sum(value.numel() * value.element_size() for value in state.values())


def sizes(rank: int = 32, shape: dict = SHAPES["llama-3.2-3b"]) -> dict[str, int]:
    """Bytes by method; PEFT's RandLoRA (0.21.2: a copy per layer) saves its bases, ours a seed."""
    randlora_ext.peft.disable()
    found = {
        "LoRA": saved_bytes(shape, peft.LoraConfig, r=rank),
        "RandLoRA in PEFT, as it saves by default": saved_bytes(shape, peft.RandLoraConfig, r=rank),
    }
    randlora_ext.peft.enable()
    options = {"r": rank, "density": 0.07, "basis": "independent", "save_projection": False}
    ours = saved_bytes(shape, randlora_ext.peft.RandLoraConfig, **options)
    randlora_ext.peft.disable()
    return found | {"RandLoRA here: λ, γ and a seed": ours}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for label, count in sizes().items():
        print(f"{count / 1e6:>10,.1f} MB  {label}")


if __name__ == "__main__":
    main()
