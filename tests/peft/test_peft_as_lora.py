"""`peft.save_as_lora` of adapters on every kind of bases."""

import peft
import pytest
import torch
from peft_helpers import Deep, adapted, opened, relative

KINDS = {
    "independent": {"basis": "independent", "density": 0.07, "projection_prng_key": 7},
    "hadamard": {"basis": "hadamard", "projection_prng_key": 7},
    "sparse": {"sparse": True, "save_projection": False},
    "sparse saved": {"sparse": True},
    "very_sparse": {"very_sparse": True, "save_projection": False},
    "uniform": {"save_projection": False},
}


def as_lora(model, base, folder, **options):
    peft.save_as_lora(folder, model, **options)
    lora = opened(folder, base).eval()
    assert isinstance(lora.base_model, peft.tuners.lora.LoraModel)
    return lora


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_full_rank_nothing_is_lost(tmp_path, kind, dtype, x):
    def base():
        return Deep().to(dtype)

    model = adapted(base(), "abc", 5, **kind)
    y = as_lora(model, base, tmp_path, rank=24)(x.to(dtype))
    assert relative(y, model(x.to(dtype))) < (5e-6 if dtype == torch.float32 else 0.02)


@torch.no_grad()
def test_the_input_scale_goes_along(tmp_path, x):
    model = adapted(Deep(), "abc", 5, basis="hadamard")
    for layer in model.base_model.model.children():
        layer.set_input_scale("default", torch.linspace(0.1, 3, layer.in_features))
    assert relative(as_lora(model, Deep, tmp_path, rank=24)(x), model(x)) < 5e-6


@torch.no_grad()
def test_of_a_lower_rank_it_is_the_nearest_matrix(tmp_path):
    model = adapted(Deep(), "a", 5, basis="hadamard")
    delta = model.base_model.model.a.get_delta_weight("default").double()
    lora = as_lora(model, Deep, tmp_path, rank=4).base_model.model.a.get_delta_weight("default")
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    assert relative(lora, U[:, :4] * S[:4] @ V[:4]) < 1e-5
