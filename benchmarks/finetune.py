"""Does it learn as well, and what does it forget? RandLoRA beside LoRA, SHiRA, MiSS, full tuning.

    python benchmarks/finetune.py --methods lora,"randlora hadamard" --rates 3e-4,5e-4 --seeds 3
    python benchmarks/finetune.py --methods "randlora hadamard" --gamma constant,signs
    python benchmarks/finetune.py --parity 100      ours and stock PEFT, loss by loss

The task is that of examples/spelling.py: English spelling to phonemes, SmolLM2-135M. Every method
is trained with every rate, scaling, model, start of gamma and seed. Each run is written to
OUT.jsonl as it ends: a stopped benchmark continues where it was. The table has a row per setting,
means over seeds.

Forgetting is how much the loss on English text (Python's own documentation, 1,024 tokens) rises.
The effective rank of dW is exp of the entropy of its squared singular values, in layers 3 and 15.
The ranks of the other methods give them as many parameters as RandLoRA with r = 32. Limits: few
steps, one small model, one task; differences below the spread over seeds mean nothing.
"""

import argparse
import copy
import json
import statistics
import sys
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # spelling.py

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
RANK, SCALING = 32, 20.0
JUMP = 0.5  # a rise of the training loss over the mean of the five steps before
METHODS = ["lora", "rslora", "shira", "miss", "full"]
RANDLORA = ["hadamard", "1/3", "0.07", "very_sparse", "dense", "1/8"]
MODELS = ["fp32", "bf16"]
GAMMAS = ["constant", "signs"]  # how gamma starts; signs are random ones of the constant's size
MEASURED = 3, 15  # layers whose effective rank is told
ANSWERED = 32  # held-out words whose phonemes are counted
KEY = "method", "lr", "seed", "steps", "scaling", "model", "gamma"


def adapted(base, method: str, seed: int, scaling: float = SCALING, gamma: str = "constant"):
    """The model, in which only the method's parameters require gradients."""
    import peft

    import randlora_ext.peft

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
    stock, bases = method.startswith("peft"), method.split()[-1]
    randlora_ext.peft.disable() if stock else randlora_ext.peft.enable()
    config = peft.RandLoraConfig if stock else randlora_ext.peft.RandLoraConfig
    kinds = {
        "hadamard": {"basis": "hadamard"},
        "1/3": {"sparse": True},
        "very_sparse": {"very_sparse": True},
        "dense": {},
    }
    kind = kinds[bases] if bases in kinds else {"density": float(Fraction(bases))}
    common |= {"r": RANK, "randlora_alpha": scaling * RANK, "projection_prng_key": seed}
    tuned = peft.get_peft_model(base, config(save_projection=False, **kind, **common))
    if gamma == "signs":
        give_signs(tuned, seed)
    return tuned


def give_signs(tuned, seed: int) -> None:
    """Multiplies every gamma by random signs."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, gamma in tuned.named_parameters():
        if "randlora_gamma" in name:
            signs = 2 * torch.randint(2, gamma.shape, generator=generator) - 1
            gamma.detach().mul_(signs)


def effective_ranks(base, tuned) -> dict[str, list[float]]:
    """By kind of layer, the effective rank of dW in the layers MEASURED."""
    import spelling
    import torch

    def by_path(model) -> dict:  # without what PEFT puts before the path
        return {name.removeprefix("base_model.model."): m for name, m in model.named_modules()}

    def outputs(layer):
        layer = copy.deepcopy(layer).float()
        with torch.no_grad():
            return layer(torch.eye(layer.in_features))

    before, after = by_path(base), by_path(tuned)

    def changed(path: str):
        return torch.linalg.svdvals(outputs(after[path]) - outputs(before[path]))

    return {
        kind: [
            round(spelling.effective_rank(changed(path)), 1)
            for path in before
            if path.endswith(kind) and any(f".layers.{i}." in path for i in MEASURED)
        ]
        for kind in TARGETS
    }


@cache
def loaded(dtype: str) -> tuple:
    """The tokenizer, the model, and its loss on English text."""
    import spelling
    import torch

    tokenizer, model = spelling.load_model()
    model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    return tokenizer, model, text_loss(model, tokenizer)


def text_loss(model, tokenizer, rows: int = 2, columns: int = 512) -> float:
    """Mean loss per token of English text that the task does not train: Python's own manual."""
    from pydoc_data.topics import topics

    import torch

    model.eval()
    tokens = tokenizer("\n".join(topics.values())[: 8 * rows * columns])["input_ids"]
    block = torch.tensor(tokens[: rows * columns]).view(rows, columns)
    with torch.no_grad():
        return sum(model(row[None], labels=row[None]).loss.item() for row in block) / rows


def run_one(
    method: str,
    lr: float,
    seed: int,
    steps: int,
    scaling: float = SCALING,
    model: str = "fp32",
    gamma: str = "constant",
    answers: bool = False,
    nudge: bool = False,
) -> dict:
    """One training run: what it learned, what it forgot and what it cost.

    With `nudge`, gamma of the first layer starts larger by a millionth.
    """
    import spelling
    import torch

    torch.manual_seed(seed)
    training, held_out = spelling.read_words()
    tokenizer, base, loss_before = loaded(model)
    tuned = adapted(copy.deepcopy(base), method, seed, scaling, gamma)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    if nudge:
        with torch.no_grad():
            next(p for name, p in tuned.named_parameters() if "randlora_gamma" in name).mul_(
                1 + 1e-6
            )
    batches = spelling.plan_batches(training, steps, 16, seed)
    parameters = sum(p.numel() for p in trained)
    result = dict(zip(KEY, (method, lr, seed, steps, scaling, model, gamma), strict=True))
    result |= {"parameters": parameters}
    try:
        losses, seconds = zip(*spelling.train(tuned, tokenizer, batches, lr), strict=True)
    except FloatingPointError as error:  # a rate that diverges is a result
        return {**result, "held_out_loss": float("inf"), "failed": str(error)}
    result |= {
        "train_loss": [round(loss, 4) for loss in losses],
        "seconds_per_step": statistics.median(seconds),
        "held_out_loss": spelling.held_out_loss(tuned, tokenizer, held_out),
        "forgetting": text_loss(tuned, tokenizer) - loss_before,
        "effective_rank": effective_ranks(base, tuned),
    }
    if answers:
        asked = held_out[:ANSWERED]
        given = spelling.answers(tuned, tokenizer, asked)
        result["phoneme_error_rate"] = spelling.phoneme_error_rate(asked, given)
    return result


def sweep(settings: list[dict], out: Path) -> list[dict]:
    """A row per setting, in their order; those that OUT has are not run again."""
    lines = out.read_text().splitlines() if out.exists() else []
    rows = ({"gamma": "constant"} | json.loads(line) for line in lines)
    done = {tuple(row[k] for k in KEY): row for row in rows}
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
    """Markdown, one row per setting: means over seeds, each seed's loss, effective ranks of dW."""
    lines = [
        "| method | scaling | model | gamma | lr | held-out loss (seeds) | jumps | forgetting | "
        + " | ".join(TARGETS)
        + " |",
        "|" + "---|" * (8 + len(TARGETS)),
    ]

    def setting(row: dict) -> tuple:
        return row["method"], row["scaling"], row["model"], row["gamma"], row["lr"]

    for these in dict.fromkeys(map(setting, rows)):
        mine = [row for row in rows if setting(row) == these]
        losses = [row["held_out_loss"] for row in mine]
        forgot = [row.get("forgetting", float("inf")) for row in mine]
        jumped = sum(jumps(row.get("train_loss", [])) for row in mine)
        method, scaling, model, gamma, lr = these
        ranks = [row["effective_rank"] for row in mine if "effective_rank" in row]
        told = (
            round(statistics.fmean(sum((r[kind] for r in ranks), []))) if ranks else ""
            for kind in TARGETS
        )
        lines.append(
            f"| {method} | {scaling:g} | {model} | {gamma} | {lr:g} | "
            f"{statistics.fmean(losses):.3f} ({', '.join(f'{loss:.3f}' for loss in losses)}) | "
            f"{jumped} of {len(mine)} | {statistics.fmean(forgot):.2f} | "
            f"{' | '.join(map(str, told))} |"
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
        "--methods", type=of(str), default=["lora", "randlora hadamard"], help=f"{everything} ..."
    )
    parser.add_argument("--rates", type=of(float), default=[5e-4], help="learning rates")
    parser.add_argument("--scalings", type=of(float), default=[SCALING], help="RandLoRA's alpha/r")
    parser.add_argument("--model", type=of(str), default=["fp32"], help=f"of {MODELS}")
    parser.add_argument("--gamma", type=of(str), default=["constant"], help=f"of {GAMMAS}")
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
        dict(zip(KEY, (method, lr, seed, args.steps, scaling, model, gamma), strict=True))
        for seed, method, scaling, model, gamma, lr in product(
            range(args.seeds), args.methods, args.scalings, args.model, args.gamma, args.rates
        )
    ]
    print(table(sweep(settings, args.out.with_suffix(".jsonl"))))


if __name__ == "__main__":
    main()
