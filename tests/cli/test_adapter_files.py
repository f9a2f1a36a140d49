"""Adapter files that are cut off, altered, of another version or hostile: an error, and nothing
changes."""

import json
import os
import pickle
import struct

import pytest
import torch
from peft_helpers import accelerated, assert_unchanged, made, numbers, opened
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("stock_peft")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Victim:
    """A model in use, and a good adapter beside it that a test spoils."""

    def __init__(self, folder):
        options = {"density": 0.2, "basis": "independent"}
        self.folder, self.model, self.x = folder, made(**options), torch.randn(6, 24)
        made(1, **options).save_pretrained(folder)
        self.weights = (folder / WEIGHTS).read_bytes()
        self.config = json.loads((folder / CONFIG).read_text())
        self.state, self.y = numbers(self.model), self.model(self.x).detach()
        # The adapter in use is to be replaced.
        self.load_over = lambda: self.model.load_adapter(folder, "default")
        self.load_beside = lambda: self.model.load_adapter(folder, "two")
        self.load_anew = lambda: opened(folder)

    def write(self, weights=None, **changes):
        """Without weights, but with changes, as another program: nothing is recorded."""
        (self.folder / WEIGHTS).write_bytes(self.weights if weights is None else weights)
        if changes and weights is None:
            save_file(load_file(self.folder / WEIGHTS), self.folder / WEIGHTS)
        (self.folder / CONFIG).write_text(json.dumps(self.config | changes))

    def assert_unchanged(self):
        assert_unchanged(self.model, self.state)
        assert self.model.active_adapters == ["default"]
        assert torch.equal(self.model(self.x), self.y)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests: torch's GEMM may round otherwise with two
    yield Victim(tmp_path_factory.mktemp("victim"))
    torch.set_num_threads(threads)


@pytest.fixture
def victim(shared, stock_peft):
    accelerated.enable()
    shared.write()
    shared.assert_unchanged()
    return shared


def spoiled(weights: bytes) -> dict[str, bytes]:
    (length,) = struct.unpack("<Q", weights[:8])
    header, data = json.loads(weights[8 : 8 + length]), weights[8 + length :]
    name, other = [name for name in header if name != "__metadata__"][:2]
    first, begin = header[name], header[name]["data_offsets"][0]

    def joined(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + data

    def with_first(**changes) -> bytes:
        return joined(json.dumps(header | {name: first | changes}).encode())

    return {
        "header of 2^63 bytes": struct.pack("<Q", 2**63) + weights[8:],
        "header nested 100,000 deep": joined(b"[" * 100_000),
        "bytes left over": weights + b"x",
        "integers": with_first(dtype="I32"),
        "shape of another size": with_first(shape=[*first["shape"], 2]),
        "offsets beyond the end": with_first(data_offsets=[begin, 2**40]),
        "another tensor's place": with_first(**header[other]),
        "transposed": with_first(shape=first["shape"][::-1]),
        "a pickle": pickle.dumps({name: [1.0]}),
        **{f"cut off at {cut}": weights[:cut] for cut in range(0, len(weights), len(weights) // 9)},
    }


def test_a_spoiled_file_raises_and_changes_nothing(victim):
    for case, weights in spoiled(victim.weights).items():
        victim.write(weights)
        for load in (victim.load_over, victim.load_anew):
            with pytest.raises(Exception) as caught:  # safetensors has its own class
                load()
            assert not isinstance(caught.value, (AssertionError, AttributeError)), case
            victim.assert_unchanged()


def test_a_sound_file_is_loaded(victim):
    victim.load_over()
    assert not torch.equal(victim.model(victim.x), victim.y)
    victim.model.load_state_dict(victim.state)


def test_nothing_of_a_pickle_runs(victim):
    mark = victim.folder / "ran"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    (victim.folder / WEIGHTS).unlink()
    file = victim.folder / "adapter_model.bin"
    for write in (torch.save, lambda state, file: file.write_bytes(pickle.dumps(state))):
        write({"base_model.model.a": Hostile()}, file)
        for load in (victim.load_over, victim.load_anew):
            with pytest.raises(Exception, match="(?i)weights.only|unpickl"):
                load()
            victim.assert_unchanged()
    file.unlink()
    assert not mark.exists()


KEY = "randlora_ext:independent-{}:density=0.2:seed={}"
BAD_CONFIGS = [
    {"density": 2.0}, {"density": float("nan")}, {"r": 0}, {"r": 2**70}, {"r": 2**31 - 1},
    {"basis": "other"}, {"target_modules": ["nowhere"]}, {"randlora_dropout": 1.5},
    {"projection_prng_key": KEY.format(2, 5)},  # of a specification to come
    {"projection_prng_key": KEY.format(1, 2**64)}, {"projection_prng_key": "__import__('os')"},
    {"projection_prng_key": "randlora_ext:peft-1:density=0.20:seed=5"},
    {"projection_prng_key": 10**300}, {"randlora_alpha": float("nan")}, {"randlora_alpha": 10**400},
    {"peft_type": "RANDLORA2"}, {"peft_type": 5}, "", "[]", '{"peft_type"', "\x00\xff",
]  # fmt: skip


@pytest.mark.parametrize("change", BAD_CONFIGS, ids=str)
def test_a_bad_config_raises_and_changes_nothing(victim, change):
    if isinstance(change, str):
        (victim.folder / CONFIG).write_text(change)
    else:
        victim.write(**change)
    for load in (victim.load_anew, victim.load_beside):
        with pytest.raises((ValueError, TypeError, RuntimeError, KeyError)):
            load()
        victim.assert_unchanged()


FIELDS = [
    *("density", "r", "randlora_alpha", "randlora_dropout", "bias", "projection_prng_key", "basis"),
    *("sparse", "very_sparse", "save_projection", "fan_in_fan_out", "init_weights"),
    *("inference_mode", "target_modules", "layers_pattern", "modules_to_save"),
    "layers_to_transform",
]


def test_a_field_of_a_wrong_type_is_named(victim):
    for field in FIELDS:
        for value in ({"a": 1}, [[]]):
            victim.write(**{field: value})
            for load in (victim.load_anew, victim.load_beside):
                with pytest.raises((TypeError, ValueError), match=f"^{field}\\b.* must be "):
                    load()
    victim.assert_unchanged()
