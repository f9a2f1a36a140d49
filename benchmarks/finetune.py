"""Does it learn as well, and what does it forget? RandLoRA beside LoRA, SHiRA, MiSS, full tuning.

    python benchmarks/finetune.py --methods lora,"randlora block:1/8" --rates 3e-4,5e-4 --seeds 3
    python benchmarks/finetune.py --methods "randlora block:1/8" --model bf16,bf16:nearest
    python benchmarks/finetune.py --parity 100      ours and stock PEFT, loss by loss

The task is spelling.py's: English spelling to phonemes, SmolLM2-135M. Every method is trained with
every rate, scaling, model and seed. Each run is written to OUT.jsonl as it ends: a stopped
benchmark continues where it was. The table has a row per setting, with the mean over seeds.

Forgetting is how much the loss on English text (Python's own documentation, 1,024 tokens) rises.
The ranks of the other methods give them as many parameters as RandLoRA with r = 32. Limits: few
steps, one small model, one task; differences below the spread over seeds mean nothing.
"""

import argparse
import copy
import json
import os
import statistics
import sys
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
RANK, SCALING = 32, 20.0
JUMP = 0.5  # a rise of the training loss over the mean of the five steps before
METHODS = ["lora", "rslora", "shira", "miss", "full"]
RANDLORA = ["1/3", "0.07", "very_sparse", "dense", "1/8", "block:1/8"]
MODELS = ["fp32", "bf16", "bf16:nearest", "bf16:stochastic"]
ANSWERED = 32  # held-out words whose phonemes are counted
RANDOM_SIGNS, BANDS = 1000, 2000  # added to the seed: no cache has a basis of another kind for it
_hadamard_signs = None  # how the package makes them
KEY = "method", "lr", "seed", "steps", "scaling", "model"


def adapted(base, method: str, seed: int, scaling: float = SCALING, rounding: str | None = None):
    """The model, in which only the method's parameters require gradients."""
    import peft
    import torch

    import randlora_ext.peft
    from randlora_ext.basis.block import BlockMatrices

    global _hadamard_signs
    _hadamard_signs = _hadamard_signs or BlockMatrices._a_blocks
    if method == "full":
        return base.requires_grad_(True)
    common = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    # 1.09, 1.09, 1.09 and 1.04 million parameters; RandLoRA has 1.03
    others = {
        "lora": lambda: peft.LoraConfig(r=7, lora_alpha=16, **common),
        "rslora": lambda: peft.LoraConfig(r=7, lora_alpha=16, use_rslora=True, **common),
        "shira": lambda: peft.ShiraConfig(r=7, random_seed=seed, **common),
        "miss": lambda: peft.MissConfig(r=18, **common),
    }
    if method in others:
        return peft.get_peft_model(base, others[method]())
    with_random_signs = method.endswith(" random signs")
    if with_random_signs:  # in bf16 only, whose kernels take A's signs as they are
        method = method.removesuffix(" random signs")
        seed += RANDOM_SIGNS
    BlockMatrices._a_blocks = random_signs if with_random_signs else _hadamard_signs
    with_bands = method.endswith(" bands")
    if with_bands:
        method = method.removesuffix(" bands")
        seed += BANDS
    stock, density = method.startswith("peft"), method.split()[-1]
    randlora_ext.peft.disable() if stock else randlora_ext.peft.enable()
    config = peft.RandLoraConfig if stock else randlora_ext.peft.RandLoraConfig
    kinds = {"1/3": {"sparse": True}, "very_sparse": {"very_sparse": True}, "dense": {}}
    common |= {"r": RANK, "randlora_alpha": scaling * RANK, "projection_prng_key": seed}
    if rounding:
        common |= {"merged_rounding": rounding}
    if density.startswith("block:"):
        common |= {"basis": "block"}
    number = density.removeprefix("block:")
    kind = kinds[density] if density in kinds else {"density": float(Fraction(number))}
    tuned = peft.get_peft_model(base, config(save_projection=False, **kind, **common))
    if with_bands:
        for layer in tuned.modules():
            if hasattr(layer, "basis_of"):
                make_banded(layer.basis_of("default", torch.device("cpu"))[0])
    return tuned


def random_signs(matrices, shape, held, device):
    """Random signs for A of block bases, instead of Hadamard's times one sign per column."""
    import torch

    generator = torch.Generator().manual_seed(matrices.description.seed)
    size = shape.r, shape.d // held.groups
    return (2 * torch.randint(2, size, generator=generator, dtype=torch.int8) - 1).to(device)


def make_banded(basis, groups: int = 16, width: int = 2) -> None:
    """An alternative to blocks of 1/8: each of 16 groups has two neighboring chunks per side."""
    import torch

    from randlora_ext.basis.dense import DenseMatrices

    if basis.kind == "dense":  # layers of one shape share it
        return
    generator = torch.Generator().manual_seed(basis.seed)

    def banded(group: torch.Tensor, features: int) -> torch.Tensor:
        chunk = torch.arange(features) // (features // groups)
        held = (chunk - group[:, None]) % groups < width
        signs = 2 * torch.randint(2, held.shape, generator=generator) - 1
        return held * signs * (groups / width) ** 0.5

    A = banded(torch.arange(basis.r) // (basis.r // groups), basis.d)
    basis._source = DenseMatrices(A, banded(torch.arange(basis.K) % groups, basis.D).T.contiguous())


@cache
def loaded(dtype: str) -> tuple:
    """The tokenizer, the model, and its loss on English text."""
    import spelling
    import torch

    tokenizer, model = spelling.load_model()
    model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    return tokenizer, model, spelling.text_loss(model, tokenizer)


def run_one(
    method: str,
    lr: float,
    seed: int,
    steps: int,
    scaling: float = SCALING,
    model: str = "fp32",
    answers: bool = False,
    nudge: bool = False,
) -> dict:
    """One training run: what it learned, what it forgot and what it cost.

    With `nudge`, gamma of the first layer starts larger by a millionth.
    """
    import spelling
    import torch

    dtype, _, rounding = model.partition(":")
    # A rounding means the merged path, at any number of tokens; otherwise the exact one.
    os.environ["RANDLORA_PATH"] = "merged" if rounding else "auto"
    torch.manual_seed(seed)
    training, held_out = spelling.read_words()
    tokenizer, base, text_loss = loaded(dtype)
    tuned = adapted(copy.deepcopy(base), method, seed, scaling, rounding or None)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    if nudge:
        with torch.no_grad():
            next(p for name, p in tuned.named_parameters() if "randlora_gamma" in name).mul_(
                1 + 1e-6
            )
    batches = spelling.plan_batches(training, steps, 16, seed)
    parameters = sum(p.numel() for p in trained)
    result = dict(zip(KEY, (method, lr, seed, steps, scaling, model), strict=True))
    result |= {"parameters": parameters}
    try:
        losses, seconds = spelling.train(tuned, tokenizer, batches, lr)
    except FloatingPointError as error:  # a rate that diverges is a result
        return {**result, "held_out_loss": float("inf"), "failed": str(error)}
    result |= {
        "train_loss": [round(loss, 4) for loss in losses],
        "seconds_per_step": statistics.median(seconds),
        "held_out_loss": spelling.held_out_loss(tuned, tokenizer, held_out),
        "forgetting": spelling.text_loss(tuned, tokenizer) - text_loss,
    }
    if answers:
        asked = held_out[:ANSWERED]
        result["phoneme_error_rate"] = spelling.phoneme_error_rate(tuned, tokenizer, asked)
    return result


def sweep(settings: list[dict], out: Path) -> list[dict]:
    """A row per setting, in their order; those that OUT has are not run again."""
    lines = out.read_text().splitlines() if out.exists() else []
    done = {tuple(row[k] for k in KEY): row for row in map(json.loads, lines)}
    for setting in settings:
        key = tuple(setting[k] for k in KEY)
        if key in done:
            continue
        print(*key, "...", flush=True)
        done[key] = run_one(**setting)
        with out.open("a") as file:
            file.write(json.dumps(done[key]) + "\n")
    return [done[tuple(setting[k] for k in KEY)] for setting in settings]


def jumps(losses: list[float]) -> bool:
    return any(
        losses[i] > JUMP + statistics.fmean(losses[i - 5 : i]) for i in range(10, len(losses))
    )


def table(rows: list[dict]) -> str:
    """Markdown, one row per setting: the mean over seeds, and each seed's loss."""
    lines = [
        "| method | scaling | model | lr | held-out loss (seeds) | jumps | forgetting |",
        "|---|---|---|---|---|---|---|",
    ]

    def setting(row: dict) -> tuple:
        return row["method"], row["scaling"], row["model"], row["lr"]

    for these in dict.fromkeys(map(setting, rows)):
        mine = [row for row in rows if setting(row) == these]
        losses = [row["held_out_loss"] for row in mine]
        forgot = [row.get("forgetting", float("inf")) for row in mine]
        jumped = sum(jumps(row.get("train_loss", [])) for row in mine)
        method, scaling, model, lr = these
        lines.append(
            f"| {method} | {scaling:g} | {model} | {lr:g} | {statistics.fmean(losses):.3f} "
            f"({', '.join(f'{loss:.3f}' for loss in losses)}) | {jumped} of {len(mine)} | "
            f"{statistics.fmean(forgot):.2f} |"
        )
    return "\n".join(lines) + "\n"


def parity(steps: int, lr: float) -> None:
    """Compare ours with stock PEFT from the same bases, seed and data.

    The control compares stock PEFT with itself after a nudge: how far training amplifies rounding.
    """

    def curve(method: str, nudge: bool = False) -> list[float]:
        return run_one(method, lr, 0, steps, nudge=nudge)["train_loss"]

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

    def of(kind):
        return lambda text: [kind(value) for value in text.split(",")]

    everything = [*METHODS, *(f"randlora {d}" for d in RANDLORA), "peft randlora dense"]
    parser.add_argument(
        "--methods", type=of(str), default=["lora", "randlora block:1/8"], help=f"{everything} ..."
    )
    parser.add_argument("--rates", type=of(float), default=[5e-4], help="learning rates")
    parser.add_argument("--scalings", type=of(float), default=[SCALING], help="RandLoRA's alpha/r")
    parser.add_argument("--model", type=of(str), default=["fp32"], help=f"of {MODELS}")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("finetune"), help="write OUT.jsonl")
    parser.add_argument("--parity", type=int, metavar="STEPS")
    parser.add_argument("--lr", type=float, default=3e-4, help="of --parity")
    args = parser.parse_args()
    if args.parity:
        parity(args.parity, args.lr)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = [  # seeds outermost: a stopped benchmark has the first ones for every setting
        dict(zip(KEY, (method, lr, seed, args.steps, scaling, model), strict=True))
        for seed, method, scaling, model, lr in product(
            range(args.seeds), args.methods, args.scalings, args.model, args.rates
        )
    ]
    print(table(sweep(settings, args.out.with_suffix(".jsonl"))))


if __name__ == "__main__":
    main()
