"""What the tensors of an adapter say of the adapter that they belong to.

A folder holds an adapter in two files, adapter_config.json and adapter_model.safetensors. A process
may be killed between the two, and another may read them in between. Two adapters on generated bases
can have tensors of the same names and shapes and differ in the seed, so nothing else would notice.
Therefore each adapted layer has one more tensor, ``PATH.randlora_record._extra_state``: JSON in
ASCII, as uint8, of the fields without which lambda and gamma mean nothing, and of the layer's
sizes, which decide its bases and of which lambda and gamma show the smaller one. docs/formats.md
shows it. Adapters on bases that PEFT draws have none: their files are those of stock PEFT.
"""

import json
from typing import Any

import torch
from torch import Tensor, nn

from ..basis import BasisDescription

RECORD = "randlora_record"


class AdapterRecord(nn.Module):
    """The record of one adapter in a layer: state dicts hold it, and it refuses tensors of another.

    It has neither parameters nor buffers, so nothing casts, moves or trains it.

    Args:
        bases: what generates A and B.
        r: the rank.
        randlora_alpha: dW is scaled by randlora_alpha / r.
        in_features: of the layer, as out_features.
    """

    def __init__(
        self,
        bases: BasisDescription,
        r: int,
        randlora_alpha: float,
        in_features: int,
        out_features: int,
    ) -> None:
        super().__init__()
        self.values = {
            "projection_prng_key": bases.key(),
            "r": r,
            "randlora_alpha": randlora_alpha,
            "in_features": in_features,
            "out_features": out_features,
        }

    def misfits(self, key: str, tensor: Any) -> list[str]:
        """In words, how the record `tensor`, which has the name `key`, differs from this one."""
        try:
            saved = _read(key, tensor, [*self.values])
        except ValueError as error:
            return [str(error)]
        own = json.loads(json.dumps(self.values))
        return [
            f"{name} of the tensors is {saved[name]!r}, not {own[name]!r}"
            for name in own
            if saved[name] != own[name]
        ]

    def get_extra_state(self) -> Tensor:
        text = json.dumps(self.values).encode("ascii")
        return torch.tensor([*text], dtype=torch.uint8, device="cpu")  # whatever the default is

    def set_extra_state(self, state: Any) -> None:
        # The layer has asked already, except for transformers' own loaders.
        problems = self.misfits(f"{RECORD}._extra_state", state)
        if problems:
            raise RuntimeError(other_adapter(problems))


def other_adapter(problems: list[str]) -> str:
    """The message about tensors of another adapter."""
    lines = "\n\t".join(dict.fromkeys(problems))
    return (
        "the tensors do not belong to the adapter. If they are from the same folder as its "
        "configuration, the files are of two saves, one of which was interrupted or is still "
        "running: load again, or save the adapter again. An adapter that exists keeps its "
        "configuration, also after a load that failed: call `delete_adapter` before you load "
        f"another in its place.\n\t{lines}"
    )


def _read(key: str, tensor: Any, names: list[str]) -> dict[str, Any]:
    """The values of these names in a record. ValueError if it is none.

    Floating point numbers will do: programs cast whole state dicts, or average those of several
    models, and what has the same bytes in all of these is the same record.
    """
    try:
        record = json.loads(bytes(round(byte) for byte in tensor.tolist()).decode("ascii"))
        return {name: record[name] for name in names}
    except (
        OverflowError,
        AttributeError,
        KeyError,
        NotImplementedError,  # of tensors on the meta device
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise ValueError(f"{key} is no record of an adapter: {error!r}") from error
