"""Each program of examples/ runs at toy size, learns, and saves what can be opened again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("there are no examples beside these tests", allow_module_level=True)
pytest.importorskip("transformers")
pytest.importorskip("peft")

from randlora_ext.cli.adapter import read_adapter  # noqa: E402


def run(name: str, folder: Path, *launcher: str) -> str:
    """Its output; the environment is a newcomer's, without the network."""
    command = [sys.executable, *launcher, str(EXAMPLES / name), "--toy"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"^step \d+: loss ([\d.]+)$", output, re.M)]


def difference(output: str, what: str) -> float:
    return float(re.search(rf"{what}: largest difference (\S+)", output)[1])


def test_finetune_trainer(tmp_path):
    output = run("finetune_trainer.py", tmp_path)
    first, last = map(float, re.search(r"^loss (\S+) -> (\S+)$", output, re.M).groups())
    assert last < first
    assert "14 RandLoRA layers on randlora_ext's" in output
    assert difference(output, "reloaded") < 1e-5
    saved = load_file(tmp_path / "randlora-adapter" / "adapter_model.safetensors")
    assert len(saved) == 28 and all(k.endswith(("_lambda", "_gamma")) for k in saved)


def test_plain_pytorch(tmp_path):
    output = run("plain_pytorch.py", tmp_path)
    assert losses(output)[-1] < losses(output)[0]
    assert difference(output, "reloaded") == 0
    assert difference(output, "merged") < 1e-4
    assert len(load_file(tmp_path / "randlora-adapter" / "randlora.safetensors")) == 28


def test_quantized_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    output = run("quantized_base.py", tmp_path)
    assert losses(output)[-1] < losses(output)[0]
    assert "14 layers of 4 bits; 14 RandLoRA layers on randlora_ext's" in output
    saved = load_file(tmp_path / "randlora-adapter" / "adapter_model.safetensors")
    assert len(saved) == 28 and all(k.endswith(("_lambda", "_gamma")) for k in saved)


def test_vision(tmp_path):
    pytest.importorskip("sklearn")
    output = run("vision.py", tmp_path)
    assert losses(output)[-1] < losses(output)[0] / 10
    assert "10 RandLoRA layers on randlora_ext's" in output
    before, after = map(float, re.search(r"images: (\S+)% -> (\S+)%", output).groups())
    assert before < 55 and after > 80  # of ten digits, of which the base has seen five
    assert difference(output, "reloaded") < 1e-5
    saved = load_file(tmp_path / "randlora-adapter" / "adapter_model.safetensors")
    assert len(saved) == 22 and sum("classifier" in key for key in saved) == 2


def test_tensor_parallel(tmp_path):
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    output = run("tensor_parallel.py", tmp_path, *launcher)
    assert losses(output)[-1] < losses(output)[0]
    # Every weight divides by two ranks: 64 x 64, 32, 32, 64, 128, 128 and 64 x 128, two blocks.
    weights = 2 * 4 * 64 * (64 + 32 + 32 + 64 + 3 * 128) // 2
    assert f"2 ranks; each holds {weights:,} bytes of weights" in output
    assert difference(output, "in one process") < 1e-4
    file = tmp_path / "randlora-adapter" / "randlora.safetensors"
    assert len(load_file(file)) == 28 and len(read_adapter(file).diagonals) == 14


def test_every_example_is_run():
    elsewhere = {"causal_lm.py", "smollm2.py"}  # shared code; tests/demo has the files it needs
    programs = {path.name for path in EXAMPLES.glob("*.py")} - elsewhere
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text()))
    assert programs - tested == set()
