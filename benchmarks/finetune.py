"""Does it learn as well? LoRA, RandLoRA at several densities, PEFT's RandLoRA and full fine-tuning.

    python benchmarks/finetune.py --out benchmarks/results/finetune      about an hour, 2 cores
    python benchmarks/finetune.py --methods all --out ...               and more densities
    python benchmarks/finetune.py --parity 100      ours and stock PEFT, loss by loss

The task is spelling.py's: English spelling to phonemes, SmolLM2-135M. Every method trains at each
of its learning rates with one seed; the rate with the lowest held-out loss is repeated with the
other seeds. Every run has its own process, so that its peak memory is its own, and is written to
OUT.jsonl as it ends: a stopped benchmark continues where it was.

LoRA's rank gives it as many parameters as RandLoRA with r = 32. Limits: few steps, one small model,
one task; differences below the spread over seeds mean nothing.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
RANK, LORA_RANK = 32, 7  # 1.03 and 1.09 million parameters
METHODS = {
    "lora": [5e-4, 2e-3, 5e-3, 1e-2],
    "randlora 1/3": [5e-4, 1e-3, 2e-3],
    "randlora 0.07": [5e-4, 1e-3, 2e-3],
    "randlora very_sparse": [5e-4, 1e-3, 2e-3],
    "peft randlora dense": [5e-4, 1e-3, 2e-3],
    "full": [5e-5, 1e-4, 3e-4],
}
MORE = {  # rates from what the first showed
    "randlora block:1/8": [3e-4, 5e-4, 1e-3],
    "randlora block:1/16": [3e-4, 5e-4, 1e-3],
    "randlora 1/8": [1e-3, 2e-3],
    "randlora 1/16": [1e-3, 2e-3],
}
RATES = METHODS | MORE
ANSWERED = 32  # held-out words whose phonemes are counted


def adapted(base, method: str, seed: int):
    """The model, in which only the method's parameters require gradients."""
    import peft

    import randlora_ext.peft

    if method == "full":
        return base.requires_grad_(True)
    common = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if method == "lora":
        return peft.get_peft_model(base, peft.LoraConfig(r=LORA_RANK, lora_alpha=16, **common))
    stock, density = method.startswith("peft"), method.split()[-1]
    randlora_ext.peft.disable() if stock else randlora_ext.peft.enable()
    config = peft.RandLoraConfig if stock else randlora_ext.peft.RandLoraConfig
    kinds = {"1/3": {"sparse": True}, "very_sparse": {"very_sparse": True}, "dense": {}}
    common |= {"r": RANK, "randlora_alpha": 20 * RANK, "projection_prng_key": seed}
    if density.startswith("block:"):
        common |= {"basis": "block"}
    number = density.removeprefix("block:")
    kind = kinds[density] if density in kinds else {"density": float(Fraction(number))}
    return peft.get_peft_model(base, config(save_projection=False, **kind, **common))


def run_one(
    method: str, lr: float, seed: int, steps: int, answers: bool = True, nudge: bool = False
) -> dict:
    """One training run: what it learned and what it cost.

    With `nudge`, gamma of the first layer starts larger by a millionth.
    """
    import spelling
    import torch

    torch.manual_seed(seed)
    training, held_out = spelling.read_words()
    tokenizer, base = spelling.load_model()
    tuned = adapted(base, method, seed)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    if nudge:
        with torch.no_grad():
            next(p for name, p in tuned.named_parameters() if "randlora_gamma" in name).mul_(
                1 + 1e-6
            )
    batches = spelling.plan_batches(training, steps, 16, seed)
    parameters = sum(p.numel() for p in trained)
    result = {"method": method, "lr": lr, "seed": seed, "steps": steps, "parameters": parameters}
    try:
        losses, seconds = spelling.train(tuned, tokenizer, batches, lr)
    except FloatingPointError as error:  # a rate that diverges is a result
        return {**result, "held_out_loss": float("inf"), "failed": str(error)}
    result |= {
        "train_loss": losses,
        "seconds_per_step": statistics.median(seconds),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "held_out_loss": spelling.held_out_loss(tuned, tokenizer, held_out),
        "saved_bytes": 4 * parameters,  # lambda and gamma, or A and B, or all weights, in fp32
    }
    if answers:
        asked = held_out[:ANSWERED]
        result["phoneme_error_rate"] = spelling.phoneme_error_rate(tuned, tokenizer, asked)
    return result


def in_a_process(method: str, lr: float, seed: int, steps: int) -> dict:
    command = [sys.executable, __file__, "--one", method, str(lr), str(seed), str(steps)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def sweep(methods: list[str], steps: int, seeds: int, out: Path) -> list[dict]:
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    def run(method: str, lr: float, seed: int) -> dict:
        for row in done:
            if (row["method"], row["lr"], row["seed"], row["steps"]) == (method, lr, seed, steps):
                return row
        print(f"{method}, lr {lr:g}, seed {seed} ...", flush=True)
        row = in_a_process(method, lr, seed, steps)
        done.append(row)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    best = {}
    for method in methods:
        first = [run(method, lr, 0) for lr in RATES[method]]
        best[method] = min(first, key=lambda row: row["held_out_loss"])["lr"]
    for seed in range(1, seeds):  # seeds outermost: a stopped run has them for all methods
        for method in methods:
            run(method, best[method], seed)
    return [r for r in done if r["steps"] == steps and r["lr"] == best.get(r["method"])]


def table(rows: list[dict]) -> str:
    """Markdown, one row per method: mean and range over seeds at its best learning rate."""
    head = (
        "| method | lr | parameters | held-out loss | phoneme errors | s/step | peak memory | "
        "saved |\n|---|---|---|---|---|---|---|---|\n"
    )
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]

        def mean(key: str, mine=mine) -> float:
            return statistics.fmean(row[key] for row in mine)

        losses = [row["held_out_loss"] for row in mine]
        lines.append(
            f"| {method} | {mine[0]['lr']:g} | {mine[0]['parameters']:,} | "
            f"{mean('held_out_loss'):.3f} ({min(losses):.3f}-{max(losses):.3f}, "
            f"{len(mine)} seeds) | {mean('phoneme_error_rate'):.0%} | "
            f"{mean('seconds_per_step'):.2f} | {mean('peak_bytes') / 2**30:.2f} GiB | "
            f"{mean('saved_bytes') / 1e6:.1f} MB |"
        )
    return head + "\n".join(lines) + "\n"


def parity(steps: int, lr: float) -> None:
    """Compare ours with stock PEFT from the same bases, seed and data.

    The control compares stock PEFT with itself after a nudge: what training makes of rounding.
    """

    def curve(method: str, nudge: bool = False) -> list[float]:
        return run_one(method, lr, 0, steps, answers=False, nudge=nudge)["train_loss"]

    def apart(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) for x, y in zip(a, b, strict=True))

    stock = curve("peft randlora 1/3")
    worst, control = (
        apart(stock, c) for c in (curve("randlora 1/3"), curve("peft randlora 1/3", True))
    )
    print(
        f"largest difference of the loss over {steps} steps at lr {lr:g}: {worst:.2e} (limit 1e-4)"
    )
    print(f"stock PEFT with gamma of one layer off by 1e-6, beside itself: {control:.2e}")
    if not worst <= 1e-4:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS), help=f"all, or of {[*RATES]}")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("finetune"), help="write OUT.jsonl")
    parser.add_argument("--parity", type=int, metavar="STEPS")
    parser.add_argument("--lr", type=float, default=3e-4, help="of --parity")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        method, lr, seed, steps = args.one
        print(json.dumps(run_one(method, float(lr), int(seed), int(steps))))
        return
    if args.parity:
        parity(args.parity, args.lr)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    methods = [*RATES] if args.methods == "all" else args.methods.split(",")
    rows = sweep(methods, args.steps, args.seeds, args.out.with_suffix(".jsonl"))
    print(table(rows))


if __name__ == "__main__":
    main()
