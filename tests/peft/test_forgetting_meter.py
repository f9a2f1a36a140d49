"""The meter of forgetting against KL(base, tuned) by hand, and what it leaves as it was."""

import copy
import math
import time

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from language_models import llama
from peft_helpers import accelerated, adapted, layers, randomize
from torch.nn.parallel import DistributedDataParallel

from randlora_ext import RandLoraLinear, forgetting
from randlora_ext.own_text import own_text

IDS = torch.arange(24).view(2, 12) * 7 % 50
LABELS = IDS.masked_fill(torch.arange(12) < torch.tensor([[3], [7]]), -100)
BATCHES = [
    {"input_ids": IDS, "labels": LABELS, "attention_mask": torch.ones_like(IDS)},
    {"input_ids": IDS[:1, :5].flip(1), "labels": IDS[:1, :5].flip(1)},
]


def base():
    return llama(initializer_range=0.3)


def ours(**options):
    options = {"basis": "hadamard", "task_type": "CAUSAL_LM"} | options
    return adapted(base(), ["q_proj", "down_proj"], r=4, **options)


def lora(**options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(base(), config)


def without_peft():
    model = base().requires_grad_(False)
    for name, module in [*model.named_modules()]:
        if name.endswith("q_proj"):
            model.set_submodule(name, RandLoraLinear(module, r=4))
    return randomize(model, size=3)


def by_hand(model, base_model, batches=BATCHES):
    """(sum of KL(base, tuned), tokens) of each row, in float64."""
    rows = []
    for batch in batches:
        of_model, of_base = (
            each.eval()(batch["input_ids"]).logits.detach().double().log_softmax(-1)[:, :-1]
            for each in (model, base_model)
        )
        counts = batch["labels"][:, 1:] != -100
        each = F.kl_div(of_model, of_base, reduction="none", log_target=True).sum(-1) * counts
        rows += zip(each.sum(1).tolist(), counts.sum(1).tolist(), strict=True)
    return rows


def mean(rows):
    return sum(total for total, _ in rows) / sum(tokens for _, tokens in rows)


def both():
    """A PeftModel that holds a layer of the user's own."""
    with_own_layer = without_peft()
    lora_of_others = peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    return peft.get_peft_model(with_own_layer, lora_of_others)


@pytest.mark.parametrize("make", [ours, lora, without_peft, both])
def test_it_is_the_divergence_of_the_base_from_the_model(make):
    found = forgetting(make(), BATCHES)
    rows = by_hand(make(), base())
    assert found.nats == pytest.approx(mean(rows), rel=1e-4) and found.nats > 0.01
    assert found.tokens == 9 + 5 + 4


def test_the_standard_error_is_over_rows():
    """That of a ratio, by its textbook formula: rows of equal length have that of their mean."""
    batches = [{"input_ids": ids[None], "labels": ids[None]} for ids in IDS.view(4, 6)]
    means = torch.tensor([total / tokens for total, tokens in by_hand(ours(), base(), batches)])
    found = forgetting(ours(), batches)
    assert found.standard_error == pytest.approx(float(means.std() / 2), rel=1e-3)
    assert math.isnan(forgetting(ours(), batches[:1]).standard_error)


@pytest.mark.parametrize("make", [ours, without_peft])
def test_by_default_it_reads_what_the_base_wrote(make):
    model = make()
    written = own_text(base())
    assert forgetting(model) == forgetting(model, written)
    assert forgetting(model) == forgetting(model, seed=0) != forgetting(model, seed=1)


def test_it_reads_the_answers_to_prompts():
    model = ours()
    prompts = [[5, 6, 7], [9]]
    answers = own_text(base(), prompts=prompts)
    assert [(batch["labels"][0] == -100).sum() for batch in answers] == [3, 1]
    assert forgetting(model, prompts=prompts) == forgetting(model, answers)


def test_all_tokens_count_that_are_no_padding():
    model, mask = ours(), torch.ones_like(IDS)
    mask[1, 9:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    want = forgetting(model, [{"input_ids": IDS, "attention_mask": mask, "labels": labels}])
    assert forgetting(model, [{"input_ids": IDS, "attention_mask": mask}]) == want
    whole = forgetting(model, [{"input_ids": IDS, "labels": IDS}])
    assert forgetting(model, [IDS]) == whole and whole.tokens == 22


def test_padding_on_the_left_predicts_no_token():
    model, mask = ours(), torch.ones_like(IDS)
    mask[:, :4] = 0
    padded = {"input_ids": IDS.masked_fill(mask == 0, 0), "attention_mask": mask}
    want = forgetting(model, [IDS[:, 4:]])
    for batch in (padded, padded | {"labels": IDS.masked_fill(mask == 0, -100)}):
        found = forgetting(model, [batch])
        assert found.nats == pytest.approx(want.nats, rel=1e-4) and found.tokens == want.tokens


def test_packed_texts_do_not_read_one_another():
    model = ours()
    want = forgetting(model, [IDS[:, :6], IDS[:, 6:]])
    positions = torch.arange(6).repeat(2).expand_as(IDS)
    labels = IDS.clone()
    labels[:, 6] = -100  # predicted from another text
    batch = {"input_ids": IDS, "position_ids": positions, "labels": labels}
    assert model.config.use_cache
    found = forgetting(model, [batch])
    assert model.config.use_cache
    assert found.nats == pytest.approx(want.nats, rel=1e-4) and found.tokens == want.tokens


def with_trained_norms():
    model = ours()
    model.get_base_model().model.norm.requires_grad_(True)
    return model


def of_layers_beside_a_trained_head():
    model = without_peft()
    model.lm_head.requires_grad_(True)
    return model


def kasa():
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], kasa_config=peft.KasaConfig())
    return peft.get_peft_model(base(), config)


def beside_pissa():
    model = lora()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    model.add_adapter("two", config)
    return model


def beside_trained_biases():
    model = lora(bias="all")
    model.add_adapter("two", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter("two")
    return model


def test_what_other_packages_wrap_and_mixed_models_are_measured():
    model = lora(modules_to_save=["lm_head"])
    for module in model.modules():  # as fully_shard does, whose classes are torch's
        if hasattr(module, "modules_to_save") or hasattr(module, "lora_A"):
            kind = type(module)
            module.__class__ = type(kind.__name__, (kind,), {"__module__": "torch.distributed"})
    assert forgetting(model, [IDS]).tokens == 22
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    mixed = peft.get_peft_model(base(), config, mixed=True)
    assert forgetting(mixed, [IDS]).nats == pytest.approx(0, abs=1e-5)


def begun_by(init):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    return peft.get_peft_model(base(), config)


def test_a_model_whose_loss_has_all_labels():
    """As that of an encoder and decoder; a causal model predicts no first token."""
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    settings = transformers.T5Config(**shape, vocab_size=50, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(settings).eval()
    batch = {"input_ids": IDS, "labels": LABELS}
    of_base = model(**batch).logits.detach().log_softmax(-1)
    model.requires_grad_(False).set_submodule("lm_head", RandLoraLinear(model.lm_head, r=4))
    randomize(model, size=30)
    of_model = model(**batch).logits.detach().log_softmax(-1)
    each = F.kl_div(of_model, of_base, reduction="none", log_target=True).sum(-1)
    found = forgetting(model, [batch])
    assert found.nats == pytest.approx(float(each[LABELS != -100].mean()), rel=1e-4)
    assert found.nats > 0.01 and found.tokens == 14


def test_adapters_without_a_peft_model_are_refused():
    """Only that can disable all that PEFT has changed, such as modules_to_save."""
    accelerated.enable()
    model = base()
    config = accelerated.RandLoraConfig(r=4, basis="hadamard", target_modules=["q_proj"])
    peft.inject_adapter_in_model(config, model)
    with pytest.raises(ValueError, match="no adapter to disable: give a PeftModel"):
        forgetting(model, BATCHES)


def test_modules_to_save_count_as_tuned():
    model = lora(modules_to_save=["lm_head"])
    only_lora = forgetting(model, BATCHES).nats
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(0.5)
    assert forgetting(model, BATCHES).nats != pytest.approx(only_lora, rel=0.01)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base()(IDS).logits)


def test_a_wrapped_model_is_measured(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(ours())
        assert forgetting(wrapped, BATCHES) == forgetting(ours(), BATCHES)
        assert forgetting(wrapped) == forgetting(ours())
    finally:
        # Gloo's thread takes the GIL to free its last tensors, and the end of the group, which
        # holds the GIL, waits for that thread.
        time.sleep(0.1)
        torch.distributed.destroy_process_group()


def test_a_compiled_model_is_measured():
    assert forgetting(torch.compile(ours()), BATCHES) == forgetting(ours(), BATCHES)


@pytest.mark.parametrize("chunk", [1, 120])
def test_a_large_vocabulary_is_taken_in_parts(chunk, monkeypatch):
    want = forgetting(ours(), BATCHES)
    monkeypatch.setattr("randlora_ext.forgetting_meter.NUMBERS_AT_ONCE", chunk)
    assert forgetting(ours(), BATCHES).nats == pytest.approx(want.nats, rel=1e-6)


def test_a_model_in_16_bits_is_compared_in_float32():
    model = ours().bfloat16()
    logits = model.eval()(IDS).logits.detach()
    with model.disable_adapter():
        of_base = model(IDS).logits.detach()
    pair = (each.double().log_softmax(-1)[:, :-1] for each in (logits, of_base))
    want = F.kl_div(*pair, reduction="none", log_target=True).sum(-1).mean()
    assert forgetting(model, [IDS]).nats == pytest.approx(float(want), rel=1e-4)


def test_logits_that_rule_a_token_out():
    """Minus infinity in both: the base never says it, so it adds nothing."""
    model = ours()
    want = forgetting(model, BATCHES).nats

    def wider(module, args, output):
        output["logits"] = F.pad(output["logits"], (0, 3), value=-math.inf)
        return output

    model.base_model.model.register_forward_hook(wider)
    assert forgetting(model, BATCHES).nats == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("make", [ours, lora, without_peft])
def test_nothing_is_changed(make):
    model = make().train()
    frozen = next(p for p in model.parameters() if p.requires_grad)
    frozen.requires_grad_(False)  # PEFT's disable_adapter makes it trainable
    before = copy.deepcopy(model.state_dict())
    about = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    logits, state = model.eval()(IDS).logits, torch.get_rng_state()
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    forgetting(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == about
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.eval()(IDS).logits, logits)


def test_the_adapter_is_back_when_the_base_fails():
    model, calls = ours().train(), []

    def fail(module, args, output):
        calls.append(layers(model)[0].disabled)
        if calls[-1]:
            raise RuntimeError("of the model")

    hook = model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="of the model"):
        forgetting(model, BATCHES)
    hook.remove()
    assert calls == [False, True] and model.training
    assert torch.equal(model(IDS).logits, ours().train()(IDS).logits)


def test_a_disabled_adapter_forgets_nothing():
    model = ours()
    model.base_model.disable_adapter_layers()
    assert forgetting(model, BATCHES).nats == 0
    assert all(layer.disabled for layer in layers(model))


def merged(model):
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    "make, given, error, told",
    [
        (lambda: None, {}, TypeError, "model must be an nn.Module"),
        (base, {}, ValueError, "model has no adapter to disable"),
        (lambda: merged(ours()), {}, ValueError, "'default' of layer '.*q_proj' is merged; unme"),
        (lambda: merged(lora()), {}, ValueError, "'default' of layer '.*q_proj' is merged; unme"),
        (lambda: lora(bias="all"), {}, ValueError, "trains biases"),
        (with_trained_norms, {}, ValueError, r"'model\.norm\.weight' of the base model trains"),
        (lambda: begun_by("pissa"), {}, ValueError, "initialized by 'pissa', which changes the"),
        (lambda: begun_by("OLoRA"), {}, ValueError, "initialized by 'OLoRA', which changes the"),
        (of_layers_beside_a_trained_head, {}, ValueError, r"'lm_head\.weight' of the base model"),
        (kasa, {}, ValueError, "'default' was initialized by 'KaSA', which changes the"),
        (beside_pissa, {}, ValueError, "'two' was initialized by 'pissa', which changes the"),
        (beside_trained_biases, {}, ValueError, "'default' trains biases"),
        (ours, {"batches": BATCHES, "prompts": [[1]]}, ValueError, "give one of them"),
        (ours, {"batches": BATCHES[0]}, TypeError, "batches must be several, such as"),
        (ours, {"batches": IDS}, TypeError, "batches must be several, such as"),
        (ours, {"batches": ["a"]}, TypeError, "batches must hold tensors of token .* got 'a'"),
        (ours, {"batches": [{"input_ids": [[1, 2]]}]}, ValueError, r"must hold .*\[\[1, 2\]\]"),
        (ours, {"batches": [{"x": IDS}]}, ValueError, "must hold \"labels\".* with \\['x'\\]"),
        (ours, {"batches": [{"input_ids": IDS, "decoder_input_ids": IDS}]}, ValueError, "labels"),
        (ours, {"batches": []}, ValueError, "must hold tokens that count"),
        (ours, {"batches": [IDS[:, :1]]}, ValueError, "must hold tokens that count"),
        (ours, {"seed": "a"}, TypeError, "seed must be a Python integer in"),
        (ours, {"seed": 2**70}, ValueError, "seed must be a Python integer in"),
        (ours, {"prompts": [[3, 1000]]}, ValueError, "prompts must hold tokens in .*, got 1000"),
    ],
)  # fmt: skip
def test_what_is_refused(make, given, error, told):
    with pytest.raises(error, match=told):
        forgetting(make(), **given)


def test_numbers_that_are_not_finite_are_refused():
    model = ours()
    with torch.no_grad():
        layers(model)[-1].randlora_lambda["default"].fill_(math.nan)
    with pytest.raises(ValueError, match="are not finite"):
        forgetting(model, BATCHES)
