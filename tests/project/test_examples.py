"""Each program of examples/ runs at toy size, learns, and saves what can be opened again."""

import functools
import importlib
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import cli_helpers
import pytest
import torch
from layer_cases import run_python
from safetensors.torch import load_file

from randlora_ext.nn.adapter_file import read_adapter_file

EXAMPLES = Path(__file__).parents[2] / "examples"


def losses(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"^step \d+: loss ([\d.]+)$", output, re.M)]


def difference(output: str, what: str) -> float:
    return float(re.search(rf"{what}: largest difference (\S+)", output)[1])


def saved(folder: Path) -> list[str]:
    """The names of the tensors in an adapter of PEFT."""
    names = list(load_file(folder / "randlora-adapter" / "adapter_model.safetensors"))
    assert all(name.endswith(("_lambda", "_gamma")) or "classifier" in name for name in names)
    return names


def test_finetune_trainer(tmp_path, run_example):
    output = run_example("finetune_trainer.py", "--toy")
    first, last = map(float, re.search(r"^loss (\S+) -> (\S+)$", output, re.M).groups())
    assert last < first
    assert "14 RandLoRA layers on randlora_ext's" in output
    assert difference(output, "reloaded") < 1e-5 and len(saved(tmp_path)) == 28


def test_plain_pytorch(tmp_path, run_example):
    output = run_example("plain_pytorch.py", "--toy")
    assert losses(output)[-1] < losses(output)[0]
    assert difference(output, "reloaded") == 0 and difference(output, "merged") < 1e-4
    assert len(load_file(tmp_path / "randlora-adapter" / "randlora.safetensors")) == 28


def test_quantized_base(tmp_path, run_example):
    pytest.importorskip("bitsandbytes")
    output = run_example("quantized_base.py", "--toy")
    assert losses(output)[-1] < losses(output)[0] and len(saved(tmp_path)) == 28
    assert "14 layers of 4 bits; 14 RandLoRA layers on randlora_ext's" in output


def test_vision(tmp_path, run_example):
    pytest.importorskip("sklearn")
    output = run_example("vision.py", "--toy", "--steps", 50, "--lr", 2e-3)
    assert losses(output)[-1] < losses(output)[0] / 10
    assert "10 RandLoRA layers on randlora_ext's" in output
    before, after = map(float, re.search(r"images: (\S+)% -> (\S+)%", output).groups())
    assert before < 55 and after > 80  # of ten digits, of which the base has seen five
    assert difference(output, "reloaded") < 1e-5
    assert len(saved(tmp_path)) == 22 and sum("classifier" in key for key in saved(tmp_path)) == 2


# As torchrun, which would import for each rank, but forked when all is imported.
RANKS = """
import os, runpy, sys
import torch.distributed.tensor.parallel, transformers.models.llama.modeling_llama, randlora_ext
os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": sys.argv[1]}
del sys.argv[:2]
rank = 0 if os.fork() else 1
os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]) if rank == 0 else 0)
"""


def test_tensor_parallel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    output = run_python("-c", RANKS, port, EXAMPLES / "tensor_parallel.py", "--toy")
    assert losses(output)[-1] < losses(output)[0]
    # Every weight divides by two ranks: 64 x 64, 32, 32, 64, 128, 128 and 64 x 128, two blocks.
    weights = 2 * 4 * 64 * (64 + 32 + 32 + 64 + 3 * 128) // 2
    assert f"2 ranks; each holds {weights:,} bytes of weights" in output
    assert difference(output, "in one process") < 1e-4
    file = tmp_path / "randlora-adapter" / "randlora.safetensors"
    assert len(load_file(file)) == 28 and len(read_adapter_file(file).layers) == 14


def trains_and_loads(model, load, folder):
    """One step moves lambda, and what was saved opens with the same logits."""
    tokens = torch.arange(6)[None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.save_pretrained(folder)
    want = model.eval()(tokens).logits
    assert torch.equal(load(folder).eval()(tokens).logits, want)
    assert not torch.allclose(cli_helpers.llama()(tokens).logits, want)


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
        return load_adapter(cli_helpers.llama(), changed, "randlora", **options)

    model, config = load()
    assert type(model.base_model).__name__ == "AcceleratedRandLoraModel" and config.r == 4
    assert load(config_only=True)[0] is None
    trains_and_loads(model, lambda folder: load(str(folder))[0], tmp_path)
    with pytest.raises(ValueError, match="needs lora_r, lora_alpha"):
        load_adapter(cli_helpers.llama(), DictDefault(adapter="randlora"), "randlora")


def test_ms_swift(tmp_path, monkeypatch, stock_peft):
    pytest.importorskip("swift.tuner_plugin")
    from swift.tuner_plugin import tuners_map

    monkeypatch.syspath_prepend(EXAMPLES)
    importlib.import_module("ms_swift_randlora")
    tuner = tuners_map["randlora"]
    base = cli_helpers.llama()
    base.model_meta = SimpleNamespace(model_arch=None)
    args = SimpleNamespace(
        lora_rank=4, lora_alpha=80.0, lora_dropout=0.0, target_modules=["all-linear"]
    )
    model = tuner.prepare_model(args, base)
    assert type(model.base_model).__name__ == "AcceleratedRandLoraModel"
    layers = [m for m in model.modules() if hasattr(m, "randlora_lambda")]
    assert len(layers) == 14
    tuner.save_pretrained(model, str(tmp_path / "tuner"))
    assert (tmp_path / "tuner" / "adapter_model.safetensors").exists()
    load = functools.partial(tuner.from_pretrained, cli_helpers.llama())
    trains_and_loads(model, lambda folder: load(str(folder)), tmp_path / "trained")
