"""Checks of PEFT's layers in a model that transformers has sharded, run by test_distributed.py."""

import copy
import warnings

import peft
import pytest
import torch
import torch.distributed as dist
from distributed_ranks import Place, equal_on_all_ranks, worlds
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig
from transformers.pytorch_utils import Conv1D

import randlora_ext.peft as accelerated
from randlora_ext.peft.tensor_parallel import TensorParallelLinear

# Expand (up_proj), reduce (down_proj, k_proj) and square layers, each cut by outputs or inputs; the
# last gathers its outputs, so that its adapter is whole on every rank.
TARGETS = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "lm_head"]
BASES = (
    dict(basis="independent", density=1 / 4),
    dict(basis="hadamard"),
    dict(density=0.2),
    dict(),  # PEFT's default, dense
)
TOKENS = torch.arange(24).view(3, 8)
LIMITS = dict(rtol=1e-4, atol=1e-6)
UP = "base_model.model.model.layers.0.mlp.up_proj"


def load(place: Place, ranks: int = 1):
    folder = place.folder / "llama"
    if place.rank == 0 and not folder.exists():
        sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=64)
        heads = dict(num_attention_heads=8, num_key_value_heads=4, initializer_range=0.2)
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, attention_bias=True))
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        made.save_pretrained(folder)
    dist.barrier()
    options = dict(distributed_config=DistributedConfig(tp_size=ranks)) if ranks > 1 else {}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def config(**basis):
    options = dict(r=4, randlora_alpha=4, target_modules=TARGETS, save_projection=False)
    return accelerated.RandLoraConfig(**(options | basis))


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def set_diagonals(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def pair(place: Place, **basis):
    """The model in one process and the sharded one, with equal adapters."""
    accelerated.enable()
    models = [peft.get_peft_model(load(place, n), config(**basis)) for n in (1, place.world)]
    for model in models:
        set_diagonals(model)
    return models


def loss(model, **inputs):
    return model(**(inputs or {"input_ids": TOKENS}), labels=TOKENS).loss


def parallel_layers(model):
    return [m for m in model.modules() if isinstance(m, TensorParallelLinear)]


@worlds(2, 4)
def check_training(place: Place):
    """Loss, gradients, merging and the file for each kind of bases."""
    for at, basis in enumerate(BASES):
        models, losses, gradients = pair(place, **basis), [], []
        for model in models:
            x = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(1))
            losses.append(loss(model, inputs_embeds=x.requires_grad_()))
            losses[-1].backward()
            gradients.append({"x": x.grad} | {n: p.grad for n, p in trained(model).items()})
        torch.testing.assert_close(*losses, **LIMITS)
        (whole, sharded), (want, got) = models, gradients
        assert got.keys() == want.keys()
        for name, grad in got.items():
            assert (grad - want[name]).norm() < 1e-4 * want[name].norm(), (basis, name)
            assert equal_on_all_ranks(grad, place.world)
        want = loss(whole).detach()
        with torch.no_grad():  # transformers has another way without gradients
            torch.testing.assert_close(loss(sharded), want, **LIMITS)
        layer, unsharded = (model.get_submodule(UP) for model in (sharded, whole))
        before = layer.base_layer.weight.to_local().clone()
        sharded.merge_adapter(safe_merge=True)
        torch.testing.assert_close(loss(sharded), want, **LIMITS)
        assert not torch.equal(layer.base_layer.weight.to_local(), before)
        sharded.unmerge_adapter()
        assert torch.equal(layer.base_layer.weight.to_local(), before)
        delta = layer.get_delta_weight("default")
        assert isinstance(delta, DTensor) and delta.placements == layer.base_layer.weight.placements
        wanted = unsharded.get_delta_weight("default")
        torch.testing.assert_close(delta.full_tensor(), wanted, **LIMITS)
        if place.world == 2:
            saved = place.folder / f"adapter-{at}"  # by all ranks together, since PEFT gathers
            sharded.save_pretrained(saved, is_main_process=place.rank == 0)
            dist.barrier()
            for ranks in (1, 2):
                opened = peft.PeftModel.from_pretrained(load(place, ranks), saved)
                torch.testing.assert_close(loss(opened), want, **LIMITS)


@worlds(2)
def check_adapters(place: Place):
    """Two adapters, each alone, both of one batch, and none; with a dropout that drops nothing."""
    whole, sharded = pair(place, basis="independent", density=1 / 4)
    torch.manual_seed(place.rank)
    for model in (whole, sharded):
        chosen = config(basis="hadamard", randlora_dropout=0.5, init_weights=False)
        model.add_adapter("two", chosen)
        model.set_adapter("two")
    layer = parallel_layers(sharded)[0]
    drawn = layer.randlora_lambda["two"].detach()
    assert drawn.any() and equal_on_all_ranks(drawn, place.world)
    for model in (whole, sharded):
        set_diagonals(model, seed=1)
        model.eval()
    torch.testing.assert_close(loss(sharded), loss(whole), **LIMITS)
    names = ["default", "__base__", "two"]
    got, want = (model(TOKENS, adapter_names=names).logits for model in (sharded, whole))
    torch.testing.assert_close(got, want, **LIMITS)
    with whole.disable_adapter(), sharded.disable_adapter():
        torch.testing.assert_close(loss(sharded), loss(whole), **LIMITS)
    sharded.delete_adapter("two")
    whole.delete_adapter("two")
    torch.testing.assert_close(loss(sharded), loss(whole), **LIMITS)
    assert layer.slices.keys() == {"default"}


@worlds(2)
def check_what_one_rank_lacks(place: Place):
    """Where one rank raises, all do, before any has changed, and all can go on."""
    basis = dict(basis="independent", density=1 / 4)
    _, sharded = pair(place, **basis)
    want, good = loss(sharded), place.folder / "all-ranks"
    base = load(place, place.world)
    modules = [name for name, _ in base.named_modules()]
    differs = "must be equal on all ranks, got "
    with pytest.raises(ValueError, match=f"projection_prng_key {differs}.*seed=0' on rank 0, .*1'"):
        peft.get_peft_model(base, config(projection_prng_key=place.rank, **basis))
    with pytest.raises(ValueError, match=f"target_modules {differs}"):
        sharded.add_adapter("two", config(target_modules=TARGETS[place.rank :], **basis))
    bad = place.folder / "llama" / "config.json" / "no" if place.rank == 0 else good
    told = "rank 0: " if place.rank else "no"
    with pytest.raises(OSError, match=told):
        sharded.save_pretrained(bad, is_main_process=place.rank == 0)
    sharded.save_pretrained(good, is_main_process=place.rank == 0)
    dist.barrier()
    with pytest.raises(Exception, match=told):
        peft.PeftModel.from_pretrained(base, bad)
    assert [name for name, _ in base.named_modules()] == modules
    for name in ("default", "three"):
        with pytest.raises(Exception, match=told):
            sharded.load_adapter(bad, name)
    torch.testing.assert_close(loss(sharded), want, **LIMITS)
    sharded.load_adapter(good, "four")
    sharded.set_adapter("four")
    torch.testing.assert_close(loss(sharded), want, **LIMITS)


@worlds(2)
def check_compiling_hooks_and_export(place: Place):
    """Compiling before any call, hooks of base layers, and what needs an unsharded model."""
    _, sharded = pair(place, basis="hadamard")
    layer = sharded.get_submodule("base_model.model.model.layers.0.self_attn.o_proj")
    x = torch.randn(2, 8, 64 // place.world)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, layer(x), **LIMITS)
    called = []
    layer.base_layer.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(layer(x), compiled, **LIMITS)
    assert called == [1]
    with pytest.raises(ValueError, match="model is sharded over ranks; save the adapter"):
        accelerated.export_to_peft(sharded, place.folder / "no", merged=True)
    assert not (place.folder / "no").exists()


@worlds(4)
def check_refusals(place: Place):
    """Before anything has changed."""
    accelerated.enable()
    model = load(place, place.world)
    modules = [name for name, _ in model.named_modules()]
    plan = copy.deepcopy(model.tp_plan)
    model.tp_plan = plan | {"model.layers.*.mlp.up_proj": "packed_colwise"}
    message = "'model.layers.0.mlp.up_proj' is sharded by .*'packed_col"
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, config())
    assert [name for name, _ in model.named_modules()] == modules
    model.tp_plan = plan
    up_proj = model.model.layers[0].mlp.up_proj
    up_proj.out_features = 42
    with pytest.raises(ValueError, match="out_features must be divisible by the 4 .*, got 42"):
        peft.get_peft_model(model, config())
    for other in (torch.nn.Linear(64, 96), Conv1D(96, 64)):
        model.model.layers[0].mlp.up_proj = other
        message = f"up_proj' must be an nn.Linear whose .*, got {type(other).__name__} with Param"
        with pytest.raises(TypeError, match=message):
            peft.get_peft_model(model, config())
    both = {"distributed_config": DistributedConfig(tp_size=2, fsdp_size=2)}
    both = AutoModelForCausalLM.from_pretrained(place.folder / "llama", **both)
    with pytest.raises(ValueError, match="must be the only parallelism of the model.*fsdp=2"):
        peft.get_peft_model(both, config())
    accelerated.disable()
    chosen = peft.RandLoraConfig(target_modules=TARGETS)
    stock = peft.get_peft_model(load(place, place.world), chosen)
    with pytest.raises(ValueError, match="model is sharded by transformers; call enable"):
        accelerated.accelerate(stock)
