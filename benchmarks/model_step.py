"""A training step of a SmolLM2-135M-shaped model with every linear layer adapted.

    python benchmarks/model_step.py                        about three minutes on 2 cores
    python benchmarks/model_step.py --out FILE.json

LoRA, PEFT's RandLoRA and ours, each a PEFT model with the same random weights in a process of its
own for the peak of memory, and side by side in one process for the time (steps in turn, medians).
A step is forward, loss, backward and AdamW.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import randlora_ext.peft
from randlora_ext.cli.measure import machine
from randlora_ext.peft import RandLoraConfig

RANK = 32
METHODS = ("lora", "ours very_sparse", "ours 0.07", "ours 1/3", "peft very_sparse")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def smollm2_shaped() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def adapted(method: str) -> torch.nn.Module:
    """The model in PEFT, by `method` of METHODS; "peft" is stock's own code."""
    who, _, density = method.partition(" ")
    common = {"r": RANK, "target_modules": LINEAR}
    if who == "lora":
        return get_peft_model(smollm2_shaped(), LoraConfig(**common))
    (randlora_ext.peft.disable if who == "peft" else randlora_ext.peft.enable)()
    common |= {"save_projection": False, "randlora_alpha": 20 * RANK}
    if density == "very_sparse":
        config = RandLoraConfig(very_sparse=True, **common)
    else:
        config = RandLoraConfig(density={"0.07": 0.07, "1/3": 1 / 3}[density], **common)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(smollm2_shaped(), config)


def stepper(method: str, batch: int, tokens: int):
    model = adapted(method)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, 49152, (batch, tokens), generator=torch.Generator().manual_seed(1))

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, sum(p.numel() for p in trained)


def peak_alone(method: str, args) -> float:
    """MiB at the peak of three steps in a process of its own."""
    command = [sys.executable, __file__, "--alone", method, "--batch", str(args.batch)]
    out = subprocess.run([*command, "--tokens", str(args.tokens)], check=True, capture_output=True)
    return float(out.stdout.decode().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--alone", metavar="METHOD", help="print the peak of memory of one method")
    parser.add_argument("--out", type=Path, help="write FILE as JSON")
    args = parser.parse_args()
    if args.alone:
        step, _ = stepper(args.alone, args.batch, args.tokens)
        for _ in range(3):
            step()
        # Not ru_maxrss: it would start from the memory of the process that made this one.
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
        return

    methods = args.methods.split(",")
    steps = {method: stepper(method, args.batch, args.tokens) for method in methods}
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
            "peak_mib": peak_alone(method, args),
        }
        rows.append(row)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items()), flush=True)  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
