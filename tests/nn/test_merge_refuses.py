"""Weights that cannot be merged into: shared ones, computed ones and those without numbers."""

import copy
import itertools
from collections import OrderedDict

import pytest
import torch
from layer_helpers import make_base, pickled, randomize, relative
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from randlora_ext import RandLoraLinear, apply_randlora, merge_and_unload, unload

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, and torch's of old weight_norm


def same_module():
    base = make_base(24, 40)
    return nn.ModuleList([RandLoraLinear(base, r=5, seed=key) for key in (1, 2)])


def tied():
    model = nn.ModuleList([make_base(24, 40), make_base(24, 40)])
    model[1].weight = model[0].weight
    return apply_randlora(model, ["0", "1"], r=5)


def same_memory():
    model = tied()
    model[1].base_layer.weight = nn.Parameter(model[0].weight.data, requires_grad=False)
    return model


def of_peft():
    pytest.importorskip("peft")
    from peft_helpers import accelerated, config, peft
    from peft_helpers import randomize as randomize_model

    accelerated.enable()
    model = nn.Sequential(make_base(24, 24), make_base(24, 24))
    model[1].weight = model[0].weight
    model = peft.get_peft_model(model, config(5, targets=["0", "1"], sparse=True))
    return randomize_model(model).base_model.model


SHARED = {"one module": same_module, "tied": tied, "one memory": same_memory, "PEFT": of_peft}


@pytest.fixture(params=SHARED)
def shared(request):
    return randomize(SHARED[request.param]())


@pytest.mark.parametrize("keep", ["host", "device", "nothing"])
def test_every_order_of_merging_and_unmerging_two_layers_of_one_weight(shared, keep):
    weight = shared[0].get_base_layer().weight
    W, steps = weight.detach().clone(), list(itertools.product((0, 1), (True, False)))
    for order in itertools.permutations(steps):
        for at, merges in order:
            layer, other = shared[at], shared[1 - at]
            before = weight.detach().clone()
            if not merges:
                layer.unmerge()
            elif other.merged:
                with pytest.raises(RuntimeError, match="share one weight, which can hold"):
                    layer.merge(keep_weight=keep)
                assert torch.equal(weight, before) and not layer.merged
            else:
                layer.merge(keep_weight=keep)
        for layer in shared:
            layer.unmerge()
        assert relative(weight, W) < 1e-6 if keep == "nothing" else torch.equal(weight, W), order


def test_the_message_names_both_layers(shared):
    shared[0].merge()
    named = "layer '0' and layer '1'" if shared[1].path else r"RandLoraLinear\(.* and Ra.*\(24->40"
    with pytest.raises(RuntimeError, match=named):
        shared[1].merge()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickled(model)[0]])
def test_copies_of_merged_layers(copied):
    model = randomize(tied())
    W = model[0].weight.detach().clone()
    model[0].merge()
    other = copied(model)
    with pytest.raises(RuntimeError, match="share one weight"):
        other[1].merge()
    other[0].unmerge()
    other[1].merge()  # the first model's weight is another one
    other[1].unmerge()
    assert torch.equal(other[0].weight, W) and model[0].merged


def test_who_has_left_the_weight_does_not_hinder():
    model = randomize(tied())
    first = model[0]
    unload(model)
    apply_randlora(model, ["0"], r=5)
    model = randomize(model)
    second = model[0]
    merge_and_unload(model)
    apply_randlora(model, ["0"], r=5)[0].merge()
    assert not first.merged and second.merged


def test_models_are_checked_before_a_layer_is_merged():
    model = nn.Sequential(*(make_base(24, 24) for _ in range(4)))
    model[3].weight = model[1].weight
    apply_randlora(model, ["0", "1", "3"], r=5)
    randomize(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="layer '1' and layer '3' share one weight"):
        merge_and_unload(model)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert not any(layer.merged for layer in model if hasattr(layer, "merged"))


def test_zamba2_under_peft():
    """Its attention layers share their weights; each has an adapter of its own."""
    transformers, peft = map(pytest.importorskip, ("transformers", "peft"))
    from peft_helpers import accelerated
    from peft_helpers import randomize as randomize_model

    sizes = dict(hidden_size=32, intermediate_size=48, vocab_size=64, num_attention_heads=4)
    mamba = dict(mamba_d_state=8, n_mamba_heads=4, mamba_headdim=16, mamba_ngroups=1, chunk_size=8)
    blocks = ["mamba", "hybrid", "mamba", "hybrid"]
    config = transformers.Zamba2Config(
        layers_block_type=blocks, num_hidden_layers=4, num_mem_blocks=1, **sizes, **mamba
    )
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    x = torch.arange(8)[None]
    untuned = base(x).logits
    accelerated.enable()
    chosen = accelerated.RandLoraConfig(
        r=4, randlora_alpha=4, basis="hadamard", target_modules=["in_proj", "q_proj"]
    )
    model = randomize_model(peft.get_peft_model(base, chosen)).eval()
    want, before = model(x).logits, copy.deepcopy(model.state_dict())
    q_proj = "layer 'model.layers.{}.shared_transformer.self_attn.q_proj'"
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match=f"{q_proj.format(1)} and {q_proj.format(3)} share"):
            merge()
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x).logits, untuned)
    assert torch.equal(model(x).logits, want) and relative(want, untuned) > 1e-3


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda base: prune.l1_unstructured(base, "weight", 0.5),
}


def change(base, how):
    if how == "meta":
        return base.to("meta")
    return COMPUTED[how](base)


@pytest.mark.parametrize("how", [*COMPUTED, "meta"])
@pytest.mark.parametrize("with_peft", [False, True])
def test_a_weight_that_cannot_be_written(how, with_peft):
    model = nn.Sequential(OrderedDict(a=make_base(24, 24), b=change(make_base(24, 24), how)))
    if with_peft:
        pytest.importorskip("peft")
        from peft_helpers import accelerated, config, peft

        accelerated.enable()
        model = peft.get_peft_model(model, config(5, targets=["a", "b"], sparse=True))
        layers = list(model.base_model.model)
        merges = model.merge_adapter, model.merge_and_unload
    else:
        layers = list(apply_randlora(model, ["a", "b"], r=5))
        merges = (lambda: merge_and_unload(model),)
    for layer in layers:
        nn.init.normal_(layer.randlora_lambda["default"])
    before = layers[0].weight.detach().clone()
    told = "has no numbers" if how == "meta" else "is computed at every use"
    told = f"layer 'b': base_layer.weight {told}"
    for merge in (*merges, layers[1].merge):
        with pytest.raises((RuntimeError, TypeError), match=told):
            merge()
    assert torch.equal(layers[0].weight, before)
    assert not any(layer.merged for layer in layers)


def test_weights_that_accelerate_has_put_elsewhere_are_merged():
    """They are on the meta device until PEFT asks for them, one layer at a time."""
    hooks, peft = map(pytest.importorskip, ("accelerate.hooks", "peft"))
    from peft_helpers import accelerated, config
    from peft_helpers import randomize as randomize_model

    accelerated.enable()
    base = nn.Sequential(make_base(24, 24), make_base(24, 24))
    model = randomize_model(peft.get_peft_model(base, config(5, targets=["0", "1"], sparse=True)))
    x = torch.randn(3, 24)
    want = model(x)
    for layer in base:
        hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True)
        hooks.add_hook_to_module(layer.base_layer, hook)
        assert layer.weight.is_meta
    model.merge_adapter()
    assert all(layer.merged for layer in base) and relative(model(x), want) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(model(x), want)
