"""What the tensors of an adapter say of their configuration (nn/adapter_record.py)."""

import json
import re

import pytest
import torch

from randlora_ext.nn.adapter_record import (
    RECORD_KEY,
    read_record,
    record_misfits,
    record_of,
    record_tensor,
)

OWN = record_of("randlora_ext:hadamard-1:seed=7", 32, 640, ["experts.a", "experts.b"])
AT = "base_model.model.layers.0.q_proj"


def tensors_of(record, at=AT):
    return {
        f"{at}.randlora_lambda": torch.zeros(1),
        f"{at}.{RECORD_KEY}": record_tensor(record, 8, 4),
    }


def test_a_record_is_json_in_ascii():
    tensor = record_tensor(OWN, 8, 4)
    assert tensor.dtype == torch.uint8 and tensor.dim() == 1
    assert json.loads(bytes(tensor.tolist())) == {
        "projection_prng_key": "randlora_ext:hadamard-1:seed=7",
        "r": 32,
        "randlora_alpha": 640,
        "target_parameters": ["experts.a", "experts.b"],
        "in_features": 8,
        "out_features": 4,
    }
    assert read_record("key", tensor) == OWN | {"in_features": 8, "out_features": 4}


def test_tensors_that_belong():
    for own in (OWN, OWN | {"randlora_alpha": 640.0}):
        assert list(record_misfits(tensors_of(OWN), own)) == []
    plain = record_of("randlora_ext:hadamard-1:seed=7", 32, 640)
    assert plain == record_of("randlora_ext:hadamard-1:seed=7", 32, 640, ())
    assert list(record_misfits({"head.weight": torch.zeros(1)}, plain)) == []


OTHERS = {
    "projection_prng_key": ("randlora_ext:hadamard-1:seed=8", "'.*seed=8', not '.*seed=7'"),
    "r": (16, "16, not 32"),
    "randlora_alpha": (64.5, "64.5, not 640"),
    "target_parameters": (["experts.b", "experts.a"], r"\['experts.b', .*, not \['experts.a', "),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_field_counts(name):
    value, message = OTHERS[name]
    tensors = tensors_of(OWN) | tensors_of(OWN | {name: value}, "two") | tensors_of(OWN, "three")
    (told,) = record_misfits(tensors, OWN)  # in any layer, once
    assert re.fullmatch(f"{name} of the tensors is {message}.*", told)
    (again,) = record_misfits(tensors_of(OWN | {name: value}), OWN)
    assert again == told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_record_that_was_cast_or_averaged(dtype):
    """As by ``{key: value.bfloat16() ...}``, or by a mean of state dicts."""
    record = tensors_of(OWN)[f"{AT}.{RECORD_KEY}"]
    tensors = tensors_of(OWN) | {f"{AT}.{RECORD_KEY}": record.to(dtype)}
    assert list(record_misfits(tensors, OWN)) == []
    tensors[f"{AT}.{RECORD_KEY}"] = 0.3 * record + 0.7 * record
    assert list(record_misfits(tensors, OWN)) == []


def test_a_layer_without_a_record():
    tensors = tensors_of(OWN) | {"two.randlora_lambda": torch.zeros(1)}
    assert list(record_misfits(tensors, OWN)) == [
        f"two.{RECORD_KEY} is missing, which says what the tensors belong to"
    ]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4),
        torch.tensor([float("nan")]),
        torch.tensor([float("inf")]),
        torch.zeros(4, dtype=torch.uint8),
        torch.tensor(7),
        torch.tensor([300]),
        torch.tensor([*b"[1]"], dtype=torch.uint8),
        torch.tensor([*b'{"r": 3}'], dtype=torch.uint8),
        torch.tensor([*b"[" * 100_000], dtype=torch.uint8),
        None,
    ],
    ids=str,
)
def test_no_record(tensor):
    (told,) = record_misfits({f"{AT}.{RECORD_KEY}": tensor}, OWN)
    assert told.startswith(f"{AT}.{RECORD_KEY} is no record of an adapter: ")
