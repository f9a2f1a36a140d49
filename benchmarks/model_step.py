"""A training step of a SmolLM2-135M-shaped model with every linear layer adapted.

    python benchmarks/model_step.py                        about eight minutes on 2 cores
    python benchmarks/model_step.py --out FILE

LoRA, PEFT's RandLoRA and ours, each a PEFT model with the same random weights in a process of its
own for the peak of memory, and side by side in one process for the time (steps in turn, medians).
A step is forward, loss, backward and AdamW.

glibc returns freed memory at the top of its heap to the system, so that some models fault all their
activations in again at every step and others do not, whatever the method. Here glibc keeps freed
memory, as jemalloc would.
"""

import argparse
import ctypes
import statistics
import time
import warnings
from fractions import Fraction
from pathlib import Path

import torch
from memory import MIB, status
from peft import LoraConfig, get_peft_model
from record import in_a_process, show, write
from transformers import LlamaConfig, LlamaForCausalLM

import randlora_ext.peft
from randlora_ext.peft import RandLoraConfig

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
RANK = 32
METHODS = ("lora", "ours hadamard", "ours 0.07", "ours 1/3", "peft very_sparse")
SHAPES = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llama-3.2-3b": {  # for a GPU: gpu/model.py
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "toy": {  # for tests
        "hidden_size": 128,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    },
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(method: str, shape: str, targets: list[str] = LINEAR) -> torch.nn.Module:
    """The model in PEFT, by `method` of METHODS; "peft" is stock's own code."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=True))
    who, _, density = method.partition(" ")
    common: dict = {"r": RANK, "target_modules": targets}
    if who == "lora":
        return get_peft_model(model, LoraConfig(**common))
    (randlora_ext.peft.disable if who == "peft" else randlora_ext.peft.enable)()
    common |= {"save_projection": False, "randlora_alpha": 20 * RANK}
    if density == "very_sparse":
        config = RandLoraConfig(very_sparse=True, **common)
    elif density == "hadamard":
        config = RandLoraConfig(basis="hadamard", **common)
    else:
        config = RandLoraConfig(density=float(Fraction(density)), **common)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


def stepper(method: str, shape: str, batch: int, tokens: int):
    model = adapted(method, shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(
        0, SHAPES[shape]["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(1)
    )

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, sum(p.numel() for p in trained)


def keep_freed_memory() -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)


def peak_mib(*arguments) -> float:
    """MiB at the peak of making the model and three steps, with all libraries."""
    step, _ = stepper(*arguments)
    for _ in range(3):
        step()
    return status("VmHWM") / MIB


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--out", type=Path, help="write FILE.json")
    args = parser.parse_args(arguments)

    keep_freed_memory()
    methods, size = args.methods.split(","), (args.shape, args.batch, args.tokens)
    steps = {method: stepper(method, *size) for method in methods}
    times: dict[str, list[float]] = {method: [] for method in methods}
    for repeat in range(args.repeats + 1):
        for method, (step, _) in steps.items():
            start = time.perf_counter()
            step()
            if repeat:
                times[method].append(time.perf_counter() - start)
    rows = []
    for method in methods:
        seconds = statistics.median(times[method])
        row = {
            "method": method,
            "trained": steps[method][1],
            "seconds": seconds,
            "over_first": seconds / statistics.median(times[methods[0]]),
            "peak_mib": in_a_process(peak_mib, method, *size),
        }
        show(row, header=not rows)
        rows.append(row)
    if args.out:
        write(args.out, rows, shape=args.shape, batch=args.batch, tokens=args.tokens)


if __name__ == "__main__":
    main()
