"""randlora_ext.peft: saving and loading, together with stock PEFT."""

import json
import warnings

import pytest
import torch
from peft_helpers import (
    KINDS,
    AcceleratedLinear,
    Deep,
    Net,
    StockLinear,
    accelerated,
    assert_close,
    config,
    deep_config,
    inputs,
    layers,
    pair,
    peft,
    randomize,
    relative,
    run,
    runs_on_kernels,
)

pytestmark = pytest.mark.usefixtures("one_thread", "stock_peft")


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writer", ["stock", "ours"])
def test_each_reads_what_the_other_wrote(tmp_path, writer, kind, save_projection):
    options = {kind: True, "save_projection": save_projection}
    stock, ours = pair(Deep(), lambda: deep_config(5, **options))
    x = torch.randn(6, 24)
    model, reader = (stock, "ours") if writer == "stock" else (ours, "stock")
    model.save_pretrained(tmp_path)
    accelerated.enable() if reader == "ours" else accelerated.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Specified to not save basis_A")
        # Ours writes the shared bases once, and stock asks for a copy under every layer.
        warnings.filterwarnings("ignore", message="Found missing adapter keys .*randlora_A")
        loaded = peft.PeftModel.from_pretrained(Deep(), tmp_path)
    assert type(layers(loaded)[0]) is (AcceleratedLinear if reader == "ours" else StockLinear)
    assert relative(loaded(x), model(x)) < 1e-5
    assert "density" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_projections_of_the_file_replace_those_of_the_key(tmp_path):
    accelerated.enable()
    model = randomize(peft.get_peft_model(Deep(), deep_config(5, sparse=True)))
    x = torch.randn(6, 24)
    model.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    description["projection_prng_key"] = 99
    (tmp_path / "adapter_config.json").write_text(json.dumps(description))
    loaded = peft.PeftModel.from_pretrained(Deep(), tmp_path)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_density_round_trip_as_in_the_demo(tmp_path, low_cpu_mem_usage):
    accelerated.enable()
    chosen = deep_config(5, accelerated.RandLoraConfig, density=0.07, save_projection=False)
    model = randomize(peft.get_peft_model(Deep(), chosen))
    assert runs_on_kernels(model)
    x = torch.randn(6, 24)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    keys = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert keys and all(key.endswith(("randlora_lambda", "randlora_gamma")) for key in keys)

    loaded = peft.PeftModel.from_pretrained(Deep(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert loaded.peft_config["default"].density == 0.07
    assert torch.equal(loaded(x), model(x))
    B = layers(loaded)[0].randlora_B["default"]
    assert 0.04 < B.count_nonzero() / B.numel() < 0.1
    # a second time, from the loaded model
    loaded.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(Deep(), tmp_path / "again")
    assert torch.equal(again(x), model(x))


def test_density_against_the_formula_on_its_dense_bases():
    accelerated.enable()
    chosen = config(7, accelerated.RandLoraConfig, density=0.1)
    model = randomize(peft.get_peft_model(Net(24, 40).double(), chosen))
    x, dy = inputs(24, 40, torch.float64)
    ours = run(model, x, dy)
    for layer in layers(model):
        layer.__class__ = StockLinear
    assert_close(ours, run(model, x, dy), 1e-10)


def test_density_one_third_is_sparse_and_readable_by_stock(tmp_path):
    accelerated.enable()
    chosen = deep_config(5, accelerated.RandLoraConfig, density=1 / 3, save_projection=False)
    model = randomize(peft.get_peft_model(Deep(), chosen))
    model.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).density == 1 / 3
    accelerated.disable()
    with pytest.warns(UserWarning, match="density"):
        loaded = peft.PeftModel.from_pretrained(Deep(), tmp_path)
    x = torch.randn(6, 24)
    assert relative(loaded(x), model(x)) < 1e-5


def test_stock_reads_any_density_with_saved_projections(tmp_path):
    accelerated.enable()
    chosen = deep_config(5, accelerated.RandLoraConfig, density=0.1)
    model = randomize(peft.get_peft_model(Deep(), chosen))
    model.save_pretrained(tmp_path)
    accelerated.disable()
    with pytest.warns(UserWarning, match="density"):
        loaded = peft.PeftModel.from_pretrained(Deep(), tmp_path)
    x = torch.randn(6, 24)
    assert relative(loaded(x), model(x)) < 1e-5


class Stopped(Exception):
    pass


@pytest.mark.parametrize("broken", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_save_that_stops_leaves_the_old_file(tmp_path, monkeypatch, broken):
    """safetensors from 0.8 on and our configuration write a temporary file and rename it."""
    accelerated.enable()
    chosen = deep_config(5, accelerated.RandLoraConfig, density=0.1, save_projection=False)
    model = randomize(peft.get_peft_model(Deep(), chosen))
    model.save_pretrained(tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = (tmp_path / broken).open("rb")  # what a reader of the old file goes on seeing
    randomize(model, seed=5)
    chosen.randlora_alpha = 33
    model.save_pretrained(tmp_path)
    assert (tmp_path / broken).read_bytes() != old[broken]
    assert kept.read() == old[broken]
    kept.close()
    now = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert now.keys() == old.keys()  # nothing temporary stays

    def stop(*_, **__):
        raise Stopped

    if broken.endswith("json"):
        monkeypatch.setattr("json.dumps", stop)
        with pytest.raises(Stopped):
            chosen.save_pretrained(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == now
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(AssertionError, match="should be a directory"):
        chosen.save_pretrained(file)
