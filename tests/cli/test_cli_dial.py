"""`randlora dial`: its numbers against the model's own, and the adapter that it writes."""

import json

import peft
import pytest
import torch
from cli_helpers import adapted, llama, refused, run
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<eos>", "<unk>", *(f"w{i}" for i in range(48))]
TEXT = " ".join(f"w{i * i % 48}" for i in range(30))
SET = {"--task": None, "--text": None, "--set": "0.7", "--out": "new"}
ROWS = [
    {"prompt": "w1 w2 w3", "completion": " w4 w5"},
    {"prompt": "w7", "completion": " w8 w9 w10 w11"},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dial")
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    base = llama(initializer_range=0.3)
    base.save_pretrained(folder / "model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    tokenizer.save_pretrained(folder / "model")
    adapted(base, ["q_proj", "down_proj"], 4, basis="hadamard").save_pretrained(folder / "adapter")
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "text.txt").write_text(TEXT)
    return folder


def opened(files):
    return peft.PeftModel.from_pretrained(llama(initializer_range=0.3), files / "adapter").eval()


@torch.no_grad()
def losses(model):
    """(of the completions and what ends them, of the text)"""
    total, count = 0.0, 0
    for row in ROWS:
        words = (row["prompt"] + row["completion"]).split()
        ids = torch.tensor([[*(WORDS.index(word) for word in words), 0]])
        log_p = model(ids).logits[0].log_softmax(-1)
        for at in range(len(row["prompt"].split()), ids.shape[1]):
            total, count = total - float(log_p[at - 1, ids[0, at]]), count + 1
    text = torch.tensor([[WORDS.index(word) for word in TEXT.split()]])
    return total / count, float(model(text, labels=text).loss)


def test_the_table_and_the_picture(files, tmp_path):
    pytest.importorskip("matplotlib")
    given = [files / "model", files / "adapter"]
    given += ["--task", files / "task.jsonl", "--text", files / "text.txt"]
    code, out, error = run("dial", *given, "--plot", tmp_path / "dial.png")
    assert code == 0, error
    _, *rows = out.splitlines()
    shown = {float(row.split()[0]): [*map(float, row.split()[1:])] for row in rows}
    assert list(shown) == [1, 0.85, 0.7, 0.55, 0.4, 0]
    model = opened(files)
    assert shown[1][:2] == pytest.approx(losses(model), abs=1e-3)
    with model.disable_adapter():
        assert shown[0][:2] == pytest.approx(losses(model), abs=1e-3)
    for name, parameter in model.named_parameters():
        if "randlora_lambda" in name:
            parameter.data *= 0.7
    assert shown[0.7][:2] == pytest.approx(losses(model), abs=1e-3)
    assert abs(shown[1][0] - shown[0.7][0]) > 0.01
    assert (tmp_path / "dial.png").read_bytes().startswith(b"\x89PNG")


def test_a_chosen_factor_is_set_and_nothing_is_measured(files, tmp_path, monkeypatch):
    def measured(*_, **__):
        raise AssertionError("measured")

    monkeypatch.setattr("randlora_ext.cli.dial.dial_curve", measured)
    turned = tmp_path / "turned"
    given = files / "model", files / "adapter", "--set", "0.7", "--out", turned
    code, out, error = run("dial", *given)
    assert code == 0 and "measuring" not in error, error
    assert out == f"{turned} holds the adapter times 0.7\n"
    old, new = (
        load_file(folder / "adapter_model.safetensors") for folder in (files / "adapter", turned)
    )
    assert old.keys() == new.keys()
    for key, value in old.items():
        factor = 0.7 if key.endswith("randlora_lambda") else 1
        torch.testing.assert_close(new[key], value * factor)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"--set": "0.7"}, "--set and --out go together"),
        ({"--set": "0.7", "--out": "new"}, "--set measures nothing, so it goes without --task"),
        (SET | {"--set": "0"}, "--set must be a positive finite number, got 0.0"),
        (SET | {"--out": "model"}, "exists; choose another name"),
        (SET | {"--plot": "dial.png"}, "--set measures nothing, so it goes without --task"),
        ({"--text": None}, "--task and --text must both be given, to measure, or --set"),
        ({"--tokens": "0"}, "--tokens must be at least 1, got 0"),
        ({"--task": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"--task": "broken.jsonl"}, 'line 2 must hold "prompt" and "completion", or "text"'),
        ({"--text": "empty.txt"}, "empty.txt: must hold text"),
        ({"MODEL": "adapter"}, "adapter"),
        ({"ADAPTER": "model"}, "model"),
        ({"ADAPTER": "lora"}, "lora must be a RandLoRA adapter"),
    ],
)
def test_what_is_refused(files, change, told, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    (files / "broken.jsonl").write_text('{"text": "w1 w2"}\n{"question": "w1"}')
    (files / "empty.txt").write_text("")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(llama(), config).save_pretrained(files / "lora")
    places = {"MODEL": "model", "ADAPTER": "adapter", "--task": "task.jsonl", "--text": "text.txt"}
    places |= change
    given = [places.pop("MODEL"), places.pop("ADAPTER")]
    for option, value in places.items():
        given += [] if value is None else [option, value]
    assert told in refused("dial", *given)
    assert not (files / "new").exists()


def test_the_command_asks_for_what_it_needs():
    assert "required: MODEL, ADAPTER " in refused("dial")
