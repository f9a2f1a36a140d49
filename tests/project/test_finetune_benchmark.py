"""benchmarks/finetune.py on a toy model, and the tables of its rows."""

import finetune
import finetune_batches
import finetune_measures
import finetune_tasks
import forgetting
import pytest
import spelling
import tokenizers
import torch
import transformers
from finetune_batches import mixed, pack, to_calibrate_with, written
from finetune_measures import compared, scaled_update
from finetune_models import adapted, loaded
from finetune_rows import read_rows
from finetune_scales import other_vectors
from language_models import llama
from tokenizers import decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

import randlora_ext
from randlora_ext import calibration

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}!"


def toy_model() -> tuple:
    """A Llama of two layers over bytes, which has a chat template."""
    vocabulary = {char: i for i, char in enumerate(["<end>", *bytes_to_unicode().values()])}
    bytewise = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<end>", pad_token="<end>", padding_side="left"
    )
    tokenizer.chat_template = TEMPLATE
    shape = {"hidden_size": 48, "intermediate_size": 96, "vocab_size": len(vocabulary)}
    # Large weights, beside which an update is small.
    return tokenizer, llama(**shape, initializer_range=0.3, bos_token_id=0, eos_token_id=0)


@pytest.fixture
def toy(monkeypatch, stock_peft):
    """Its name among the models. What finetune.py changes in spelling.py is taken back."""
    for name in ("make_batch", "answer_logits"):
        monkeypatch.setattr(spelling, name, getattr(spelling, name))
    monkeypatch.setattr(spelling, "load_model", lambda source: toy_model())
    loaded.cache_clear()  # each test loads it first
    for name, fewer in (("OWN_ROWS", 64), ("OWN_TOKENS", 8), ("ANSWER_TOKENS", 8)):
        monkeypatch.setattr(finetune_batches, name, fewer)
    monkeypatch.setattr(finetune_measures, "SCORED", 4)
    monkeypatch.setitem(finetune_tasks.TEXTS, "prose", lambda: "It was a fine day. " * 100)
    return "toy"


def test_spelling_in_chat(monkeypatch):
    """The words of spelling, each in the question of a chat."""
    words = [("c a t ->", "K AE T"), ("d o g ->", "D AO G")]
    monkeypatch.setattr(spelling, "read_words", lambda: (words[:1], words[1:]))
    ((prompt, answer),), held_out = finetune_tasks.spelling_in_chat()
    assert "user\nHow is c a t pronounced?<|im_end|>\n<|im_start|>assistant\n" in prompt
    assert answer == "K AE T"
    assert [answer for _, answer in held_out] == ["D AO G"]


def test_two_tasks_with_own_rows(toy, tmp_path, monkeypatch):
    line = "--task roman --then dates --mix 8 --steps 2 --seeds 0 --rates 1e-2 --targets all"
    methods = ["full", "hadamard scaled:own=answers"]
    arguments = [*line.split(), "--model", toy, "--methods", ",".join(methods)]
    finetune.main([*arguments, "--out", str(tmp_path / "rows")])
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert [len(stages) for stages in row["skills"].values()] == [2, 2]
        before, after = (stage["held_out_loss"] for stage in row["skills"]["dates"])
        assert before > after == row["held_out_loss"] and len(row["train_loss"]) == 4
        for name in ("meter", "chat"):
            assert row[name] > row["x 0.7"][name] > row["x 0.4"][name] > 0
    monkeypatch.setattr(finetune, "run_one", None)  # a row that is there is not run again
    finetune.main([*arguments, "--out", str(tmp_path / "rows")])


def test_brief_rows_have_the_same_losses_and_rises(toy, tmp_path):
    line = "--task roman --methods lora --steps 2 --seeds 0 --rates 1e-2 --targets all --model toy"
    for name, more in (("whole", []), ("brief", ["--brief"])):
        finetune.main([*line.split(), *more, "--out", str(tmp_path / name)])
    (whole,), (brief,) = (read_rows(tmp_path / f"{name}.jsonl") for name in ("whole", "brief"))
    for part in ("forgetting", "x 0.7", "x 0.4"):
        assert {"manual", "code", "prose"} <= brief[part].keys()
        both = brief[part].keys() & whole[part].keys()
        assert {name: brief[part][name] for name in both} == {n: whole[part][n] for n in both}
    assert brief["held_out_loss"] == whole["held_out_loss"] and "meter" not in brief


def test_answers_are_compared_as_forgetting_does(toy):
    tuned = adapted(toy, "lora", 0, 32, "all")
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    for text in ("own", "compared"):
        want = randlora_ext.forgetting(tuned, written(text, toy)).nats
        _, divergence, same = compared(tuned, text, toy)
        assert divergence == pytest.approx(want, rel=1e-2)  # the base's are kept in 16 bits
        assert want > 0.01 and 0 < same < 1
    with scaled_update(tuned, 1e-6, toy):
        rise, divergence, same = compared(tuned, "own", toy)
    assert (same, rise, divergence) == (1, *[pytest.approx(0, abs=1e-3)] * 2)


def test_the_dial_of_full_tuning_goes_from_the_base_to_the_trained_weights(toy):
    tuned, base = adapted(toy, "full", 0, 32, "all"), loaded(toy)[1]
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter))
    trained = [parameter.detach().clone() for parameter in tuned.parameters()]
    with scaled_update(tuned, 0.7, toy):
        for t, w, now in zip(trained, base.parameters(), tuned.parameters(), strict=True):
            want = 0.7 * t.double() + 0.3 * w.double()
            torch.testing.assert_close(now.double(), want, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, trained, tuned.parameters()))


def test_strengths_without_a_limit_are_the_limited_ones_where_a_step_costs_much(toy):
    tuned = adapted(toy, "hadamard", 0, 8, "all")
    batches = spelling.plan_batches(finetune_tasks.examples("roman")[0], 4, 16, 0)
    read = to_calibrate_with("", batches, toy)
    own = written("own", toy)
    unlimited = other_vectors(tuned, read, own, strength="F-1/2")
    one = other_vectors(tuned, read, own)
    assert len({round(rms(vector), 4) for vector in one.values()}) == 1
    limited = other_vectors(tuned, read, own, strength="limited")
    strengths = [*map(rms, limited.values())]
    ratios = [rms(unlimited[layer]) / rms(vector) for layer, vector in limited.items()]
    most = max(strengths) * (1 - 1e-4)  # that of the median cost
    costly = [ratio for ratio, s in zip(ratios, strengths, strict=True) if s < most]
    assert len(costly) >= len(ratios) // 2 - 1
    assert costly == pytest.approx([costly[0]] * len(costly), rel=1e-4)
    assert all(ratio > costly[0] * (1 - 1e-4) for ratio in ratios)


def test_limited_strengths_are_those_of_calibrate_by_the_batches_alone(toy, monkeypatch):
    tuned = adapted(toy, "hadamard", 0, 8, "all")
    batches = spelling.plan_batches(finetune_tasks.examples("roman")[0], 4, 16, 0)
    read = to_calibrate_with("", batches, toy)
    vectors = other_vectors(tuned, read, written("own", toy), strength="limited")
    profile_of_experts = calibration._profile_of_experts
    monkeypatch.setattr(
        calibration, "_profile_of_experts", lambda seen, _: profile_of_experts(seen, None)
    )
    randlora_ext.calibrate(tuned, read)
    for layer, vector in vectors.items():
        torch.testing.assert_close(layer.randlora_input_scale["default"], vector, rtol=1e-4, atol=0)


def test_what_calibrate_reads(toy):
    batches = spelling.plan_batches(finetune_tasks.examples("roman")[0], 4, 16, 0)
    task, long, own = (to_calibrate_with(on, batches, toy) for on in ("", "long", "own"))
    assert all(batch.keys() == {"input_ids", "position_ids"} for batch in task)
    for as_rows, as_one in zip(task, long, strict=True):
        assert as_one.keys() == {"input_ids"}
        assert torch.equal(as_one["input_ids"], as_rows["input_ids"])
    assert [len(read) for read in (to_calibrate_with("2", batches, toy), own)] == [2, 8]
    for batch, wrote in zip(own, written("own", toy), strict=True):
        assert torch.equal(batch["input_ids"], wrote["input_ids"])


def rms(vector: torch.Tensor) -> float:
    return float(vector.double().square().mean().sqrt())


def test_one_example_of_eight_becomes_a_row_that_the_base_model_wrote(toy):
    plain = spelling.plan_batches(finetune_tasks.examples("roman")[0], 2, 16, 0)
    for batch, before in zip(mixed(plain, 8, toy, 0), plain, strict=True):
        assert batch[:14] == before[2:]
        alone = pack(loaded(toy)[0], batch[:14]).labels.numel()
        own = sum(len(row["input_ids"]) - 1 for row in batch[14:])
        assert pack(loaded(toy)[0], batch).labels.numel() == alone + own > alone


def row(loss: float, chat: float, **more) -> dict:
    rises = dict.fromkeys(("manual", "code", "prose"), chat / 10)
    measured = {"meter": chat, "forgetting": rises, "seconds_per_step": 1.0}
    scaled = {f"x {f}": {"held_out_loss": 9, "chat": chat, "manual": 0} for f in (0.7, 0.4)}
    setting = {"task": "spelling", "method": "lora", "lr": 1e-3, "seed": 0, "steps": 40, "r": 32}
    setting |= {"targets": "mlp", "model": "fp32", "scaling": 20.0}
    return {**setting, "held_out_loss": loss, "chat": chat, **measured, **scaled, **more}


def test_tables_of_chat_skills_and_own_rows():
    rows = [row(1.0, 0.4), row(1.4, 0.1, lr=5e-4)]
    in_chat = forgetting.at_equal_loss(rows, {"LoRA": ("lora", "mlp")}, "chat")
    assert "| SmolLM2, spelling, 1.2 | 0.200 (1) |" in in_chat  # the geometric mean, half way
    skills = [
        {"spelling": [{"held_out_loss": 1.0, "right": 0.2, "phoneme_errors": errors}] * 2,
         "roman": [{"held_out_loss": 2.0, "right": right}] * 2}
        for errors, right in ((0.5, 0.75), (0.7, 0.25))
    ]  # fmt: skip
    told = [row(1, 0.1, then="roman", skills=each, seed=i) for i, each in enumerate(skills)]
    of_both = forgetting.skills(told, "spelling", "roman")
    assert "20%; 1.000; 60% | 20%; 1.000; 60% | 50%; 2.000 | 0.010 | 0.100 | 2 |" in of_both
    both = forgetting.mixing([*rows, row(1.5, 0.05, mix=8), row(7, 7, then="roman")])
    assert "none | 1.000; 0.040 | 0.400 | 1.000 |" in both
    assert "1 of 8 | 1.500; 0.005 | 0.050 | 1.000 |" in both


def test_others_are_compared_with_ours_at_their_loss():
    lora = row(1.2, 0.4, lr=1.5e-3)
    ours = row(1.0, 0.4, method="hadamard scaled", targets="all")
    ours["x 0.7"] |= {"held_out_loss": 1.4, "manual": 0.01}
    table = forgetting.beside_ours([lora, ours]).splitlines()
    # of the manual ours forgot 0.04 at 1.0 and 0.01 at 1.4, so 0.02 at 1.2
    assert table[2].startswith("| LoRA, MLP, 1.5e-3 | 1.200 | 2.0 (0.040, 0.020) |")
    trained = forgetting.as_trained([lora, ours]).splitlines()
    assert trained[2].startswith("| ours, all linear | 1e-3 | 1.000 | 0.040 |")
    assert trained[4].startswith("| LoRA, MLP | 1.5e-3 | 1.200 | 0.040 |")
