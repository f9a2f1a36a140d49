"""TRL's trainers on our layers: SFT, DPO, KTO, GRPO, RLOO, with a new adapter or a trained one."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from language_models import llama
from peft_helpers import accelerated, adapted, config, layers, opened, randomize, runs_on_kernels

import randlora_ext

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = ["<pad>", "<eos>", "<unk>", *(f"word{i}" for i in range(40))]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def tokenizer():
    """Words by their number; nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def text(*numbers):
    return " ".join(f"word{n % 40}" for n in numbers)


PAIRS = [
    {"prompt": text(i, i + 1), "chosen": " " + text(i + 2, i + 3), "rejected": " " + text(7 * i)}
    for i in range(4)
]
DATA = {
    "SFT": [{"text": text(*range(i, i + 5))} for i in range(4)],
    "DPO": PAIRS,
    "KTO": [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for row in PAIRS
        for key in ("chosen", "rejected")
    ],
    "GRPO": [{"prompt": row["prompt"]} for row in PAIRS],
}
DATA["RLOO"] = DATA["GRPO"]
ONLINE = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
OPTIONS = {"SFT": {"max_length": 8}, "DPO": {}, "KTO": {}, "GRPO": ONLINE, "RLOO": ONLINE}
ABOUT = {"randlora_alpha": 8, "task_type": "CAUSAL_LM"}


def randlora():
    return config(4, accelerated.RandLoraConfig, TARGETS, sparse=True, **ABOUT)


def base():
    return llama(vocab_size=43)


def trained(model):
    """A model whose adapter changes what it says."""
    return randomize(adapted(model, TARGETS, 4, **ABOUT, sparse=True), size=30)


def calibrated(model):
    """A model with a trained adapter on Hadamard bases whose inputs are scaled."""
    model = adapted(model, TARGETS, 4, **ABOUT, basis="hadamard", projection_prng_key=1)
    randlora_ext.calibrate(randomize(model, size=0), [{"input_ids": torch.arange(4, 40)[None]}])
    return randomize(model, size=0.1)


def trainer(method, model, folder, settings=(), data=None, words=None, **options):
    about = {"output_dir": str(folder), "save_strategy": "no", "report_to": [],
             "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3,
             "per_device_train_batch_size": 2, "gradient_checkpointing": False,
             "use_cpu": True, "bf16": False, "disable_tqdm": True}  # fmt: skip
    about |= OPTIONS[method] | dict(settings)
    rows = datasets.Dataset.from_list(data or DATA[method])
    if OPTIONS[method] is ONLINE:
        options["reward_funcs"] = lambda completions, **_: [float(len(c)) for c in completions]
    return getattr(trl, f"{method}Trainer")(
        model=model,
        args=getattr(trl, f"{method}Config")(**about),
        train_dataset=rows,
        eval_dataset=rows if "eval_strategy" in about else None,
        processing_class=words or tokenizer(),
        **options,
    )


def numbers(model, adapter="default"):
    return {
        name.removesuffix(f".{adapter}"): p.detach().clone()
        for name, p in model.named_parameters()
        if re.search(rf"randlora_(lambda|gamma)\.{adapter}$", name)
    }


def logged(run, key):
    return [entry[key] for entry in run.state.log_history if key in entry]


def is_new(model, adapter):
    lambdas = [value for name, value in numbers(model, adapter).items() if "lambda" in name]
    return len(lambdas) > 0 and not any(value.any() for value in lambdas)


@pytest.mark.parametrize(
    "method, fresh", [("SFT", False), ("DPO", True), ("DPO", False), ("KTO", True), ("GRPO", False)]
)
def test_trainers_run(method, fresh, tmp_path):
    """With a new adapter, and with one that is trained and saved."""
    accelerated.enable()
    if fresh:
        run = trainer(method, base(), tmp_path, peft_config=randlora())
    else:
        trained(base()).save_pretrained(tmp_path)
        run = trainer(method, opened(tmp_path, base, is_trainable=True), tmp_path)
    model = run.model
    assert len(layers(model)) == 6 and runs_on_kernels(model)
    before, reference = numbers(model), numbers(model, "ref")
    if fresh or method == "SFT":
        assert not reference
    else:
        assert before.keys() == reference.keys()
        assert all(torch.equal(before[name], reference[name]) for name in before)
    run.train()
    losses = logged(run, "loss")
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    after = numbers(model)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("lambda" in name for name in moved)  # gamma has no gradient while lambda is 0
    assert all(torch.equal(reference[n], p) for n, p in numbers(model, "ref").items())
    if method == "DPO":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    if method == "GRPO":
        assert logged(run, "kl")[0] == pytest.approx(0, abs=1e-6)


def kept(method, folder, options, budget, **rest):
    """A training by which more is forgotten than the budget of `KEPT` allows."""
    accelerated.enable()
    about = ABOUT | {"randlora_alpha": 80, "basis": "hadamard"}
    chosen = config(4, accelerated.RandLoraConfig, TARGETS, **about)
    model = llama(vocab_size=43, initializer_range=0.1)
    options |= {"learning_rate": 1e-2}
    run = trainer(method, model, folder, options, peft_config=chosen, **rest)
    run.add_callback(randlora_ext.ForgettingBudget(run, max_rise=KEPT, **budget))
    run.train()
    return run


KEPT = 1e-3


@pytest.mark.parametrize("method", ["SFT", "DPO", "KTO", "GRPO"])
def test_trainers_keep_a_budget(method, tmp_path, caplog):
    """They calibrate, which DPO's first loss shows to leave the reference as it is; only GRPO's
    batches are texts. They log what is forgotten, and keep the budget."""
    run = kept(method, tmp_path, {"eval_strategy": "steps", "eval_steps": 1}, {})
    found = [layer.is_calibrated("default") for layer in layers(run.model)]
    assert found == [method != "GRPO"] * 6
    assert ("no mappings of the model's arguments, but list" in caplog.text) == (method == "GRPO")
    if method == "DPO":
        assert logged(run, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    rises = logged(run, "eval_forgetting")
    assert len(rises) == 5 and rises[2] > KEPT >= rises[-1]
    assert rises[-1] == randlora_ext.forgetting(run.model).nats
    assert logged(run, "dial") and len(logged(run, "eval_loss")) == 4


CHATS = [
    {
        "messages": [
            {"role": "user", "content": text(i, i + 1)},
            {"role": "assistant", "content": text(*range(i, i + 4))},
        ]
    }
    for i in range(6)
]
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@pytest.mark.parametrize("packing", [False, True])
def test_a_budget_on_the_answers_of_a_chat_model(packing, tmp_path, caplog):
    words = tokenizer()
    words.chat_template = TEMPLATE
    prompts = [words(text(i, 2 * i))["input_ids"] for i in range(3)]
    options = {"packing": packing, "max_length": 16}
    run = kept("SFT", tmp_path, options, {"prompts": prompts}, data=CHATS, words=words)
    assert all(layer.is_calibrated("default") for layer in layers(run.model))
    over, within = logged(run, "eval_forgetting")
    assert over > KEPT >= within == randlora_ext.forgetting(run.model, prompts=prompts).nats
    assert not [each for each in caplog.records if each.name.startswith("randlora_ext")]


@pytest.mark.parametrize("method", ["DPO", "KTO", "GRPO", "RLOO"])
def test_the_reference_of_a_calibrated_adapter_is_a_copy(method, tmp_path):
    accelerated.enable()
    model = calibrated(base())
    want = model.eval()(torch.arange(4, 30)[None]).logits
    model.save_pretrained(tmp_path)
    run = trainer(method, opened(tmp_path, base, is_trainable=True), tmp_path)
    for layer in layers(run.model):
        own = dict(layer.named_parameters()) | dict(layer.named_buffers())
        adapter = [name for name in own if name.endswith(".default")]
        assert len(adapter) == 3 and layer.is_calibrated("ref")
        for name in adapter:
            assert torch.equal(own[name], own[name.removesuffix("default") + "ref"])
    with torch.no_grad():
        run.model.set_adapter("ref")
        assert torch.equal(run.model.eval()(torch.arange(4, 30)[None]).logits, want)
    if method == "DPO":
        run.model.set_adapter("default")
        run.train()
        assert logged(run, "loss")[0] == pytest.approx(math.log(2), abs=1e-4)


def test_other_added_adapters_stay_as_new(monkeypatch):
    model = trained(base())
    config = model.peft_config["default"]
    model.add_adapter("other", config)
    model.add_adapter("ref", randlora())  # not TRL: a configuration of its own
    assert is_new(model, "other") and is_new(model, "ref")
    model.delete_adapter("ref")
    monkeypatch.delitem(sys.modules, "trl")
    model.add_adapter("ref", config)
    assert is_new(model, "ref")


PAGE = Path(__file__).parents[2] / "docs" / "train.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="there are no docs beside these tests")
def test_the_page_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (source,) = [block for block in blocks if "trl.SFTTrainer" in block]
    name = "HuggingFaceTB/SmolLM2-135M"
    assert name in source
    base().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_list(DATA["SFT"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    of_trl = trl.SFTConfig
    small = {"max_steps": 2, "logging_steps": 1, "use_cpu": True, "bf16": False, "report_to": []}
    monkeypatch.setattr(trl, "SFTConfig", lambda *args, **own: of_trl(*args, **own | small))
    namespace = {}
    exec(source.replace(name, str(tmp_path / "model")), namespace)
    assert len(logged(namespace["trainer"], "loss")) == 2
    config = json.loads((tmp_path / "tuned" / "adapter_config.json").read_text())
    assert config["randlora_alpha"] / config["r"] == 20
