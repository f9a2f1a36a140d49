"""What the tensors of an adapter say of the configuration that they belong to.

A folder holds an adapter in two files, adapter_config.json and adapter_model.safetensors. A process
may be killed between the two, and another may read them in between. Two adapters on generated bases
can have tensors of the same names and shapes and differ in the seed, so nothing else would notice.
Therefore each adapted layer has one more tensor, ``PATH.randlora_record._extra_state``: JSON in
ASCII, as uint8, of the fields without which lambda and gamma mean nothing, and of the layer's
sizes, which decide its bases and of which lambda and gamma show the smaller one. docs/formats.md
shows it. Adapters on bases that PEFT draws have none: their files are those of stock PEFT.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

RECORD = "randlora_record"
# After the layer's path. torch gives this name to what `nn.Module.get_extra_state` returns.
RECORD_KEY = f"{RECORD}._extra_state"
FIELDS = ("projection_prng_key", "r", "randlora_alpha", "target_parameters")
SIZES = ("in_features", "out_features")


def record_of(
    projection_prng_key: str,
    r: int,
    randlora_alpha: float,
    target_parameters: Iterable[str] | None = None,
) -> dict[str, Any]:
    """What the records of all layers have alike, by the names in adapter_config.json.

    Args:
        projection_prng_key: the key of a `BasisDescription`.
        r: the rank.
        randlora_alpha: dW is scaled by randlora_alpha / r.
        target_parameters: as in the configuration. The order counts: layers of experts in one
            module are nested in it.
    """
    values = projection_prng_key, r, randlora_alpha, [*(target_parameters or ())]
    return dict(zip(FIELDS, values, strict=True))


def record_tensor(record: Mapping[str, Any], in_features: int, out_features: int) -> Tensor:
    """The record of a layer of these sizes, uint8 (bytes,)."""
    sizes = {"in_features": in_features, "out_features": out_features}
    return torch.tensor([*json.dumps(dict(record) | sizes).encode("ascii")], dtype=torch.uint8)


def read_record(key: str, tensor: Any) -> dict[str, Any]:
    """The record in a tensor of the name `key`. ValueError if it is none.

    Floating point numbers will do: programs cast whole state dicts, or average those of several
    models, and what has the same bytes in all of these is the same record.
    """
    try:
        text = bytes(round(byte) for byte in tensor.tolist()).decode("ascii")
        record = json.loads(text)
        return {name: record[name] for name in (*FIELDS, *SIZES)}
    except (
        OverflowError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise ValueError(f"{key} is no record of an adapter: {error!r}") from error


def record_misfits(tensors: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    """Why `tensors`, by their names in a file, do not belong to the configuration with the record
    `own`: a layer has another record or none. Nothing if they belong to it.

    Only the first layer that differs is named. Values are compared as JSON gives them.
    """
    for key in tensors:
        if key.endswith(".randlora_lambda"):
            record_key = f"{key.removesuffix('randlora_lambda')}{RECORD_KEY}"
            if record_key not in tensors:
                yield f"{record_key} is missing, which says what the tensors belong to"
                break
    for key, tensor in tensors.items():
        found = differences(key, tensor, own) if key.endswith(RECORD_KEY) else []
        if found:
            yield from found
            break


def check_records(
    tensors: Mapping[str, Any], own: Mapping[str, Any], folder: str | os.PathLike
) -> None:
    """Raises ValueError, naming the folder that both were read from, if `record_misfits` of tensors
    and the record of the configuration gives a reason."""
    problems = list(record_misfits(tensors, own))
    if problems:
        reasons = "\n\t".join(problems)
        raise ValueError(
            f"{os.fspath(folder)} holds tensors that do not belong to its configuration, because a "
            "save was interrupted or is still running, or a file was edited. Load again, or save "
            f"the adapter again:\n\t{reasons}"
        )


def differences(key: str, tensor: Any, own: Mapping[str, Any]) -> list[str]:
    """In words, how the record in a tensor of the name `key` differs from `own`, which may lack
    sizes."""
    try:
        record = read_record(key, tensor)
    except ValueError as error:
        return [str(error)]
    own = json.loads(json.dumps(dict(own)))
    return [
        f"{name} of the tensors is {record[name]!r}, not {own[name]!r}"
        for name in own
        if record[name] != own[name]
    ]


class RecordedConfig(Protocol):
    """The fields of a configuration that a record has; target_parameters may be missing."""

    projection_prng_key: str
    r: int
    randlora_alpha: float


class AdapterRecord(nn.Module):
    """The record of one adapter in a layer: state dicts hold it, and it refuses tensors of another.

    It has neither parameters nor buffers, so nothing casts, moves or trains it. What it saves is
    what the configuration says at that time.

    Args:
        config: may have ``read_from``, the folder that it was read from.
        in_features: of the layer, as out_features.
    """

    def __init__(self, config: RecordedConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.config = config
        self.in_features, self.out_features = in_features, out_features

    def record(self) -> dict[str, Any]:
        config = self.config
        experts = getattr(config, "target_parameters", None)
        return record_of(config.projection_prng_key, config.r, config.randlora_alpha, experts)

    def misfits(self, key: str, tensor: Any) -> list[str]:
        """Why the adapter's layer cannot take tensors whose record is `tensor`."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return differences(key, tensor, self.record() | sizes)

    def advice(self) -> str:
        """What to do about misfits, the same for all layers of an adapter."""
        folder = getattr(self.config, "read_from", None)
        place = "was not read from a folder" if folder is None else f"was read from {folder}"
        return (
            f"the adapter's configuration {place}. If the tensors are from the same folder, its "
            "files are of two saves, one of which was interrupted or is still running: load "
            "again, or save the adapter again. An adapter that exists keeps its configuration; "
            "randlora_ext.peft.hotswap_adapter takes over another randlora_alpha"
        )

    def get_extra_state(self) -> Tensor:
        return record_tensor(self.record(), self.in_features, self.out_features)

    def set_extra_state(self, state: Any) -> None:
        # `refuse_misfit` has asked already, except for transformers' own loaders.
        problems = self.misfits(RECORD_KEY, state)
        if problems:
            lines = "\n\t".join([*problems, self.advice()])
            raise RuntimeError(f"the tensors do not belong to the adapter:\n\t{lines}")
