"""A training step of one block of fused experts, frozen, with PEFT's LoRA and with ours.

    python benchmarks/experts.py [--out benchmarks/results/experts-NAME] [--repeats 9] [--rank 32]
    python benchmarks/experts.py --vectors    do the experts' inputs have the same large features?

32 experts of which a token takes 4, 1024 to 512 features and back, 1,024 tokens; LoRA has as many
parameters. Times are medians of a step's processor time on one thread, which other programs disturb
less, by the frozen block's; the methods take turns. Peaks of memory are of a process for each
method, in stacks of W (both parameters) over the frozen block's.
"""

import argparse
import statistics
import time
from pathlib import Path

import peft
import torch
from memory import MIB, free_unused, status
from record import in_a_process, show, write
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import randlora_ext.peft

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TOKENS, WIDTH = 1024, 1024
METHODS = ("frozen", "lora", "ours")


def block(method: str, dtype: torch.dtype, rank: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "moe_intermediate_size": 512, "num_experts": 32}
    config = Qwen3MoeConfig(**sizes, num_experts_per_tok=4)
    config._experts_implementation = "grouped_mm"
    base = nn.ModuleDict({"block": Qwen3MoeSparseMoeBlock(config)}).to(dtype)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.03).requires_grad_(False)
    if method == "frozen":
        return base["block"]
    common = {"target_modules": [], "target_parameters": EXPERTS}
    if method == "ours":
        randlora_ext.peft.enable()
        common |= {"basis": "hadamard", "randlora_alpha": 20 * rank}
        chosen = randlora_ext.peft.RandLoraConfig(r=rank, **common)
    else:
        wanted = count(block("ours", dtype, rank))
        each = 32 * (WIDTH + 1024 + WIDTH + 512)
        chosen = peft.LoraConfig(r=round(wanted / each), **common)
    model = peft.get_peft_model(base, chosen)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=1e-3)
    return model.base_model.model["block"]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def step(layer: nn.Module, x: torch.Tensor) -> None:
    for leaf in (x, *layer.parameters()):
        leaf.grad = None
    layer(x).square().sum().backward()


def inputs(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(1, TOKENS, WIDTH, dtype=dtype, requires_grad=True)


def times(dtype: torch.dtype, rank: int, repeats: int) -> dict:
    torch.set_num_threads(1)
    blocks, x = {method: block(method, dtype, rank) for method in METHODS}, inputs(dtype)
    spent: dict[str, list[float]] = {method: [] for method in METHODS}
    for repeat in range(repeats + 1):
        for method, layer in blocks.items():
            step(layer, x)  # warms the caches
            start = time.process_time()
            step(layer, x)
            if repeat:
                spent[method].append(time.process_time() - start)
    medians = {method: statistics.median(each) for method, each in spent.items()}
    row = {f"{method} parameters": count(blocks[method]) for method in METHODS[1:]}
    row |= {"frozen ms": medians["frozen"] * 1e3}
    return row | {m: medians[m] / medians["frozen"] for m in METHODS[1:]}


def peak(method: str, dtype: torch.dtype, rank: int) -> float:
    """MiB over what the block and x take."""
    layer, x = block(method, dtype, rank), inputs(dtype)
    step(layer, x)
    free_unused()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(layer, x)
    return (status("VmHWM") - before) / MIB


def vectors() -> None:
    """The correlation between the experts' vectors of `calibrate`, in a tiny random model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "moe_intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    experts = {"num_experts": 8, "num_experts_per_tok": 2}
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=50, **sizes, **heads, **experts))
    for parameter in base.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    randlora_ext.peft.enable()
    chosen = {"basis": "hadamard", "target_modules": [], "target_parameters": EXPERTS}
    model = peft.get_peft_model(base, randlora_ext.peft.RandLoraConfig(r=8, **chosen))
    randlora_ext.calibrate(model, [torch.randint(50, (32, 64))])
    for name, layer in model.named_modules():
        if getattr(layer, "experts", ()) and hasattr(layer, "randlora_input_scale"):
            between = torch.corrcoef(layer.randlora_input_scale["default"].log())
            others = between[~torch.eye(len(between), dtype=torch.bool)]
            print(f"{name.split('layers.')[1]:60} {others.mean():6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--vectors", action="store_true")
    options = parser.parse_args()
    if options.vectors:
        return vectors()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        row = {"dtype": str(dtype).removeprefix("torch.")}
        row |= in_a_process(times, dtype, options.rank, options.repeats)
        stack = 32 * (1024 * WIDTH + 512 * WIDTH) * dtype.itemsize / MIB
        peaks = {m: in_a_process(peak, m, dtype, options.rank) for m in METHODS}
        row |= {f"{m} memory": (peaks[m] - peaks["frozen"]) / stack for m in METHODS[1:]}
        show(row, header=not rows)
        rows.append(row)
    if options.out:
        write(options.out, rows, rank=options.rank, load=open("/proc/loadavg").read().split()[0])


if __name__ == "__main__":
    main()
