"""``randlora merge`` of what is broken or hostile: one line, exit code 2, nothing written."""

import shutil

import pytest
import torch
from cli_helpers import Q0, added, edit, refused, run, sharded
from safetensors.torch import load_file, save_file

from randlora_ext.cli.checkpoint import Checkpoint
from randlora_ext.nn.adapter_record import RECORD_KEY

pytestmark = [
    pytest.mark.usefixtures("stock_peft"),
    pytest.mark.filterwarnings("ignore:Specified to not save", "ignore:RandLoRA layers of this"),
]


def config(**changes):
    return lambda root: edit(root / CONFIG, **changes)


def recording(text):
    record = torch.tensor([*text.encode()], dtype=torch.uint8)
    return added(**{f"{Q0}.{RECORD_KEY}": record})


def without_gamma(root):
    tensors = load_file(root / WEIGHTS)
    del tensors[next(name for name in tensors if name.endswith(GAMMA))]
    save_file(tensors, root / WEIGHTS)


def index(**weight_map):
    return lambda root: edit(root / "model" / INDEX, weight_map=weight_map)


def written(name, content):
    """`content`: text or bytes, or a function of the bytes that are there."""

    def write(root):
        file = sorted(root.glob(name))[0]
        new = content(file.read_bytes()) if callable(content) else content
        file.write_bytes(new if isinstance(new, bytes) else new.encode())

    return write


INDEX, CONFIG = "model.safetensors.index.json", "adapter/adapter_config.json"
SHARD, WEIGHTS = "model/model-*.safetensors", "adapter/adapter_model.safetensors"
LAMBDA, GAMMA = f"{Q0}.randlora_lambda", f"{Q0}.randlora_gamma"
DEEP = "[" * 100_000
BROKEN = {
    "no model": (lambda r: shutil.rmtree(r / "model"), "model does not exist here"),
    "no adapter": (lambda r: shutil.rmtree(r / "adapter"), "adapter does not exist here"),
    "out exists": (lambda r: ((r / "out").mkdir(), (r / "out" / "a").touch()), "exists"),
    "shard missing": (lambda r: sorted(r.glob(SHARD))[0].unlink(), "No such file or directory"),
    "shard truncated": (written(SHARD, lambda data: data[:-5]), "must be a sound"),
    "index leads out": (index(w="../adapter/x"), "model/x must be a sound"),
    "model config deep": (written("model/config.json", DEEP), "config.json: maximum recursion"),
    "quantized": (
        lambda r: edit(r / "model" / "config.json", quantization_config={"load_in_4bit": True}),
        "quantized",
    ),
    "adapter truncated": (written(WEIGHTS, lambda data: data[:-5]), "damaged"),
    "adapter pickled": (
        lambda r: (r / WEIGHTS).rename(r / "adapter" / "adapter_model.bin"), "is a pickle: open it",
    ),
    "bad density": (config(density=7), "density"),
    "r zero": (config(r=0), "r must be"),
    "other r": (config(r=6), "r of the tensors is 5, not 6"),
    "other alpha": (config(randlora_alpha=7), "randlora_alpha of the tensors is "),
    "no record": (recording("{}"), "is no record of an adapter: KeyError"),
    "a list recorded": (recording("[]"), "is no record of an adapter: TypeError"),
    "no JSON recorded": (recording("["), "is no record of an adapter: JSONDecodeError"),
    "alpha huge": (config(randlora_alpha=10**400), "randlora_alpha must be a finite number"),
    "other model": (
        lambda root: sharded(root / "model", hidden_size=64),
        "down_proj is of in_features and out_features (48, 32), and must be of (48, 64)",
    ),
    "other names": (
        added(**{"x.randlora_lambda": torch.zeros(5, 7), "x.randlora_gamma": torch.zeros(7, 32)}),
        "x.randlora_record._extra_state is missing",
    ),
    "gamma's shape": (
        added(**{GAMMA: torch.zeros(3, 32)}), "randlora_gamma is (3, 32), and must be (7, 32)"
    ),
    "integers": (added(**{GAMMA: torch.zeros(7, 32, dtype=torch.int8)}), "floating point"),
    "not finite": (added(**{LAMBDA: torch.full((5, 7), torch.nan)}), "NaN or inf"),
    "lambda alone": (without_gamma, f"{GAMMA} is missing"),
    "modules_to_save lacks one": (
        config(modules_to_save=["norm"]), "lacks model.norm.weight, though modules_to_save has 'no",
    ),
    "unknown tensor": (added("", x=torch.zeros(1)), "the adapter holds x (1,), which"),
    "not PEFT's": (
        added(**{f"{Q0}.weight": torch.randn(32, 32)}), "which an adapted layer does not have"
    ),
    "a new head": (added(**{"score.weight": torch.zeros(2, 32)}), "merge by merge_and_unload"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_hostile_input(whole, broken):
    breaking, message = BROKEN[broken]
    breaking(whole)
    left = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    line = refused("merge", whole / "model", whole / "adapter", whole / "out")
    assert message in line
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == left


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_nothing(whole, monkeypatch, error):
    written = []

    def fail_late(*arguments):
        written.append(arguments)
        if len(written) == 5:
            raise error

    monkeypatch.setattr(Checkpoint, "write", fail_late)
    code, out, err = run("merge", whole / "model", whole / "adapter", whole / "out")
    assert code in (2, 130) and out == "" and len(written) == 5
    assert sorted(p.name for p in whole.iterdir()) == ["adapter", "model"]
