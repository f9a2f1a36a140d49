"""export_to_lora: the adapter of LoRA that PEFT loads is the truncated SVD of dW."""

import json

import pytest
import torch
from cli_helpers import KINDS, llama
from peft_helpers import Deep, accelerated, config, layers, made, opened, peft, relative, stock_made
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from randlora_ext.peft.lora import RANKS, target_modules

pytestmark = pytest.mark.filterwarnings("ignore:RandLoRA layers of", "ignore:Specified to not save")


def spectra(model):
    """Of every layer in float64: (path, U, S, Vh)."""
    for path, layer in model.base_model.model.named_modules():
        if layer in layers(model):
            delta = layer.get_delta_weight("default").detach().double()
            yield path, *torch.linalg.svd(delta, full_matrices=False)


KINDS_AT_5 = ["generated", "sparse", "very_sparse", "hadamard", "uniform", "stock sparse saved"]
OTHER_RANKS = [("hadamard", 1), ("hadamard", 24), ("stock uniform", 32)]


@pytest.mark.parametrize("kind, rank", [*((kind, 5) for kind in KINDS_AT_5), *OTHER_RANKS])
def test_is_the_truncated_svd(tmp_path, kind, rank, x):
    model = (stock_made if "stock" in kind else made)(**KINDS[kind.removeprefix("stock ")], r=8)
    done = accelerated.export_to_lora(model, tmp_path, rank)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (rank, rank, "LORA")
    assert sorted(settings["target_modules"]) == ["a", "b", "c"]
    truncated, kept, total = Deep(), 0.0, 0.0
    for path, U, S, Vh in spectra(model):
        delta = U[:, :rank] @ S[:rank].diag() @ Vh[:rank]
        with torch.no_grad():
            truncated.get_submodule(path).weight += delta.float()
        squares = S.square()
        kept, total = kept + squares[:rank].sum(), total + squares.sum()
        assert done.layers[path] == pytest.approx(float(squares[:rank].sum() / squares.sum()), 1e-6)
    assert done.rank == rank and done.energy == pytest.approx(float(kept / total), 1e-6)
    loaded = opened(tmp_path)
    assert isinstance(loaded.base_model, peft.tuners.lora.LoraModel)
    with torch.no_grad():
        assert relative(loaded(x), truncated(x)) < 1e-5
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {len(t) for key, t in saved.items() if "lora_A" in key} == {rank}
    for path in done.layers:  # neither side vanishes in 16 bits
        sides = [saved[f"base_model.model.{path}.lora_{side}.weight"].norm() for side in "AB"]
        assert sides[0] == pytest.approx(float(sides[1]), 1e-4)


class Transposed(Deep):
    """Whose weights are stored as (in, out)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = Conv1D(40, 24), Conv1D(24, 40), Conv1D(40, 24)


@pytest.mark.parametrize("make", [made, stock_made])
def test_conv1d(tmp_path, make, x):
    model = make(base=Transposed, fan_in_fan_out=True)
    accelerated.export_to_lora(model, tmp_path, 24)
    assert relative(opened(tmp_path, Transposed)(x), model(x)) < 1e-5


@pytest.mark.parametrize("energy", [0.02, 0.6, 0.9, 1.0])
def test_energy_chooses_the_smallest_rank(tmp_path, energy):
    model = made(sparse=True)
    done = accelerated.export_to_lora(model, tmp_path, energy=energy)
    squares = [S.square() for _, _, S, _ in spectra(model)]
    total = sum(s.sum() for s in squares)
    shares = [float(sum(s[:rank].sum() for s in squares) / total) for rank in RANKS]
    want = next(rank for rank, share in zip(RANKS, shares, strict=True) if share > energy - 1e-9)
    assert done.rank == want and done.energy >= energy - 1e-9


def test_layers_without_change(tmp_path, x):
    model = made(targets="a", density=0.2)
    with torch.no_grad():
        layers(model)[0].randlora_lambda["default"].zero_()
    done = accelerated.export_to_lora(model, tmp_path, energy=0.9)
    assert done == (1, 1.0, {"a": 1.0})
    assert torch.equal(opened(tmp_path)(x), Deep()(x))


def test_one_of_several_adapters(tmp_path):
    model = made(sparse=True)
    model.add_adapter("b", config(8, targets="b", sparse=True))
    assert accelerated.export_to_lora(model, tmp_path, 4, adapter_name="b").layers == {"b": 1.0}


REFUSED = {
    "either rank or energy, got rank=None": {},
    "either rank or energy, got rank=4": {"rank": 4, "energy": 0.5},
    "rank must be a positive integer, got 0": {"rank": 0},
    r"energy must be in \(0, 1\], got 1.5": {"energy": 1.5},
    r"adapter_name must be one of \['default'\], got 'x'": {"rank": 4, "adapter_name": "x"},
}


def test_what_cannot_be_exported_keeps_old_files(tmp_path, monkeypatch):
    model = made(sparse=True)
    (tmp_path / "adapter_config.json").write_text("old")
    for told, options in REFUSED.items():
        with pytest.raises(ValueError, match=told):
            accelerated.export_to_lora(model, tmp_path, **options)
    monkeypatch.setattr("randlora_ext.peft.lora.RANKS", (1, 8))
    with pytest.raises(ValueError, match="needs a rank above 8, which keeps 0"):
        accelerated.export_to_lora(model, tmp_path, energy=0.99)
    with torch.no_grad():
        layers(model)[-1].randlora_gamma["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="c: dW holds NaN or infinity"):
        accelerated.export_to_lora(model, tmp_path, 4)
    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    for other in (Deep(), peft.get_peft_model(llama(), prompts)):
        with pytest.raises(TypeError, match="PeftModel with RandLoRA layers"):
            accelerated.export_to_lora(other, tmp_path, 4)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("chosen", "others", "want"),
    [
        (["l.0.q", "l.1.q", "l.0.v", "l.1.v"], ["l.0", "l.0.o"], ["q", "v"]),
        (["l.0.q"], ["l.1.q"], ["l.0.q"]),
        (["q"], ["l.q"], "q"),
        (["l.q"], ["m.l.q", "laq"], r"l\.q"),
    ],
)
def test_target_modules(chosen, others, want):
    """The last ones would be taken for more by PEFT, which compares the ends of names."""
    assert target_modules(chosen, [*chosen, *others]) == want
