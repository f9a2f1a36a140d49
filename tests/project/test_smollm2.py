"""examples/smollm2.py on a toy model: what it writes, and the command that it prints."""

import json
import shlex
from pathlib import Path

import pytest
import spelling
import torch
import transformers
from language_models import llama
from layer_helpers import relative
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = """
;;; a comment
cat K AE T
cat(2) K AH T
'cause K AH Z
dog D AO G
bad B AE D
tag T AE G
coat K OW T
goat G OW T
boat B OW T
tab T AE B
at AE T
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A Llama of two layers over bytes, and a small dictionary."""
    folder = tmp_path_factory.mktemp("toy files")
    vocabulary = {char: i for i, char in enumerate(["<end>", *bytes_to_unicode().values()])}
    bytewise = Tokenizer(models.BPE(vocabulary, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>")
    for saved in (tokenizer, llama(vocab_size=len(vocabulary))):
        saved.save_pretrained(folder / "model")
    (folder / "words.dict").write_text(WORDS, encoding="utf-8")
    return folder / "model", folder / "words.dict"


def arguments(files, *others) -> list:
    model, words = files
    small = ["--steps", 30, "--batch-size", 4, "--rank", 8, "--lr", 1e-4]
    return ["--model", model, "--words", words, *small, *others]


@torch.no_grad()
def logits(model, rows=((*range(1, 21),), (*range(21, 41),))) -> torch.Tensor:
    return model.eval()(torch.tensor(rows)).logits


def test_from_a_model_to_a_merged_model_and_the_printed_command(
    files, tmp_path, run_example, capsys
):
    printed = run_example("smollm2.py", *arguments(files, "--out", "an out", "--max-rise", 0.002))
    out = tmp_path / "an out"
    results = json.loads((out / "results.json").read_text())
    before, after = results["held_out_loss"].values()
    assert after < before and f"learned to {after:.3f} within a budget of 0.002" in printed
    assert [step for step, _ in results["learned"]] == [0, 7, 14, 21, 28, 30]
    assert results["forgetting"] <= 0.002 < results["forgotten"][-1][1]
    assert 0 < results["dial"] < 1 and results["learned"][-1][1] < after
    assert results["reload_difference"] == 0 and results["merge_difference"] < 1e-5

    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    trained = [t.numel() for key, t in saved.items() if key.endswith(("_lambda", "_gamma"))]
    assert len(saved) == 2 * len(trained)  # of each layer one scale and one record, too
    assert sum(trained) == results["parameters"]["trained"]

    # Split as by a shell, but run without new processes.
    script = shlex.split(printed.partition("Next, ")[2].partition("\n")[2])
    assert script[:2] == ["python", "-c"] and len(script) == 3
    exec(script[2], {})
    assert "f r i e n d ->" in capsys.readouterr().out
    assert "a LoRA of rank 64 keeps 1.00 of |dW|^2" in printed  # of 48 features at most
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert relative(logits(load(out / "merged")), logits(load(out / "base"))) > 1e-3
    fields = json.loads((out / "lora" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA" and fields["base_model_name_or_path"] == str(out / "base")


def test_lora_leaves_the_same_results_without_a_dial(files, tmp_path, run_example):
    """Of which examples/smollm2_lora.json holds three."""
    run_example("smollm2.py", *arguments(files, "--lora", "--out", "lora"))
    results = json.loads((tmp_path / "lora" / "results.json").read_text())
    stored = json.loads((EXAMPLES / "smollm2_lora.json").read_text())
    assert stored.keys() == {"lr", "learned", "forgotten"} <= results.keys()
    assert results["dial"] == 1 and len(results["learned"]) == len(results["forgotten"]) == 6


def test_the_loss_is_that_of_the_answers_alone(files):
    """Against the plain definition: one row at a time, without padding."""
    tokenizer, model = spelling.load_model(str(files[0]))
    rows = [("g o a t", "G OW T"), ("a", "the K AE T"), ("t a b", "T")]
    total, count = 0.0, 0
    for prompt, answer in rows:
        prompt = tokenizer(prompt)["input_ids"]
        answer = [*tokenizer(f" {answer}")["input_ids"], tokenizer.eos_token_id]
        log_p = logits(model, [prompt + answer])[0].log_softmax(-1)
        for position, token in enumerate(answer, start=len(prompt) - 1):
            total, count = total - log_p[position, token].item(), count + 1
    assert spelling.held_out_loss(model, tokenizer, rows) == pytest.approx(total / count, rel=1e-5)


def test_the_trainers_rows_have_the_loss_of_the_batches(files):
    """The labels of rows for the Trainer leave out the prompts, as `make_batch` does."""
    tokenizer, model = spelling.load_model(str(files[0]))
    words = [("g o a t", "G OW T")]
    (row,) = spelling.tokenized(tokenizer, words)
    row = {name: torch.tensor([numbers]) for name, numbers in row.items()}
    want = spelling.held_out_loss(model, tokenizer, words)
    assert model(**row).loss.item() == pytest.approx(want, rel=1e-5)
