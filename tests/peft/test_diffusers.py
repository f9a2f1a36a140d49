"""diffusers on our layers: what docs/peft.md says, with a transformer of a few thousand weights."""

import pytest
import torch
from peft_helpers import accelerated, config, layers, peft, randomize, relative, runs_on_kernels
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers")
TARGETS = ["to_q", "to_v", "to_out.0"]


def transformer():
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "in_channels": 4, "patch_size": 1}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
    other = {"joint_attention_dim": 32, "pooled_projection_dim": 32}
    return diffusers.FluxTransformer2DModel(**sizes, **heads, **other).eval()


def chosen():
    return config(4, accelerated.RandLoraConfig, TARGETS, basis="hadamard", randlora_alpha=80)


@torch.no_grad()
def image(model):
    torch.manual_seed(1)
    shapes = {"hidden_states": (1, 6, 4), "encoder_hidden_states": (1, 5, 32), "timestep": (1,)}
    shapes |= {"pooled_projections": (1, 32), "img_ids": (6, 3), "txt_ids": (5, 3)}
    return model(**{name: torch.randn(shape) for name, shape in shapes.items()}).sample


@pytest.fixture
def model():
    accelerated.enable()
    made = transformer()
    made.add_adapter(chosen())
    return randomize(made)


def test_add_save_and_load(model, tmp_path):
    y, bare = image(model), image(transformer())
    assert runs_on_kernels(model) and relative(y, bare) > 0.01
    save_file(peft.get_peft_model_state_dict(model), tmp_path / "adapter.safetensors")
    loaded = transformer()
    loaded.add_adapter(chosen())
    peft.set_peft_model_state_dict(loaded, load_file(tmp_path / "adapter.safetensors"))
    assert torch.equal(image(loaded), y)
    loaded.disable_adapters()
    assert torch.equal(image(loaded), bare)
    loaded.enable_adapters()
    loaded.fuse_lora()
    assert all(layer.merged for layer in layers(loaded)) and relative(image(loaded), y) < 1e-5
    loaded.unfuse_lora()
    assert torch.equal(image(loaded), y)


def test_as_lora(model, tmp_path):
    peft.save_as_lora(tmp_path, model, rank=32)
    loaded = transformer()
    loaded.load_lora_adapter(tmp_path, prefix=None, weight_name="adapter_model.safetensors")
    assert relative(image(loaded), image(model)) < 1e-5
