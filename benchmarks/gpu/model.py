"""A model of the shape of Llama-3.2-3B, random bf16 weights: training tokens per second.

q_proj and v_proj are adapted through PEFT, the rest is frozen; an eager step is forward, backward
and AdamW, on 840 tokens as in PEFT's benchmark. step_ms: steps in a row. host_ms, device_ms: what
Python takes until the launches are out, and what the card takes for them (`Card.apart`). The
methods follow each other on one base model; the first is measured again, to show how far the card
drifts.
"""

import argparse
import warnings

import peft
import torch
from methods import SCALING, density_of
from model_step import SHAPES
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import randlora_ext.peft
from randlora_ext.peft import RandLoraConfig

from . import rows
from .card import Card
from .layers import DENSE, RANK

TARGETS = ["q_proj", "v_proj"]
METHODS = [
    "LoRA", "ours, hadamard", "frozen", "LoRA, again", "ours, dense", "PEFT's RandLoRA",
    "ours, 1/3",
]  # fmt: skip


def base_model(card: Card) -> nn.Module:
    shape = SHAPES["toy" if card.dry else "llama-3.2-3b"]
    config = LlamaConfig(**shape, tie_word_embeddings=True, use_cache=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with card.device:
            return LlamaForCausalLM(config).requires_grad_(False).train()
    finally:
        torch.set_default_dtype(before)


def adapted(base: nn.Module, method: str, rank: int) -> nn.Module:
    """`base` with the adapters of `method` in place; `unload` of the result takes them out."""
    name, _, bases = method.partition(", ")
    (randlora_ext.peft.enable if name == "ours" else randlora_ext.peft.disable)()
    common = {"r": rank, "target_modules": TARGETS}
    randlora = {"randlora_alpha": int(SCALING * rank), "save_projection": False, **common}
    if name == "LoRA":
        config = peft.LoraConfig(lora_alpha=rank, **common)
    elif name == "ours":
        drawn = bases not in (DENSE, "hadamard")
        density = density_of(bases, base.config.hidden_size) if drawn else None
        basis = bases if bases == "hadamard" else "peft"
        config = RandLoraConfig(basis=basis, density=density, **randlora)
    else:
        config = peft.RandLoraConfig(sparse=True, **randlora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
    return model.to(base.device)


def measure(card: Card, base: nn.Module, method: str, ids: torch.Tensor, rank: int) -> dict:
    model = base if method == "frozen" else adapted(base, method, rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained or [torch.zeros(1, device=base.device)], fused=True)
    loss = torch.empty(())

    def forward() -> None:
        nonlocal loss
        # A gradient reaches the first layer's input in every method, also in the frozen one.
        inputs = base.get_input_embeddings()(ids).requires_grad_()
        loss = model(inputs_embeds=inputs, labels=ids).loss

    def backward() -> None:
        loss.backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    phases = forward, backward, update

    def step() -> None:
        for phase in phases:
            phase()

    try:
        step()
        first, peak = float(loss.detach()), None
        if not card.dry:
            torch.cuda.reset_peak_memory_stats()
        ms = card.wall(step)
        if not card.dry:
            peak = torch.cuda.max_memory_allocated()
        host, device = card.apart(phases)
    finally:
        if model is not base:
            model.unload()
    size = sum(p.numel() * p.element_size() for p in trained)
    return {"tokens_per_s": ids.numel() / ms * 1e3, "step_ms": ms, "host_ms": host,
            "device_ms": device, "peak_bytes": peak, "adapter_bytes": size,
            "loss": first}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU")
    card = Card(parser.parse_args().dry)
    torch.manual_seed(0)
    base = base_model(card)
    batch, length = (2, 8) if card.dry else (4, 210)
    ids = torch.randint(0, base.config.vocab_size, (batch, length), device=card.device)
    for method in METHODS:
        if rows.seconds_left() < 15:
            rows.skipped(method)
            continue
        try:
            result = measure(card, base, method, ids, 8 if card.dry else RANK)
            rows.row(method=method, tokens=ids.numel(), **result)
        except Exception as error:
            rows.failed(method, error)
        card.free()


if __name__ == "__main__":
    main()
