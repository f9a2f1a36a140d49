"""What the tensors of an adapter say of the adapter that they belong to (nn/adapter_record.py)."""

import copy
import json

import pytest
import torch

from randlora_ext.basis import BasisDescription
from randlora_ext.nn.adapter_record import AdapterRecord

HADAMARD = BasisDescription("hadamard", None, 7)
KEY = "model.q_proj.randlora_record.default._extra_state"


def record(bases=HADAMARD, r=32, randlora_alpha=640, in_features=8, out_features=4):
    return AdapterRecord(bases, r, randlora_alpha, in_features, out_features)


def test_a_record_is_json_in_ascii():
    tensor = record().get_extra_state()
    assert tensor.dtype == torch.uint8 and tensor.dim() == 1
    assert json.loads(bytes(tensor.tolist())) == {
        "projection_prng_key": "randlora_ext:hadamard-1:seed=7",
        "r": 32,
        "randlora_alpha": 640,
        "in_features": 8,
        "out_features": 4,
    }


@pytest.mark.parametrize("alpha", [640, 640.0])
def test_a_record_of_the_same_adapter(alpha):
    own, saved = record(), record(randlora_alpha=alpha).get_extra_state()
    assert own.misfits(KEY, saved) == []
    own.set_extra_state(saved)


OTHERS = {
    "seed": (
        record(BasisDescription("hadamard", None, 8)),
        "projection_prng_key of the tensors is 'randlora_ext:hadamard-1:seed=8', not "
        "'randlora_ext:hadamard-1:seed=7'",
    ),
    "kind": (
        record(BasisDescription("independent", 0.25, 7)),
        "projection_prng_key of the tensors is 'randlora_ext:independent-1:density=0.25:seed=7', "
        "not 'randlora_ext:hadamard-1:seed=7'",
    ),
    "r": (record(r=16), "r of the tensors is 16, not 32"),
    "alpha": (record(randlora_alpha=64.5), "randlora_alpha of the tensors is 64.5, not 640"),
    "in": (record(in_features=9), "in_features of the tensors is 9, not 8"),
    "out": (record(out_features=5), "out_features of the tensors is 5, not 4"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_every_field_counts(case):
    other, told = OTHERS[case]
    saved = other.get_extra_state()
    assert record().misfits(KEY, saved) == [told]
    with pytest.raises(RuntimeError, match="the tensors do not belong to the adapter") as caught:
        record().set_extra_state(saved)
    assert told in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_record_that_was_cast_or_averaged(dtype):
    """As by ``{key: value.bfloat16() ...}``, or by a mean of state dicts."""
    own, saved = record(), record().get_extra_state()
    assert own.misfits(KEY, saved.to(dtype)) == []
    assert own.misfits(KEY, 0.3 * saved + 0.7 * saved) == []


def test_a_record_is_neither_cast_nor_moved_nor_trained():
    one = record()
    wanted = one.get_extra_state()
    with torch.device("meta"):
        other = copy.deepcopy(one).half().to("meta")
        assert torch.equal(other.get_extra_state(), wanted)
    assert not [*one.parameters(), *one.buffers()]


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
        torch.zeros(4, device="meta"),
        None,
    ],
    ids=str,
)
def test_no_record(tensor):
    (told,) = record().misfits(KEY, tensor)
    assert told.startswith(f"{KEY} is no record of an adapter: ")
