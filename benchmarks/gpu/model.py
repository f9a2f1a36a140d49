"""A model of the shape of Llama-3.2-3B, random weights, bf16: training tokens per second.

q_proj and v_proj adapted, everything else frozen; a step is forward, backward, AdamW. All methods
stand on one base model and take turns.
"""

import functools
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

from randlora_ext import RandLoraLinear

from .card import Card
from .stage import DENSITIES, RANK, SCALING, Stage, density_of

TARGETS = ("q_proj", "v_proj")


def base_model(card: Card) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                 num_attention_heads=24, num_key_value_heads=8, head_dim=128)  # fmt: skip
    if card.dry:
        shape = dict(vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=3, num_key_value_heads=1, head_dim=16)  # fmt: skip
    config = LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=4096)
    config.use_cache = False
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with card.device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).train()


class Adapters:
    """The modules that a method puts in the place of the targeted ones."""

    def __init__(self, model: nn.Module, make: Callable[[nn.Module], None]) -> None:
        """`make` wraps the targets of `model` in place; the originals are put back."""
        before = targets(model)
        make(model)
        self.modules = targets(model)
        self.parameters = list(
            {id(p): p for m in self.modules.values() for p in m.parameters() if p.requires_grad}
            .values()
        )  # fmt: skip
        for p in self.parameters:
            p.requires_grad_(True)
        self.optimizer = (
            torch.optim.AdamW(self.parameters, lr=1e-4, fused=self.parameters[0].is_cuda)
            if self.parameters else None
        )  # fmt: skip
        install(model, before)


def targets(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if n.endswith(TARGETS)}


def install(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def by_peft(kind: str, options: dict, low: bool, model: nn.Module, device: torch.device) -> None:
    """PEFT's modules in `model`; `low` casts adapters and bases to bf16, which PEFT does not."""
    import peft  # here, for what it cannot do must not cost the other rows

    config = getattr(peft, kind)(**options, target_modules=list(TARGETS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, config, autocast_adapter_dtype=not low)
    for module in targets(model).values():
        module.to(device, torch.bfloat16) if low else module.to(device)
    del model.peft_config


def by_us(density: float, rank: int, model: nn.Module) -> None:
    wrapped = {
        name: RandLoraLinear(module, r=rank, randlora_alpha=SCALING * rank, density=density)
        for name, module in targets(model).items()
    }
    for layer in wrapped.values():
        for lam in layer.randlora_lambda.values():
            nn.init.normal_(lam, std=1e-2)  # away from zero, where all would be trivial
    install(model, wrapped)


def all_adapters(stage: Stage, card: Card, model: nn.Module) -> dict[str, Adapters]:
    rank = 8 if card.dry else RANK
    hidden = model.config.hidden_size

    def peft_way(kind: str, low: bool, **options) -> Callable[[nn.Module], None]:
        return lambda model: by_peft(kind, {"r": rank, **options}, low, model, card.device)

    lora = functools.partial(peft_way, "LoraConfig", lora_alpha=rank)
    randlora = functools.partial(peft_way, "RandLoraConfig", randlora_alpha=SCALING * rank,
                                 sparse=True, save_projection=False)  # fmt: skip
    ways: dict[str, Callable[[nn.Module], None]] = {
        "frozen": lambda model: None,
        f"LoRA r={rank}, fp32 adapter": lora(low=False),
        f"LoRA r={rank}, bf16 adapter": lora(low=True),
    }
    for density in reversed(DENSITIES):
        ways[f"ours, {density}"] = functools.partial(by_us, density_of(density, hidden), rank)
    ways["PEFT RandLoRA as shipped"] = randlora(low=False)
    ways["PEFT RandLoRA in bf16"] = randlora(low=True)
    made = {}
    for name, make in ways.items():
        before = targets(model)
        try:
            made[name] = Adapters(model, make)
        except Exception as error:
            install(model, before)
            stage.failed(name, error)
    return made


def step(model: nn.Module, adapters: Adapters, ids: torch.Tensor) -> torch.Tensor:
    # A gradient reaches the first layer's input in every method, also in the frozen one.
    inputs = model.get_input_embeddings()(ids).requires_grad_()
    loss = model(inputs_embeds=inputs, labels=ids).loss
    loss.backward()
    if adapters.optimizer is not None:
        adapters.optimizer.step()
        adapters.optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def timed(card: Card, model: nn.Module, adapters: Adapters, ids: torch.Tensor, steps: int) -> float:
    """Seconds of a step, launches included."""
    card.sync()
    start = time.perf_counter()
    for _ in range(steps):
        step(model, adapters, ids)
    card.sync()
    return (time.perf_counter() - start) / steps


def main() -> None:
    stage = Stage(__doc__)
    card = Card(stage.dry)
    torch.manual_seed(0)
    model = base_model(card)
    batch, length = (2, 8) if stage.dry else (4, 1024)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=card.device)
    methods = all_adapters(stage, card, model)
    rows: dict[str, dict] = {}
    for name, adapters in methods.items():
        install(model, adapters.modules)
        try:
            loss = step(model, adapters, ids)
            peak = card.peak_bytes(lambda a=adapters: step(model, a, ids))
        except Exception as error:
            stage.failed(name, error)
            card.free()
            continue
        size = sum(p.numel() * p.element_size() for p in adapters.parameters)
        rows[name] = {"loss": float(loss), "peak_bytes": peak, "adapter_bytes": size, "times": []}
    rounds = 0
    while rounds < 5 and (rounds < 2 or stage.left() > 10):
        for name, row in rows.items():
            if rounds >= 2 and stage.left() < 3:
                continue
            install(model, methods[name].modules)
            row["times"].append(timed(card, model, methods[name], ids, 1 if stage.dry else 3))
        rounds += 1
    tokens = ids.numel()
    lora = min((statistics.median(r["times"]) for n, r in rows.items() if "LoRA r=" in n),
               default=None)  # fmt: skip
    for name, row in rows.items():
        seconds = statistics.median(row.pop("times"))
        over = {} if lora is None else {"over_lora": lora / seconds}  # the faster of the two
        stage.row(method=name, tokens=tokens, step_ms=seconds * 1e3,
                  tokens_per_s=tokens / seconds, **over, **row)  # fmt: skip


if __name__ == "__main__":
    main()
