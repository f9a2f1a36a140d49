"""``randlora inspect``: numbers against plain PyTorch, and what it says of broken folders."""

import math
import sys

import pytest
import torch
from cli_helpers import KINDS, Q0, llama, refused, run, save_adapter
from peft_helpers import accelerated, layers, peft

import randlora_ext.cli.inspect as inspection
from randlora_ext.cli.inspect import Spectrum

pytestmark = [
    pytest.mark.usefixtures("one_thread", "stock_peft"),
    pytest.mark.filterwarnings("ignore:Specified to not save", "ignore:RandLoRA layers of this"),
]


def row_of(output: str, path: str) -> list[str]:
    return next(line for line in output.splitlines() if line.startswith(path + " ")).split()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_numbers_are_those_of_the_model(tmp_path, base_folder, kind):
    model = save_adapter(llama(), tmp_path, **kind)
    code, out, _ = run("inspect", tmp_path, "--base", base_folder)
    assert code == 0 and "8 layers" in out
    named = {name.removeprefix("base_model.model."): m for name, m in model.named_modules()}
    for path in (Q0, "model.layers.1.mlp.down_proj"):
        layer = named[path]
        delta = layer.get_delta_weight("default").detach().double()
        values = torch.linalg.svdvals(delta)
        share = values / values.sum()
        rank = math.exp(-float(torch.xlogy(share, share).sum()))
        stable = float((values**2).sum() / values[0] ** 2)
        row = row_of(out, path)
        lam, gam = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
        want = [float(t.detach().norm()) for t in (lam, gam, delta)] + [rank, stable]
        assert [float(cell) for cell in row[-5:]] == pytest.approx(want, rel=1e-3, abs=0.06)


def test_the_model_that_the_adapter_names_is_found(tmp_path, base_folder):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_folder)
    save_adapter(base, tmp_path, basis="independent")
    code, out, _ = run("inspect", tmp_path, "--layers", "0.*(q|up)_proj")
    assert code == 0 and "effective rank" in out and len(row_of(out, Q0)) == 12
    assert "down_proj" not in out and f"base_model_name_or_path={base_folder}" in out


def test_without_the_base_what_can_be_told_is_told(tmp_path):
    save_adapter(llama(), tmp_path, sparse=True)
    code, out, _ = run("inspect", tmp_path)
    assert code == 0 and "dW is not told" in out and "--base" in out
    assert "sparse=True" in out and "bases: saved, 10,560 bytes" in out
    assert len(row_of(out, Q0)) == 9 and "effective" not in out
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert f"{size:,} bytes" in out


def test_the_plot_is_a_picture(tmp_path, base_folder, monkeypatch):
    save_adapter(llama(), tmp_path, basis="independent")
    png = tmp_path / "dw.png"
    inspect = ("inspect", tmp_path, "--base", base_folder, "--plot", png)
    code, out, _ = run(*inspect)
    assert code == 0 and str(png) in out
    from matplotlib.image import imread

    assert imread(png).std() > 0.05
    before = png.read_bytes()
    assert "exists" in refused(*inspect)
    assert png.read_bytes() == before
    with monkeypatch.context() as patch:  # before anything is computed
        patch.setattr(inspection, "_spectra", None)
        assert "exists" in refused(*inspect)
        patch.setitem(sys.modules, "matplotlib", None)
        patch.delitem(sys.modules, "randlora_ext.cli.plot")
        assert "pip install matplotlib" in refused(*inspect[:-1], tmp_path / "b.png")
    assert ".png" in refused(*inspect[:-1], tmp_path / "dw.pdf")
    assert "does not exist" in refused(*inspect[:-1], tmp_path / "no" / "dw.png")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_fresh_adapter_has_rank_zero(tmp_path, base_folder):
    accelerated.enable()
    config = accelerated.RandLoraConfig(r=5, target_modules=["q_proj"], basis="independent")
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "a")
    png = tmp_path / "dw.png"
    code, out, _ = run("inspect", tmp_path / "a", "--base", base_folder, "--plot", png)
    assert code == 0 and row_of(out, Q0)[-3:] == ["0", "0.0", "0.0"] and png.exists()


def test_ranks_of_known_spectra():
    flat, one = Spectrum.of(torch.full((7,), 3.0)), Spectrum.of(torch.tensor([2.0, 0.0, 0.0]))
    assert flat.effective_rank == pytest.approx(7) and flat.stable_rank == pytest.approx(7)
    assert one.effective_rank == pytest.approx(1) and one.stable_rank == pytest.approx(1)
    half = Spectrum.of(torch.tensor([2.0, 1.0, 1.0]))
    assert half.effective_rank == pytest.approx(2**1.5) and half.stable_rank == pytest.approx(1.5)


def test_what_does_not_fit_is_told(tmp_path, base_folder):
    save_adapter(llama(hidden_size=64), tmp_path / "a", basis="independent")
    assert "min(in, out)" in refused("inspect", tmp_path / "a", "--base", base_folder)
    save_adapter(
        llama(hidden_size=64, intermediate_size=64),
        tmp_path / "block",
        targets=["down_proj"],
        **KINDS["block"],
    )
    llama(
        hidden_size=66, intermediate_size=64, num_attention_heads=3, num_key_value_heads=3
    ).save_pretrained(tmp_path / "wide")
    line = refused("inspect", tmp_path / "block", "--base", tmp_path / "wide")
    assert "layer 'model.layers.0.mlp.down_proj' does not fit: block bases of density=1/4" in line
    assert "neither a folder" in refused("inspect", tmp_path / "a", "--base", "no/such-model")
    assert "no regular" in refused("inspect", tmp_path / "a", "--layers", "(")
    assert "none of 8" in refused("inspect", tmp_path / "a", "--layers", "k_proj")
    (tmp_path / "base").mkdir()
    assert "neither model" in refused("inspect", tmp_path / "a", "--base", tmp_path / "base")
    (tmp_path / "file").write_text("")
    assert "damaged" in refused("inspect", tmp_path / "file")
    assert "adapter_config.json" in refused("inspect", tmp_path / "nowhere")
    assert "File name too long" in refused("inspect", "x" * 5000)


def test_stock_adapters_and_those_under_layers(tmp_path, base_folder):
    """Copies of the bases under every layer, as stock PEFT writes them, and under one alone."""
    from safetensors.torch import load_file, save_file

    config = peft.RandLoraConfig(r=5, target_modules=["q_proj", "up_proj"], sparse=True)
    model = peft.get_peft_model(llama(), config)
    with torch.no_grad():
        for layer in layers(model):
            layer.randlora_lambda["default"].normal_()
    model.save_pretrained(tmp_path / "stock")
    code, want, _ = run("inspect", tmp_path / "stock", "--base", base_folder)
    assert code == 0 and float(row_of(want, Q0)[-3]) > 0
    file = tmp_path / "stock" / "adapter_model.safetensors"
    saved = load_file(file)
    kept = [k for k in saved if k.endswith(("randlora_A", "randlora_B"))]
    assert len(kept) == 2 * 5
    own = [k for k in kept if Q0 in k]
    save_file({k: v for k, v in saved.items() if k not in kept or k in own}, file)
    code, got, _ = run("inspect", tmp_path / "stock", "--base", base_folder)
    assert code == 0 and row_of(got, Q0) == row_of(want, Q0)
