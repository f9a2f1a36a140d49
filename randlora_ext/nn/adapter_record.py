"""What the tensors of an adapter say of the configuration that they belong to.

A folder holds an adapter in two files, adapter_config.json and adapter_model.safetensors. A process
may be killed between the two, and another may read them in between. Two adapters on generated bases
can have tensors of the same names and shapes and differ in the seed, so nothing else would notice.
Therefore each adapted layer has one more tensor, ``PATH.randlora_record._extra_state``: JSON in
ASCII, as uint8, of the fields without which lambda and gamma mean nothing. docs/formats.md shows
it. Adapters on bases that PEFT draws have none: their files are those of stock PEFT.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

RECORD = "randlora_record"
# After the layer's path. torch gives this name to what `nn.Module.get_extra_state` returns.
RECORD_KEY = f"{RECORD}._extra_state"
FIELDS = ("projection_prng_key", "r", "randlora_alpha", "target_parameters")


def record_of(
    projection_prng_key: str,
    r: int,
    randlora_alpha: float,
    target_parameters: Iterable[str] | None = None,
) -> dict[str, Any]:
    """The fields of a record, by their names in adapter_config.json.

    Args:
        projection_prng_key: the key of a `BasisDescription`.
        r: the rank.
        randlora_alpha: dW is scaled by randlora_alpha / r.
        target_parameters: as in the configuration. The order counts: layers of experts in one
            module are nested in it.
    """
    values = projection_prng_key, r, randlora_alpha, [*(target_parameters or ())]
    return dict(zip(FIELDS, values, strict=True))


def record_tensor(record: Mapping[str, Any]) -> Tensor:
    """The tensor of a record, uint8 (bytes,)."""
    return torch.tensor([*json.dumps(dict(record)).encode("ascii")], dtype=torch.uint8)


def read_record(key: str, tensor: Any) -> dict[str, Any]:
    """The record in a tensor of the name `key`. ValueError if it is none."""
    try:
        text = bytes(tensor.tolist()).decode("ascii")
        record = json.loads(text)
        return {name: record[name] for name in FIELDS}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{key} is no record of an adapter: {error!r}") from error


def record_misfits(tensors: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    """Why `tensors`, by their names in a file, do not belong to the configuration with the record
    `own`: a layer has another record or none. Nothing if they belong to it.

    Each reason is given once, for the first layer. A value is compared as JSON gives it.
    """
    own = read_record("own", record_tensor(own))
    told = set()
    for key in tensors:
        at, _, name = key.rpartition(".randlora_lambda")
        if at and not name and f"{at}.{RECORD_KEY}" not in tensors:
            yield f"{at}.{RECORD_KEY} is missing, which says what the tensors belong to"
            break
    for key, tensor in tensors.items():
        if not key.endswith(RECORD_KEY):
            continue
        try:
            record = read_record(key, tensor)
        except ValueError as error:
            yield str(error)
            return
        for name in FIELDS:
            if name not in told and record[name] != own[name]:
                told.add(name)
                yield f"{name} of the tensors is {record[name]!r}, not {own[name]!r}"
