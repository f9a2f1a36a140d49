"""Bytes and communication of LoRA, PEFT's RandLoRA and ours for a Llama-shaped model.

    python -m randlora_ext.distributed.budget
    python -m randlora_ext.distributed.budget --gpus 4 --tokens 8192 --rank 32 --hidden 4096 ...

Computed, not measured: from the shapes, by the rules of methods.py, which tests/test_budget.py
compares with models that exist.
"""

import argparse
from functools import partial

from .methods import HALF, SINGLE, TRAINED, Layer, Lora, Ours, Peft, Setting


def llama(args: argparse.Namespace) -> Setting:
    hidden, kv, inner = args.hidden, args.kv, args.intermediate
    layers = (
        Layer("q_proj", hidden, hidden, True),
        Layer("k_proj", hidden, kv, True),
        Layer("v_proj", hidden, kv, True),
        Layer("o_proj", hidden, hidden, False),
        Layer("gate_proj", hidden, inner, True),
        Layer("up_proj", hidden, inner, True),
        Layer("down_proj", inner, hidden, False),
    )
    others = 2 * args.vocabulary * hidden + (2 * args.blocks + 1) * hidden
    return Setting(layers, args.blocks, others, args.gpus, args.tokens, hidden)


# ---- the tables ------------------------------------------------------------------------------


def bytes_text(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}" if size else "0"
        size /= 1000
    return f"{size:,.3g} TB"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(setting: Setting, methods: list) -> str:
    gpus, base = setting.gpus, setting.weights
    activations = HALF * setting.tokens * setting.hidden
    memory, cut_memory, sent = [], [], []
    tensor_parallel_base = setting.blocks * setting.all_reduce(4 * activations)
    for method in methods:
        parameters = setting.total(method.parameters)
        kept = setting.total(partial(method.kept, setting=setting))
        memory.append(
            [
                method.name,
                f"{parameters / 1e6:,.0f} M",
                bytes_text(TRAINED * parameters / gpus),
                bytes_text(method.bases(setting, cut=False)),
                bytes_text(kept),
                bytes_text(method.saved(setting)),
            ]
        )
        # FSDP2 gathers the adapter for forward and for backward, and scatters its gradient.
        sharded = setting.gather(SINGLE * 3 * parameters)
        alike = setting.all_reduce(SINGLE * parameters)
        buffers = method.bases(setting, cut=False) if isinstance(method, Peft) else 0
        line = [method.name, bytes_text(alike), bytes_text(buffers), bytes_text(sharded)]
        if method.tensor_parallel:
            mine = setting.total(partial(method.parameters_of_a_rank, gpus=gpus))
            cut_memory.append(
                [
                    method.name,
                    bytes_text(TRAINED * mine),
                    bytes_text(method.bases(setting, cut=True)),
                    bytes_text(method.dense_b(setting) if isinstance(method, Ours) else 0),
                ]
            )
            extra = setting.total(partial(method.extra_per_step, setting=setting))
            line += [f"{bytes_text(extra)} ({100 * extra / tensor_parallel_base:.1f}%)"]
        else:
            line += ["not supported"]
        sent.append(line)
    heads = [
        ["FSDP2, bytes on a GPU", "trained", "adapter, gradient, Adam", "bases"]
        + ["kept for backward beside x", "checkpoint"],
        ["tensor parallel, bytes on a GPU", "adapter, gradient, Adam", "bases"]
        + ["dense B, where B is a GEMM"],
        ["sent by a GPU in a step", "DDP: gradients", "DDP: buffers", "FSDP2: adapter"]
        + ["tensor parallel: adapter (share of the base's)"],
    ]
    gathered = setting.gather(2 * HALF * base)
    intro = (
        f"{base / 1e9:.1f} G parameters in bfloat16 on {gpus} GPUs "
        f"({bytes_text(HALF * base / gpus)} each), {setting.tokens} tokens a step (tensor "
        "parallel) or a step and GPU (else).\n"
        f"The base layers alone send {bytes_text(gathered)} under FSDP2 and "
        f"{bytes_text(tensor_parallel_base)} under tensor parallelism in a step and GPU."
    )
    tables = [
        table(head, rows) for head, rows in zip(heads, (memory, cut_memory, sent), strict=True)
    ]
    return "\n\n".join([intro, *tables])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m randlora_ext.distributed.budget", description=__doc__.split("\n")[0]
    )
    for name, default, meaning in (
        ("gpus", 8, "number of GPUs"),
        ("tokens", 4096, "tokens of a step (tensor parallel), of a step and GPU (else)"),
        ("rank", 64, "r of RandLoRA"),
        ("lora-rank", 32, "r of LoRA"),
        ("hidden", 8192, "the model's width"),
        ("intermediate", 28672, "width inside the MLP"),
        ("kv", 1024, "outputs of k_proj and v_proj"),
        ("blocks", 80, "transformer blocks"),
        ("vocabulary", 128256, "tokens known"),
    ):
        made.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")
    return made


def methods(args: argparse.Namespace) -> list:
    sparse = 1 / args.hidden**0.5
    q = max(1, args.rank // 8)
    return [
        Lora(args.lora_rank),
        Peft(args.rank),
        Ours(args.rank, 1 / 3, "density 1/3"),
        Ours(args.rank, 0.07, "density 0.07"),
        Ours(args.rank, sparse, f"very_sparse ({sparse:.4f})"),
        Ours(args.rank, q / args.rank, f"balanced {q}/{args.rank}", "balanced"),
    ]


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    print(report(llama(args), methods(args)))


if __name__ == "__main__":
    main()
