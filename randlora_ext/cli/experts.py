"""Where a model folder holds a fused parameter: as one tensor, or a few for every expert."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import CliError
from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from .adapter import Change

# transformers fuses the linear layers of one expert, rows below rows, when it reads a file.
_FUSED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
# Of transformers, whose modules say is_transposed.
TRANSPOSED_MODELS = "gpt_oss", "openai_privacy_filter"


def tensors_of(name: str, checkpoint: Checkpoint) -> list[str]:
    """The names of those that make up parameter `name`, by the adapter's prefix, "{}" for the
    expert."""
    path, _, own = name.rpartition(".")
    paths = path, path.replace(".mlp.", ".block_sparse_moe.")  # Mixtral's
    forms = [[f"{p}.{{}}.{part}.weight" for part in f] for p in paths for f in _FUSED.get(own, ())]
    for form in ([name], *forms):
        first = form[0].format(0)
        if any(t.endswith(first) or first.endswith(t) for t in checkpoint.tensors):
            return form
    raise CliError(f"{checkpoint.folder} has no {name}, nor what it is made of; merge_and_unload")


def sizes_of(
    names: Sequence[str], name_in: Callable[[str], str], checkpoint: Checkpoint, transposed: bool
) -> tuple[int, int]:
    """(in_features, out_features) of each expert."""
    entries = [checkpoint.tensors[name_in(name.format(0))] for name in names]
    if any(entry.dtype is None or len(entry.shape) < 2 for entry in entries):
        raise CliError(f"{entries[0].file}: {names[0]} must hold float64, float32 or 16-bit floats")
    shapes = [entry.shape for entry in entries]
    *_, rows, columns = shapes[0]
    rows = sum(shape[-2] for shape in shapes)
    return (rows, columns) if transposed else (columns, rows)


def spread(change: "Change", names: Sequence[str], name_in: Callable, checkpoint: Checkpoint):
    """(tensor, its change) for all experts; `change` is that of their stack."""
    if "{}" not in names[0]:
        yield name_in(names[0]), change
        return
    for e, (lam, gam) in enumerate(zip(change.lam, change.gam, strict=True)):
        start = 0
        for name in (name_in(name.format(e)) for name in names):
            if name not in checkpoint.tensors:
                raise CliError(f"{checkpoint.folder} has no tensor {name}")
            stop = start + checkpoint.tensors[name].shape[0]
            yield name, change._replace(lam=lam, gam=gam, rows=slice(start, stop))
            start = stop
