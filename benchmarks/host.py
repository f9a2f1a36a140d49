"""What Python costs: processor time of an eager step of tiny layers.

    python benchmarks/host.py                 the table of docs/benchmarks.md
    python benchmarks/host.py --compiled      a compiled step of a tiny Llama

A small step on a card waits for Python, and 16 layers of 64 x 64 on 8 tokens and one thread compute
almost nothing. Figures are microseconds a layer over the same step of frozen layers, forward and
backward, in process time; medians of turns, in which all methods follow one another.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from record import machine, show, write
from torch import nn

LAYERS, SIZE, TOKENS, RANK = 16, 64, 8, 8


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(LAYERS))).requires_grad_(False)


def adapted(model: nn.Module, method: str, targets: str) -> nn.Module:
    """`model` with adapters of that method on the layers that `targets` matches."""
    import peft

    import randlora_ext
    import randlora_ext.peft

    if method == "frozen":
        return model
    if method.startswith("layer"):
        for name, layer in [*model.named_children()]:
            model.set_submodule(name, randlora_ext.RandLoraLinear(layer, r=RANK))
        return model
    common = {"r": RANK, "target_modules": targets}
    randlora = common | {"randlora_alpha": 20 * RANK, "save_projection": False}
    randlora_ext.peft.disable() if method.startswith("stock") else randlora_ext.peft.enable()
    configs: dict[str, Callable] = {
        "lora": lambda: peft.LoraConfig(**common),
        "stock": lambda: peft.RandLoraConfig(**randlora),
        "stock sparse": lambda: peft.RandLoraConfig(sparse=True, **randlora),
        "default": lambda: randlora_ext.peft.RandLoraConfig(**randlora),
        "sparse": lambda: randlora_ext.peft.RandLoraConfig(sparse=True, **randlora),
        "hadamard": lambda: randlora_ext.peft.RandLoraConfig(basis="hadamard", **randlora),
    }
    return peft.get_peft_model(model, configs[method.removesuffix(" calibrated")]())


METHODS = (
    "frozen", "lora", "stock", "default", "stock sparse", "sparse", "hadamard",
    "hadamard calibrated", "layer", "layer calibrated",
)  # fmt: skip


def microseconds(steps: dict[str, Callable], turns: int, calls: int) -> dict[str, float]:
    """Median process time of each step; the steps take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(turns):
        for name, step in steps.items():
            begin = time.process_time()
            for _ in range(calls):
                step()
            times[name].append((time.process_time() - begin) / calls * 1e6)
    return {name: statistics.median(each) for name, each in times.items()}


def eager(turns: int) -> list[dict]:
    import randlora_ext

    x = torch.randn(TOKENS, SIZE, requires_grad=True)

    def step_of(method: str) -> Callable:
        model = adapted(stack(), method, r"\d+")
        if method.endswith("calibrated"):
            randlora_ext.calibrate(model, [x.detach()])

        def step() -> None:
            model(x).sum().backward()

        return step

    times = microseconds({method: step_of(method) for method in METHODS}, turns, 10)
    frozen = times.pop("frozen")
    return [{"step": name, "us a layer": (t - frozen) / LAYERS} for name, t in times.items()]


# ---- compiled ------------------------------------------------------------------------------------


def compiled(turns: int) -> list[dict]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes, **heads)).requires_grad_(False)
    tokens = torch.randint(128, (1, TOKENS))
    counts, breaks = {}, {}

    def step_of(method: str) -> Callable:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = adapted(copy.deepcopy(base), method, ".*(proj)")
        run = torch.compile(model)

        def step() -> None:
            run(input_ids=tokens, labels=tokens).loss.backward()

        step()
        breaks[method] = sum(torch._dynamo.utils.counters["graph_break"].values())
        counts[method] = sum(hasattr(m, "base_layer") for m in model.modules())
        return step

    times = {}
    for method in ("lora", "hadamard", "sparse", "default"):
        step = step_of(method)
        times[method] = microseconds({method: step}, turns, 10)[method]
    return [
        {"compiled step": m, "us": t, "layers": counts[m], "graph breaks": breaks[m]}
        for m, t in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiled", action="store_true", help="a tiny Llama under torch.compile")
    parser.add_argument("--turns", type=int, default=41)
    parser.add_argument("--out", type=Path, help="write FILE.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    measure = compiled if args.compiled else eager
    print(machine()["cpu"])
    rows = measure(args.turns)
    for i, row in enumerate(rows):
        show(row, header=i == 0)
    if args.out:
        write(args.out, rows)


if __name__ == "__main__":
    main()
