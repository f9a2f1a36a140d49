"""Each program of examples/ runs at toy size, learns, and saves what can be opened again."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from language_models import llama
from peft_helpers import trainer_of
from safetensors.torch import load_file

import randlora_ext

EXAMPLES = Path(__file__).parents[2] / "examples"


def losses(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"^step \d+: loss ([\d.]+)$", output, re.M)]


def difference(output: str, what: str) -> float:
    return float(re.search(rf"{what}: relative difference (\S+)", output)[1])


def saved(folder: Path) -> list[str]:
    """The names of the tensors in an adapter, but records."""
    file = folder / "randlora-adapter" / "adapter_model.safetensors"
    names = [name for name in load_file(file) if "randlora_record" not in name]
    own = "_lambda", "_gamma", "_input_scale"
    assert all(name.endswith(own) or "classifier" in name for name in names)
    return names


def test_finetune_trainer(tmp_path, run_example):
    output = run_example("finetune_trainer.py", "--toy")
    first, last = map(float, re.search(r"^loss (\S+) -> (\S+)$", output, re.M).groups())
    assert last < first and "14 RandLoRA layers: " in output
    assert "calibrated the adapter" in output
    assert difference(output, "reloaded") < 1e-5 and len(saved(tmp_path)) == 42


def test_plain_pytorch(tmp_path, run_example):
    output = run_example("plain_pytorch.py", "--toy")
    assert losses(output)[-1] < losses(output)[0]
    assert difference(output, "reloaded") == 0 and difference(output, "merged") < 1e-5
    adapter = torch.load(tmp_path / "randlora-adapter" / "adapter.pt")
    assert len(adapter) == 56  # of 14 layers lambda, gamma, input scale and record


def test_quantized_base(tmp_path, run_example):
    pytest.importorskip("bitsandbytes")
    output = run_example("quantized_base.py", "--toy")
    assert losses(output)[-1] < losses(output)[0] and len(saved(tmp_path)) == 42
    assert "14 layers of 4 bits; 14 RandLoRA layers: " in output


def test_vision(tmp_path, run_example):
    pytest.importorskip("sklearn")
    output = run_example("vision.py", "--toy", "--steps", 50, "--lr", 2e-3)
    assert losses(output)[-1] < losses(output)[0] / 10 and "10 RandLoRA layers: " in output
    before, after = map(float, re.search(r"images: (\S+)% -> (\S+)%", output).groups())
    assert before < 55 and after > 80  # of ten digits, of which the base has seen five
    assert difference(output, "reloaded") < 1e-5
    assert len(saved(tmp_path)) == 32 and sum("classifier" in key for key in saved(tmp_path)) == 2


def trains_and_loads(model, load, folder):
    """One step moves lambda, and what was saved opens with the same logits."""
    assert type(model.base_model).__name__ == "AcceleratedRandLoraModel"
    tokens = torch.arange(6)[None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.save_pretrained(folder)
    want = model.eval()(tokens).logits
    assert torch.equal(load(str(folder)).eval()(tokens).logits, want)
    assert not torch.allclose(llama()(tokens).logits, want)


def test_axolotl(tmp_path, monkeypatch, stock_peft):
    """Against axolotl's own loader; its requirements exclude ours, so it is tested where it is."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    pytest.importorskip("axolotl")
    from axolotl.integrations.base import PluginManager
    from axolotl.loaders.adapter import load_adapter
    from axolotl.utils.dict import DictDefault

    monkeypatch.syspath_prepend(EXAMPLES)
    manager = PluginManager.get_instance()
    manager.register("axolotl_randlora.RandLoraPlugin")
    assert manager.supports_adapter("randlora")
    cfg = DictDefault(adapter="randlora", lora_r=4, lora_alpha=80, lora_target_linear=True)

    def load(folder=None, **options):
        changed = DictDefault(cfg | {"lora_model_dir": folder})
        return load_adapter(llama(), changed, "randlora", **options)

    model, config = load()
    trainer = trainer_of(model, tmp_path / "trainer", [torch.arange(6)])
    (callback,) = manager.add_callbacks_post_trainer(cfg, trainer)
    assert isinstance(callback, randlora_ext.ForgettingBudget)
    assert not manager.add_callbacks_post_trainer(DictDefault(adapter="lora"), trainer)
    assert config.r == 4 and load(config_only=True)[0] is None
    trains_and_loads(model, lambda folder: load(folder)[0], tmp_path)
    with pytest.raises(ValueError, match="needs lora_r, lora_alpha"):
        load_adapter(llama(), DictDefault(adapter="randlora"), "randlora")


def test_ms_swift(tmp_path, monkeypatch, stock_peft):
    pytest.importorskip("swift.tuner_plugin")
    from swift.callbacks import callbacks_map
    from swift.tuner_plugin import tuners_map

    monkeypatch.syspath_prepend(EXAMPLES)
    importlib.import_module("ms_swift_randlora")
    tuner = tuners_map["randlora"]
    base = llama()
    base.model_meta = SimpleNamespace(model_arch=None)
    args = SimpleNamespace(
        lora_rank=4, lora_alpha=80.0, lora_dropout=0.0, target_modules=["all-linear"]
    )
    model = tuner.prepare_model(args, base)
    assert sum(hasattr(m, "randlora_lambda") for m in model.modules()) == 14
    trainer = trainer_of(model, tmp_path / "trainer", [torch.arange(6)])
    callback = callbacks_map["forgetting"](None, trainer)
    assert isinstance(callback, randlora_ext.ForgettingBudget)
    tuner.save_pretrained(model, str(tmp_path / "tuner"))
    assert (tmp_path / "tuner" / "adapter_model.safetensors").exists()
    trains_and_loads(model, lambda folder: tuner.from_pretrained(llama(), folder), tmp_path)
