"""`calibrate` under PEFT: the vector goes wherever the adapter goes."""

import copy
import functools

import expert_models
import pytest
import torch
import torch.nn.functional as F
import transformers
from language_models import llama
from layer_helpers import uneven
from peft_helpers import (
    accelerated,
    adapted,
    are_calibrated,
    assert_unchanged,
    config,
    layers,
    made,
    numbers,
    opened,
    peft,
    randomize,
    relative,
    scales,
    trainer_of,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import randlora_ext

OPTIONS = {"basis": "hadamard", "projection_prng_key": 7}


def calibrated(**options):
    """A model with random diagonals, whose inputs are scaled."""
    model = randomize(made(**OPTIONS | options), size=0)
    randlora_ext.calibrate(model, [uneven(2, 9)])
    return randomize(model, size=0.1)


def test_every_door(tmp_path):
    model, x = calibrated(), uneven(2, 9, seed=1)
    want = model(x)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {k.split(".")[3] for k in saved} == {
        "randlora_lambda", "randlora_gamma", "randlora_input_scale", "randlora_record"
    }  # fmt: skip
    bare = [made(seed=4, **OPTIONS) for _ in range(4)]
    bare[0].load_adapter(tmp_path, "default")
    bare[1].load_adapter(tmp_path, "two")
    bare[1].set_adapter("two")
    bare[2].load_state_dict(copy.deepcopy(model.state_dict()))
    peft.set_peft_model_state_dict(bare[3], peft.get_peft_model_state_dict(model))
    doors = [opened(tmp_path, low_cpu_mem_usage=low) for low in (True, False)]
    for door in (*doors, *bare, copy.deepcopy(model)):
        assert torch.equal(door(x), want)


def test_a_file_of_an_adapter_that_is_not_calibrated_takes_the_vector_away(tmp_path):
    bare, x = made(**OPTIONS), uneven(2, 9, seed=1)
    bare.save_pretrained(tmp_path)
    model = calibrated()
    model.load_adapter(tmp_path, "default")
    assert torch.equal(model(x), bare(x)) and not any(are_calibrated(model))


def save_changed(folder, change):
    """Changes the input scale of the last layer in a saved adapter; None takes it out."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = [key for key in tensors if key.endswith("input_scale")][-1]
    scale = tensors.pop(key)
    if change is not None:
        tensors[key] = change(scale)
    with safe_open(file, "pt") as opened_file:
        metadata = opened_file.metadata()
    save_file(tensors, file, metadata)
    return key


def flipped(scale):
    """One bit is another: that of a sign."""
    return torch.cat([scale[:-1], -scale[-1:]])


DOORS = {
    "load_adapter over it": lambda model, folder: model.load_adapter(folder, "default"),
    "load_adapter": lambda model, folder: model.load_adapter(folder, "new"),
    "set_peft_model_state_dict": lambda model, folder: peft.set_peft_model_state_dict(
        model, load_file(folder / "adapter_model.safetensors")
    ),
    "from_pretrained": lambda model, folder: opened(folder),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("change", [flipped, torch.zeros_like, lambda s: s * torch.nan, None])
def test_a_bad_vector_of_the_last_layer_is_refused_before_the_first_is_loaded(
    door, change, tmp_path
):
    model = calibrated()
    randomize(calibrated(), size=0.2).save_pretrained(tmp_path)
    key = save_changed(tmp_path, change)
    before = numbers(model)
    told = "is missing: an adapter on" if change is None else "must be positive and finite"
    with pytest.raises((RuntimeError, ValueError), match=f"{key}.(default|new) {told}"):
        DOORS[door](model, tmp_path)
    if "new" in model.peft_config:  # PEFT adds the adapter before it reads the file
        model.delete_adapter("new")
    assert_unchanged(model, before)


def tokenizer():
    """Words by their number; nothing is downloaded."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<unk>": 0} | {f"word{i}": i for i in range(1, 50)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


@pytest.mark.parametrize("calibrate", [False, True], ids=["not calibrated", "calibrated"])
@pytest.mark.parametrize("experts", [False, True], ids=["layers", "experts"])
@torch.no_grad()
def test_the_loaders_of_transformers(experts, calibrate, tmp_path):
    options = {"task_type": "CAUSAL_LM", **OPTIONS}
    if experts:
        base = functools.partial(expert_models.make, "Qwen3Moe")
        model = adapted(base(), ["q_proj"], 4, target_parameters=expert_models.EXPERTS, **options)
    else:
        base = functools.partial(llama, initializer_range=0.3)
        model = adapted(base(), ["q_proj", "down_proj"], **options)
    if calibrate:
        randlora_ext.calibrate(randomize(model, size=0), [{"input_ids": tokens(3).repeat(4, 1)}])
    want = randomize(model, size=0.1).eval()(tokens(1)).logits
    base().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    auto = transformers.AutoModelForCausalLM.from_pretrained
    later = auto(tmp_path / "base")
    info = later.load_adapter(tmp_path / "adapter")
    assert not (info.missing_keys or info.unexpected_keys or info.mismatched_keys)
    folder = str(tmp_path / "adapter")
    pipeline = transformers.pipeline("text-generation", model=folder, tokenizer=tokenizer())
    for loaded in (auto(tmp_path / "adapter"), later, pipeline.model):
        assert torch.equal(loaded.eval()(tokens(1)).logits, want)
        assert are_calibrated(loaded) == [calibrate] * len(layers(model))


def test_several_adapters_a_mixed_batch_and_deletion():
    model, x = calibrated(), uneven(2, 9, seed=1)
    with torch.no_grad():
        model.add_adapter("two", config(5, accelerated.RandLoraConfig, **OPTIONS))
        model.set_adapter("two")
        two = randomize(model, 1, size=0.1)(x)
        model.set_adapter("default")
        both = torch.stack([model(x)[0], two[1]])
        assert relative(model.eval()(x, adapter_names=["default", "two"]), both) < 1e-6
    assert all(are_calibrated(model)) and not any(are_calibrated(model, "two"))
    model.delete_adapter("default")
    assert all([*layer.randlora_input_scale] == ["two"] for layer in layers(model))


def language_model(calibrate=True):
    """A tiny Llama with an adapter whose lambda is zero."""
    options = {"task_type": "CAUSAL_LM", **OPTIONS}
    model = adapted(llama(initializer_range=0.3), ["q_proj", "down_proj"], **options)
    randomize(model, size=0)
    if calibrate:
        randlora_ext.calibrate(model, [{"input_ids": tokens(3)}])
        assert all(scale.max() > 1.2 * scale.mean() for scale in scales(model))
    return model


def tokens(seed):
    return torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_opened_by_its_name_alone_and_merged(tmp_path):
    model = randomize(language_model(), size=0.1).eval()
    llama(initializer_range=0.3).save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    want = model(tokens(1)).logits
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(opened(tokens(1)).logits, want)
    assert relative(opened.merge_and_unload()(tokens(1)).logits, want) < 1e-5
    for layer in layers(model):
        layer.set_input_scale("default", torch.ones(layer.in_features))
    assert relative(model(tokens(1)).logits, want) > 0.01  # the vector matters


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize("calibrate", [False, True], ids=["resumed bare", "resumed with another"])
def test_a_checkpoint_of_the_trainer(tmp_path, calibrate):
    model = language_model()
    kept, rows = copy.deepcopy(scales(model)), tokens(1)
    trainer_of(model, tmp_path, rows).train()
    resumed = language_model(calibrate)
    if calibrate:
        randlora_ext.calibrate(resumed, [{"input_ids": tokens(8)}])
        assert not any(map(torch.equal, scales(resumed), kept))
    start = str(tmp_path / "checkpoint-2")
    trainer_of(resumed, tmp_path, rows).train(resume_from_checkpoint=start)
    assert all(map(torch.equal, scales(resumed), kept))
    assert_unchanged(resumed, numbers(model))
    assert all(layer.randlora_lambda["default"].any() for layer in layers(model))


@pytest.mark.parametrize("kind", ["Bart", "T5"])
def test_padding_of_an_encoder_and_of_its_decoder(kind):
    """Whether both are padded to one length or not, and wherever layers read what was encoded."""
    shape = {
        "Bart": {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
                 "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
        "T5": {"d_kv": 8, "d_ff": 48, "num_layers": 1, "decoder_start_token_id": 0},
    }[kind]  # fmt: skip
    settings = getattr(transformers, f"{kind}Config")(d_model=32, vocab_size=50, **shape)
    torch.manual_seed(0)
    base = getattr(transformers, f"{kind}ForConditionalGeneration")(settings).eval()
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    targets = sorted({name.rpartition(".")[2] for name in linear} - {"lm_head"})
    source, target = tokens(1)[:, :5], tokens(2)[:, :7]

    def vectors(encoded, decoded):
        batch = {
            "input_ids": F.pad(source, (0, encoded - 5)),
            "attention_mask": F.pad(torch.ones_like(source), (0, encoded - 5)),
            "labels": F.pad(target, (0, decoded - 7), value=-100),
        }
        model = adapted(copy.deepcopy(base), targets, basis="hadamard")
        randlora_ext.calibrate(randomize(model, size=0), [batch])
        return scales(model)

    want = vectors(5, 7)
    for lengths in ((9, 9), (9, 7), (7, 7), (5, 9)):
        for found, scale in zip(vectors(*lengths), want, strict=True):
            torch.testing.assert_close(found, scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("labels", [{"labels": torch.arange(4) % 2}, {}])
def test_padding_of_a_decoder_that_reads_what_the_encoder_reads(labels):
    shape = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_labels": 2}
    torch.manual_seed(0)
    settings = transformers.BartConfig(d_model=32, vocab_size=50, eos_token_id=2, **shape, **heads)
    kind = transformers.BartForSequenceClassification if labels else transformers.BartModel
    base, ids = kind(settings).eval(), tokens(1).clamp(min=3)
    ids[:, -1] = 2  # what is classified

    def vectors(padding):
        batch = {"input_ids": F.pad(ids, (0, padding), value=1), **labels}
        batch["attention_mask"] = F.pad(torch.ones_like(ids), (0, padding))
        model = randomize(adapted(copy.deepcopy(base), ["fc1", "q_proj"], basis="hadamard"), size=0)
        randlora_ext.calibrate(model, [batch])
        return scales(model)

    for found, scale in zip(vectors(4), vectors(0), strict=True):
        torch.testing.assert_close(found, scale, rtol=1e-3, atol=1e-4)
