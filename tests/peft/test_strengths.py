"""`calibrate` of a language model: one strength per layer, from gradients to its outputs."""

import copy

import peft
import pytest
import torch
import transformers
from language_models import llama
from layer_helpers import adapt, input_scale_of, normalized, relative, strengths_of
from peft.utils.integrations import dequantize_module_weight
from peft_helpers import are_calibrated
from torch import nn

import randlora_ext
import randlora_ext.peft
from randlora_ext.own_text import own_text

TARGETS = ["q_proj", "o_proj", "gate_proj", "down_proj"]


def adapted(model, targets=TARGETS, **options):
    randlora_ext.peft.enable()
    options = {"target_modules": targets, "task_type": "CAUSAL_LM"} | options
    config = randlora_ext.peft.RandLoraConfig(r=4, randlora_alpha=80, basis="hadamard", **options)
    return peft.get_peft_model(model, config)


def task(rows: int = 3, tokens: int = 20, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Two batches, of which prompts have no labels and one row is padded on the left."""
    batches = []
    for k in range(2):
        generator = torch.Generator().manual_seed(seed + k)
        ids = torch.randint(3, 50, (rows, tokens), generator=generator)
        mask, labels = torch.ones_like(ids), ids.clone()
        labels[:, : tokens // 2] = -100
        mask[0, :4] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def spread_out(model):
    """Layers as different as those of a trained model."""
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.mul_(3 * (1 + k % 5))
    return model


def statistics_of(model, batches, names):
    """By autograd in float64: of each layer its inputs, and the gradients of the summed loss to
    its outputs, of all tokens."""
    seen: dict = {name: [] for name in names}
    model = copy.deepcopy(model).double()
    for batch in batches:
        mask = batch["attention_mask"].bool()

        def watch(_, args, y, name, mask=mask):
            y.retain_grad()
            seen[name].append((args[0].detach()[mask], y, mask))

        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda *args, name=name: watch(*args, name=name)
            )
            for name in names
        ]
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for hook in hooks:
            hook.remove()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        loss.backward()
    x = {name: torch.cat([x for x, _, _ in calls]) for name, calls in seen.items()}
    gradients = {
        name: torch.cat([y.grad[mask] for _, y, mask in calls]) for name, calls in seen.items()
    }
    return x, gradients


def scales_and_costs(model, batches) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    names = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in TARGETS]
    x, _ = statistics_of(model, batches, names)
    own_x, gradients = statistics_of(model, own_text(model), names)
    scales, costs = {}, {}
    for name in names:
        path = f"base_model.model.{name}"
        scales[path] = input_scale_of(x[name], own_text=own_x[name])
        energy = (own_x[name] * scales[path].double()).square().mean(0).sum()
        costs[path] = float(gradients[name].square().mean(0).sum() * energy)
    return scales, costs


def have_scales_of_batches_alone(model, base, batches) -> bool:
    names = [n for n, _ in base.named_modules() if n.rpartition(".")[2] in TARGETS]
    x, _ = statistics_of(base, batches, names)
    for name in names:
        scale = model.get_submodule(f"base_model.model.{name}").randlora_input_scale["default"]
        if relative(normalized(scale), input_scale_of(x[name])) > 1e-4:
            return False
    return True


def test_layers_of_high_cost_take_smaller_steps():
    base = spread_out(llama())
    scales, costs = scales_and_costs(base, task())
    want = strengths_of(costs)
    model = adapted(copy.deepcopy(base))
    strengths = randlora_ext.calibrate(model, task())
    assert strengths == pytest.approx(want, 1e-4)
    assert max(want.values()) > 3 * min(want.values())
    for name, strength in strengths.items():
        scale = model.get_submodule(name).randlora_input_scale["default"]
        torch.testing.assert_close(scale, strength * scales[name], rtol=1e-4, atol=0)


def test_labels_of_the_batches_do_not_matter():
    base = spread_out(llama())
    bare = [{name: t for name, t in batch.items() if name != "labels"} for batch in task()]
    with_labels, without = adapted(copy.deepcopy(base)), adapted(base)
    assert randlora_ext.calibrate(without, bare) == randlora_ext.calibrate(with_labels, task())


def test_a_model_without_a_loss_has_layers_of_one_strength():
    base = spread_out(llama())
    model = adapted(copy.deepcopy(base))
    causal = model.get_base_model()
    forward = causal.forward
    causal.forward = lambda labels=None, **kwargs: forward(**kwargs)
    assert len({*randlora_ext.calibrate(model, task()).values()}) == 1
    assert have_scales_of_batches_alone(model, base, task())
    with_loss = adapted(copy.deepcopy(base))
    randlora_ext.calibrate(with_loss, task())
    assert not have_scales_of_batches_alone(with_loss, base, task())


class WithoutLabels(nn.Module):
    """Takes no labels, though what it holds does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids, attention_mask=attention_mask)


def of_images():
    encoder = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4)
    decoder = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, bos_token_id=1)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.VisionEncoderDecoderModel(config)


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 16}


def test_a_model_that_takes_no_labels_is_told_and_has_one_strength(recwarn):
    model = adapted(WithoutLabels(spread_out(llama())), task_type=None)
    bare = [{name: t for name, t in batch.items() if name != "labels"} for batch in task()]
    assert len({*randlora_ext.calibrate(model, bare).values()}) == 1
    assert any("cannot read text alone" in str(each.message) for each in recwarn)


class WithFeatures(WithoutLabels):
    """Needs more than text, and says so by whatever it raises."""

    @staticmethod
    def check(features):
        """By default nothing, so that Python raises."""

    def forward(self, input_ids, attention_mask=None, labels=None, features=None):
        self.check(features)
        inputs = self.inner.get_input_embeddings()(input_ids) + features.sum()
        return self.inner(inputs_embeds=inputs, attention_mask=attention_mask, labels=labels)


@pytest.mark.parametrize("error", [AttributeError, AssertionError, NotImplementedError])
def test_a_model_that_needs_more_than_text_is_told_and_has_one_strength(error, recwarn):
    class Refusing(WithFeatures):
        @staticmethod
        def check(features):
            if features is None and error is not AttributeError:
                raise error("give features")

    model = adapted(Refusing(spread_out(llama())), task_type=None)
    batches = [batch | {"features": torch.ones(3)} for batch in task()]
    assert len({*randlora_ext.calibrate(model, batches).values()}) == 1
    told = f"cannot read text alone: {error.__name__}"
    assert any(told in str(each.message) for each in recwarn)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_too_little_memory_is_no_reason_to_calibrate_otherwise(error, monkeypatch):
    def fail(model):
        raise error("out of memory")

    model = adapted(llama())
    monkeypatch.setattr("randlora_ext.calibration.own_text", fail)
    with pytest.raises(error):
        randlora_ext.calibrate(model, task())
    assert not any(are_calibrated(model))


def test_gradients_cannot_be_had_in_inference_mode():
    model = adapted(llama())
    refused = pytest.raises(RuntimeError, match="outside of torch.inference_mode")
    with torch.inference_mode(), refused:
        randlora_ext.calibrate(model, task())
    assert not any(are_calibrated(model))


def test_a_decoder_inside_of_an_encoder_and_decoder_writes_no_text():
    model = adapted(of_images(), ["q_proj", "query", "c_fc"], task_type=None)
    batch = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.randint(1, 50, (2, 5))}
    assert len({*randlora_ext.calibrate(model, [batch]).values()}) == 1


class InferenceAlone(nn.Linear):
    """As GPTQModel's layers, which pass gradients in training mode alone."""

    SUPPORTS_TRAINING = True

    def forward(self, x):
        with torch.inference_mode(not self.training):
            return super().forward(x).clone()


def test_layers_that_pass_gradients_in_training_mode_alone():
    base = spread_out(llama())
    want = randlora_ext.calibrate(adapted(copy.deepcopy(base)), task())
    for module in base.modules():
        if type(module) is nn.Linear:
            module.__class__ = InferenceAlone
    assert randlora_ext.calibrate(adapted(base), task()) == pytest.approx(want, rel=1e-5)


def test_dropout_does_not_act_with_gradient_checkpointing():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.OPTConfig(**sizes, word_embed_proj_dim=16, vocab_size=50, dropout=0.5)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 2, 2, 1
    base = transformers.OPTForCausalLM(config)
    want = randlora_ext.calibrate(adapted(copy.deepcopy(base), ["q_proj", "fc1"]), task())
    base.gradient_checkpointing_enable()
    assert randlora_ext.calibrate(adapted(base, ["q_proj", "fc1"]), task()) == want


def test_gradients_and_modes_stay_as_they_are():
    model = adapted(llama()).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    trained[0].grad = torch.ones_like(trained[0])
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), {name: t.clone() for name, t in model.named_parameters()}
    randlora_ext.calibrate(model, task())
    assert [p for p in model.parameters() if p.requires_grad] == trained
    assert trained[0].grad.eq(1).all() and not any(p.grad is not None for p in trained[1:])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert all(torch.equal(t, states[1][name]) for name, t in model.named_parameters())


def test_packed_texts_are_told_apart_by_their_positions():
    base = spread_out(llama())
    ids = task()[0]["input_ids"]
    rows = [{"input_ids": row[None]} for row in ids]
    positions = torch.arange(ids.shape[1]).repeat(len(ids))[None]
    packed = {"input_ids": ids.view(1, -1), "position_ids": positions}
    found = [randlora_ext.calibrate(adapted(copy.deepcopy(base)), b) for b in (rows, [packed])]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_acts_and_changes_nothing(reentrant, monkeypatch):
    base = spread_out(llama())
    want = randlora_ext.calibrate(adapted(copy.deepcopy(base)), task())
    model = adapted(copy.deepcopy(base))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = []
    norm = model.get_base_model().model.layers[0].input_layernorm
    norm.register_forward_hook(lambda *_: again.append(torch.is_grad_enabled()))
    assert randlora_ext.calibrate(model, task()) == pytest.approx(want, rel=1e-5)
    count = len(own_text(base))
    # Twice in each backward pass; in the first one reentrant checkpoints have no gradients.
    assert again.count(True) == (1 if reentrant else 2) * count


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_head_tied_to_the_embedding():
    """As one with a weight of its own."""
    tied = spread_out(llama(tie_word_embeddings=True))
    untied = copy.deepcopy(tied)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = nn.Parameter(tied.lm_head.weight.clone())
    targets = [*TARGETS, "lm_head"]
    want = randlora_ext.calibrate(adapted(untied, targets), task())
    model = adapted(tied, targets)
    assert randlora_ext.calibrate(model, task()) == want
    head = model.get_base_model().lm_head
    assert "base_model.model.lm_head" in want and head.is_calibrated("default")
    assert head.base_layer.weight is model.get_input_embeddings().weight


def test_a_module_in_two_places_has_one_strength():
    """It sees the tokens of both, and goes by the first of its names."""
    base = spread_out(llama())
    base.model.layers[1].mlp = base.model.layers[0].mlp
    _, costs = scales_and_costs(base, task())
    want = strengths_of(costs)
    strengths = randlora_ext.calibrate(adapted(base), task())
    assert strengths == pytest.approx(want, 1e-4)
    assert "base_model.model.model.layers.1.mlp.down_proj" not in strengths


def test_two_adapters_of_one_layer_have_a_strength_each():
    """As those of two layers of equal weights: without PEFT any module can be adapted twice."""
    names = [f"model.layers.{i}.mlp.{part}" for i in (0, 1) for part in ("up_proj", "down_proj")]
    base = spread_out(llama())
    base.model.layers[1].mlp = copy.deepcopy(base.model.layers[0].mlp)
    one, two = adapt(copy.deepcopy(base), *names, r=4), adapt(base, *names, r=4)
    for part in ("up_proj", "down_proj"):
        first, second = (getattr(two.model.layers[i].mlp, part) for i in (0, 1))
        second.base_layer = first.base_layer
    want = randlora_ext.calibrate(one, task())
    assert randlora_ext.calibrate(two, task()) == want
    assert len({*want.values()}) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_of_16_bits(dtype):
    base = llama()
    want = randlora_ext.calibrate(adapted(copy.deepcopy(base)), task())
    model = adapted(copy.deepcopy(base).to(dtype))
    assert randlora_ext.calibrate(model, task()) == pytest.approx(want, rel=0.3)


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes
@pytest.mark.parametrize("bits, limit", [(8, 0.3), (4, 1e-2)])
def test_quantized_layers_which_train_afterwards(bits, limit):
    """As layers that hold what their bits stand for. Those of 8 bits round inputs, too, so the
    model writes another text."""
    bnb = pytest.importorskip("bitsandbytes")
    base = llama(hidden_size=64, intermediate_size=128)
    plain = copy.deepcopy(base)
    for name in [n for n, _ in base.named_modules() if n.rpartition(".")[2] in TARGETS]:
        linear = plain.get_submodule(name)
        sizes = linear.in_features, linear.out_features
        if bits == 4:
            layer = bnb.nn.Linear4bit(*sizes, False, torch.float32, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(*sizes, False, has_fp16_weights=False)
        layer.load_state_dict(linear.state_dict())
        base.set_submodule(name, layer.to("cpu"))  # quantizes
        linear.weight.data = dequantize_module_weight(layer).float()
    want = randlora_ext.calibrate(adapted(plain), task())
    model = adapted(base)
    assert randlora_ext.calibrate(model, task()) == pytest.approx(want, rel=limit)
    model.train()(**task()[0]).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_gradients_that_are_not_finite_are_told():
    base = llama()
    model = adapted(copy.deepcopy(base))
    head = model.get_base_model().lm_head
    with torch.no_grad():
        head.weight[7] = torch.inf  # of a token that the model will not stop to write
    with pytest.warns(UserWarning, match="not finite on text that the model wrote"):
        strengths = randlora_ext.calibrate(model, task())
    assert len({*strengths.values()}) == 1
    assert have_scales_of_batches_alone(model, base, task())


def test_a_model_that_stops_at_once_has_scales_of_batches_alone(monkeypatch):
    """Eight rows of three tokens do not tell what varies."""
    base = spread_out(llama())
    model = adapted(copy.deepcopy(base))
    rows = [
        {"input_ids": torch.tensor([[1, k, 2]]), "labels": torch.tensor([[-100, k, 2]])}
        for k in range(3, 11)
    ]
    monkeypatch.setattr("randlora_ext.calibration.own_text", lambda model: rows)
    assert len({*randlora_ext.calibrate(model, task()).values()}) > 1
    assert have_scales_of_batches_alone(model, base, task())


def test_a_layer_that_own_text_does_not_reach_is_as_strong_as_the_median_one():
    class WithImages(type(llama())):
        def __init__(self, config):
            super().__init__(config)
            self.vision = torch.nn.Linear(6, 32)

        def forward(self, input_ids=None, images=None, **kwargs):
            if images is None:
                return super().forward(input_ids=input_ids, **kwargs)
            seen = self.vision(images)[:, None]
            embedded = self.model.embed_tokens(input_ids) + seen
            return super().forward(**kwargs | {"inputs_embeds": embedded})

    torch.manual_seed(0)
    model = adapted(WithImages(llama().config), [*TARGETS, "vision"])
    batches = [batch | {"images": torch.rand(3, 6)} for batch in task()]
    strengths = randlora_ext.calibrate(model, batches)
    vision = strengths.pop("base_model.model.vision")
    assert vision == pytest.approx(max(strengths.values()))  # as the layer of median cost
    images = torch.cat([batch["images"] for batch in batches])
    scale = model.get_submodule("base_model.model.vision").randlora_input_scale["default"]
    assert relative(normalized(scale), input_scale_of(images)) < 1e-5
