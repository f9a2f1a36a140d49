"""A Llama-shaped model in PEFT: stock and ours from the same bases, on identical data.

    python benchmarks/peft_llama.py                        hidden 1024, 8 layers, 50 steps
    python benchmarks/peft_llama.py --kind very_sparse --out benchmarks/results/peft-llama-NAME
    python benchmarks/peft_llama.py --added --kind dense --targets q_proj,v_proj --alpha 64 \
        --layers 2 --batch 8 --tokens 512 --steps 12
    python benchmarks/peft_llama.py --tiny                 seconds, to see that it runs

Both models take each step in turn, so that drift of the machine hits both; times are medians.
It fails if the losses differ by more than 1e-4. Memory is measured in processes of their own,
frozen model included: the peak over everything, and that of the training steps.

The learning rate is that of PEFT's own example (examples/randlora_finetuning, with alpha 640). At
1e-3 the loss first rises and the training amplifies what float32 rounds, until losses diverge.

--added also steps the frozen model in turn with both, each down to the gradient of the embeddings,
and prints what the adapter adds to it, ours over stock's. Memory is not measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import peft
import record
import torch
import torch.nn.functional as F
from memory import MIB, status
from transformers import LlamaConfig, LlamaForCausalLM

import randlora_ext.peft

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
TOLERANCE = 1e-4  # of the loss


def build(backend: str, args: argparse.Namespace) -> torch.nn.Module:
    """The same weights, bases and zero adapter whichever backend ("frozen": no adapter)."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden * 11 // 4,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": max(1, args.hidden // 128),
        "vocab_size": 2048,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape))
    if backend == "frozen":
        return model.requires_grad_(False)
    randlora_ext.peft.enable() if backend == "ours" else randlora_ext.peft.disable()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save")
        config = peft.RandLoraConfig(
            r=args.rank,
            randlora_alpha=args.alpha,
            target_modules=args.targets.split(","),
            save_projection=False,
            task_type="CAUSAL_LM",
            **({} if args.kind == "dense" else {args.kind: True}),
        )
    return peft.get_peft_model(model, config)


def batches(args: argparse.Namespace) -> list[torch.Tensor]:
    """A few batches that come again and again, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    shape = (args.batch, args.tokens)
    return [torch.randint(0, 2048, shape, generator=generator) for _ in range(5)]


def optimizer_of(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer | None:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=args.lr) if trained else None


def step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, tokens: torch.Tensor
) -> float:
    # As transformers' own loss, which rounds to float32.
    logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
    if optimizer:
        optimizer.zero_grad()
    loss.backward()
    if optimizer:
        optimizer.step()
    return loss.item()


def bytes_of_bases(model: torch.nn.Module) -> int:
    """Bytes of every tensor that holds bases: dense ones, or planes and lists."""
    tensors = []
    for bases in (model.base_model.randlora_A, model.base_model.randlora_B):
        for basis in bases.values():
            content = getattr(basis, "content", basis)  # a description has no bytes
            tensors += [content] if isinstance(content, torch.Tensor) else []
    for layer in model.modules():
        if hasattr(layer, "basis_of"):
            device = next(layer.parameters()).device
            tensors += layer.basis_of("default", device).packed(device)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t is not None
    }
    return sum(storages.values())


def compare(args: argparse.Namespace) -> dict:
    """Losses, median step times and bytes of the bases of both."""
    backends = ["stock", "ours"]
    models = {backend: build(backend, args) for backend in backends}
    if args.added:
        models["frozen"] = build("frozen", args)
        for model in models.values():
            model.get_input_embeddings().register_forward_hook(lambda m, i, y: y.requires_grad_())
    optimizers = {backend: optimizer_of(model, args) for backend, model in models.items()}
    data = batches(args)
    losses: dict[str, list] = {backend: [] for backend in models}
    times: dict[str, list] = {backend: [] for backend in models}
    for i in range(args.steps):
        for backend, model in models.items():
            start = time.perf_counter()
            losses[backend].append(step(model, optimizers[backend], data[i % len(data)]))
            times[backend].append(time.perf_counter() - start)
    warm = min(3, args.steps - 1)
    differences = torch.tensor([losses[b] for b in backends], dtype=torch.float64).diff(dim=0)
    medians = {b: 1e3 * statistics.median(t[warm:]) for b, t in times.items()}
    added = {b: ms - medians.get("frozen", 0) for b, ms in medians.items()}
    return {
        "added, ours over stock": added["ours"] / added["stock"] if args.added else None,
        "kernels": randlora_ext.peft.kernel_summary(models["ours"]),
        "losses": losses,
        "largest difference of the losses": {"ours": differences.abs().max().item()},
        "step ms": medians,
        "bytes of the bases": {b: bytes_of_bases(models[b]) for b in backends},
    }


def memory(backend: str, args: argparse.Namespace) -> dict:
    """Peak MiB of building the model, and of three steps."""
    model = build(backend, args)
    built = status("VmHWM") / MIB
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    if backend == "frozen":
        with torch.no_grad():
            for tokens in batches(args)[:3]:
                model(input_ids=tokens)
    else:
        optimizer = optimizer_of(model, args)
        for tokens in batches(args)[:3]:
            step(model, optimizer, tokens)
    return {"building": built, "training": status("VmHWM") / MIB}


def print_table(result: dict) -> None:
    print("\n| | stock PEFT | ours | stock / ours |\n|---|---|---|---|")
    rows = {
        "step, ms": result["step ms"],
        "bases, MiB": {b: n / MIB for b, n in result["bytes of the bases"].items()},
    }
    for phase in ("building", "training"):
        values = {b: result["peak MiB"][b][phase] for b in ("stock", "ours")}
        rows[f"peak while {phase}, MiB"] = values
    for name, values in rows.items():
        ratio = values["stock"] / max(values["ours"], 1e-9)
        print(f"| {name} | {values['stock']:.1f} | {values['ours']:.1f} | {ratio:.2f} |")
    frozen = result["peak MiB"]["frozen"]
    print(f"\nfrozen model: {frozen['building']:.0f} MiB built, {frozen['training']:.0f} run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--alpha", type=int, default=640)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of one row")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--kind", choices=["sparse", "very_sparse", "dense"], default="sparse")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--added", action="store_true", help="what the adapters add to a step")
    parser.add_argument("--out", type=Path, help="writes OUT.json")
    parser.add_argument("--tiny", action="store_true", help="hidden 128, 2 layers, 5 steps")
    parser.add_argument("--memory", choices=["stock", "ours", "frozen"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.hidden = 1024
    if args.tiny:
        args.hidden, args.layers, args.tokens, args.steps = 128, 2, 16, 5
    if args.memory:
        print(json.dumps(memory(args.memory, args)))
        return
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--memory"]
    result = {
        "machine": record.machine(),
        "settings": {key: str(value) for key, value in vars(args).items() if key != "memory"},
        # First, so that nothing else is held.
        "peak MiB": {
            backend: json.loads(subprocess.check_output([*command, backend], text=True))
            for backend in ([] if args.added else ("frozen", "stock", "ours"))
        },
        **compare(args),
    }
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(result["kernels"])
    if args.added:
        print({b: f"{ms:.0f} ms" for b, ms in result["step ms"].items()})
        ratio = result["added, ours over stock"]
        print(f"the adapter adds {ratio:.2f} times what stock's adds")
    else:
        print_table(result)
    first, last = result["losses"]["ours"][0], result["losses"]["ours"][-1]
    print(f"loss {first:.4f} -> {last:.4f}")
    difference = result["largest difference of the losses"]["ours"]
    print(f"ours differs from stock by {difference:.1e} at most")
    if not difference <= TOLERANCE:  # true for NaN, too
        raise SystemExit(f"that is not within {TOLERANCE}")


if __name__ == "__main__":
    main()
