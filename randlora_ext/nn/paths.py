"""Where our layers lie in the path of a module or of a saved tensor."""

from collections.abc import Container, Mapping

# Names that torch.compile and activation checkpointing put into the paths of modules.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def in_base_model(path: str, layers: Container[str]) -> str:
    """The path in the base model: without what wrappers and our layers have put into it.

    `layers` are the paths of our layers, as `path` has them. Each keeps what it replaced as
    ``base_layer``, but a user's module may have that name, too: one is ours directly below a layer.
    """
    kept = []
    names = path.split(".")
    for depth, name in enumerate(names):
        is_ours = name == "base_layer" and ".".join(names[:depth]) in layers
        if not is_ours and name not in _WRAPPERS:
            kept.append(name)
    return ".".join(kept)


def nesting(path: str, layers: Container[str]) -> int:
    """How many of our layers lie around the one at `path`, of other parameters of its module."""
    depth = 0
    while path.endswith(".base_layer") and path.removesuffix(".base_layer") in layers:
        path = path.removesuffix(".base_layer")
        depth += 1
    return depth


def in_file(path: str, layers: Mapping[str, int]) -> str:
    """The opposite of `in_base_model`: the path in the base model with ``base_layer`` put in.

    `layers` says how many of our layers lie around a module, by its path in the base model.
    """
    kept = []
    names = path.split(".") if path else []
    for depth, name in enumerate(names):
        kept += ["base_layer"] * layers.get(".".join(names[:depth]), 0)
        kept.append(name)
    return ".".join(kept)
