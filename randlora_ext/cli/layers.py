"""The bases and the weight change of each layer of a saved adapter."""

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..basis import TernaryBasis
from ..basis.description import BasisDescription
from ..ops.functional import delta_weight, merged_weight
from ..reference import delta_weight_reference
from .adapter import BASES, Adapter
from .checkpoint import Checkpoint, find_base, locate
from .files import CliError, first_line


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a layer; `transposed`: the model stores its weight as (in, out), as Conv1D does."""

    in_features: int
    out_features: int
    dtype: torch.dtype = torch.float32
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class LayerChange:
    """dW of one layer, from a ternary basis or from dense A (r, d) and B (D, K)."""

    shape: Shape
    bases: TernaryBasis | tuple[Tensor, Tensor]
    lam: Tensor
    gam: Tensor
    scaling: float

    @torch.no_grad()
    def delta(self) -> Tensor:
        """dW (out, in) in float32."""
        lam, gam = self.lam.float(), self.gam.float()
        if isinstance(self.bases, TernaryBasis):
            return delta_weight(self.bases, lam, gam, self.scaling)
        sizes = self.shape.out_features, self.shape.in_features
        return delta_weight_reference(*self.bases, lam, gam, self.scaling, *sizes)

    @torch.no_grad()
    def added_to(self, weight: Tensor, rounding_seed: int | None) -> Tensor:
        """W + dW, rounded once, in the dtype and layout of `weight`."""
        W = weight.T.contiguous() if self.shape.transposed else weight
        if isinstance(self.bases, TernaryBasis):
            lam, gam = (t if t.itemsize > 4 else t.float() for t in (self.lam, self.gam))
            total = merged_weight(self.bases, W, lam, gam, self.scaling, rounding_seed)
        else:
            wide = W.to(torch.promote_types(W.dtype, torch.float32))
            total = (wide + self.delta()).to(W.dtype)
        return total.T if self.shape.transposed else total


def shapes_of(adapter: Adapter, base: str | None) -> dict[str, Shape]:
    """Shapes of the base model that `base` or the adapter names, or those in the file itself."""
    if adapter.plain and base is None:
        return {
            path: Shape(layer.basis.in_features, layer.basis.out_features)
            for path, layer in adapter.plain.items()
        }
    return shapes_in(adapter, _base_of(adapter, base))


def module_paths(adapter: Adapter, base: str | None) -> set[str]:
    """Paths of all modules of the base model; adapted ones as the adapter names them.

    Without `base`, a file of `save_adapter` gives only its own layers.
    """
    if adapter.plain and base is None:
        return set(adapter.plain)
    checkpoint = _base_of(adapter, base)
    name_in = locate(adapter.diagonals, checkpoint)
    parts = [name.split(".")[:-1] for name in checkpoint.tensors]
    paths = {".".join(part[:k]) for part in parts for k in range(1, len(part) + 1)}
    return paths - {name_in(path) for path in adapter.diagonals} | set(adapter.diagonals)


def _base_of(adapter: Adapter, base: str | None) -> Checkpoint:
    return find_base(base or (adapter.config and adapter.config.base_model_name_or_path))


def shapes_in(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Shape]:
    """The base layers' shapes by path. CliError if the adapter does not fit them."""
    if "quantization_config" in checkpoint.config:
        raise CliError(f"{checkpoint.folder} is quantized; its 16 or 32 bit original is needed")
    name_in = locate(adapter.diagonals, checkpoint)
    shapes = {}
    for path, (_, gam) in adapter.diagonals.items():
        entry = checkpoint.tensors[name_in(f"{path}.weight")]
        if entry.dtype is None or len(entry.shape) != 2:
            raise CliError(
                f"{entry.file}: {path}.weight must be a float64, float32, float16 or bfloat16 "
                "matrix"
            )
        plain = adapter.plain[path] if adapter.plain else None
        transposed = plain.fan_in_fan_out if plain else adapter.config.fan_in_fan_out
        shape = Shape(*(entry.shape if transposed else entry.shape[::-1]), entry.dtype, transposed)
        sizes = shape.in_features, shape.out_features
        wanted = f"min(in, out) = {gam.shape[1]}"
        fits = min(sizes) == gam.shape[1]
        if plain:
            wanted = f"in -> out = {plain.basis.in_features} -> {plain.basis.out_features}"
            fits = sizes == (plain.basis.in_features, plain.basis.out_features)
        if not fits:
            raise CliError(
                f"{path}: the adapter is for {wanted} features, the weight in {checkpoint.folder} "
                f"is {entry.shape}"
            )
        shapes[path] = shape
    return shapes


def layer_changes(adapter: Adapter, shapes: Mapping[str, Shape]) -> dict[str, LayerChange]:
    """dW of every layer, as it is on the real model."""
    if adapter.plain:
        return {
            path: LayerChange(shapes[path], layer.basis, layer.lam, layer.gam, layer.scaling)
            for path, layer in adapter.plain.items()
        }
    r, scaling = adapter.config.r, adapter.config.randlora_alpha / adapter.config.r
    description = description_of(adapter.config, shapes.values())
    dense = {} if description else adapter.bases or dense_bases(adapter, shapes)

    @functools.cache  # one for all layers of a shape
    def bases(n_in: int, n_out: int) -> TernaryBasis | tuple[Tensor, Tensor]:
        if description:
            return generated(description, n_in, n_out, r)
        d, D = sorted((n_in, n_out))
        A, B = (dense[name].float() for name in BASES)
        A, B = A[:r, 0, :d], B[:D, : -(-d // r), :r].flatten(1)
        try:
            return TernaryBasis.from_dense(A, B, n_in, n_out)
        except ValueError:
            return A, B

    return {
        path: LayerChange(
            shape, bases(shape.in_features, shape.out_features), *adapter.diagonals[path], scaling
        )
        for path, shape in shapes.items()
    }


def _features(shapes: Mapping[str, Shape]) -> dict[str, tuple[int, int]]:
    return {path: (shape.in_features, shape.out_features) for path, shape in shapes.items()}


@contextmanager
def _told_of(adapter: Adapter) -> Iterator[None]:
    """Names the adapter in a ValueError."""
    try:
        yield
    except ValueError as error:
        raise CliError(f"{adapter.source}: {error}") from error


def largest(shapes: Iterable[Shape]) -> tuple[int, int]:
    """(in_features, out_features) of PEFT's shared bases: the largest of each."""
    sizes = [(shape.in_features, shape.out_features) for shape in shapes]
    return max(n_in for n_in, _ in sizes), max(n_out for _, n_out in sizes)


def description_of(config: Any, shapes: Iterable[Shape]) -> BasisDescription | None:
    """What the bases are generated from; None if PEFT draws them or the file has them."""
    from ..peft.adapter_basis import AdapterBasis

    basis = AdapterBasis.of(vars(config))
    return None if basis.kind == "peft" else basis.description(min(largest(shapes)))


def generated(description: BasisDescription, n_in: int, n_out: int, r: int) -> TernaryBasis:
    return TernaryBasis(n_in, n_out, r, description.density, description.seed, description.kind)


def dense_bases(adapter: Adapter, layers: Mapping[str, Shape]) -> dict[str, Tensor]:
    """A (r, 1, d) and B (D, n, r) of the largest layers in float32, generated or drawn by PEFT."""
    import peft

    from ..peft.adapter_basis import AdapterBasis
    from ..peft.saving import dense_hadamard_bases

    shapes, config = list(layers.values()), adapter.config
    n_in, n_out = largest(shapes)
    if description := description_of(config, shapes):
        if description.kind == "hadamard":
            with _told_of(adapter):
                pair = dense_hadamard_bases(description, config.r, _features(layers))
            return dict(zip(BASES, pair, strict=True))
        A, B = generated(description, n_in, n_out, config.r).dense()
        return {"randlora_A": A.unsqueeze(1), "randlora_B": B.unflatten(1, (-1, config.r))}
    # One layer of the largest sizes, whose weight takes no memory, has the bases of all.
    layer = nn.Linear(n_in, n_out, bias=False, device="meta")
    dtype = torch.float32  # a model does not round ternary bases that no file holds
    if AdapterBasis.of(vars(config)).density is None:
        dtype = min((shape.dtype for shape in shapes), key=lambda dtype: dtype.itemsize)
    layer.weight = nn.Parameter(torch.zeros((), dtype=dtype).expand(n_out, n_in), False)
    changes = {"target_modules": ["0"], "exclude_modules": None, "modules_to_save": None,
               "layers_to_transform": None, "layers_pattern": None, "bias": "none",
               "task_type": None, "save_projection": True, "fan_in_fan_out": False}  # fmt: skip
    known = {field.name for field in dataclasses.fields(config)}
    try:
        with warnings.catch_warnings():
            # The model has no name.
            warnings.filterwarnings("ignore", message=".*base_model_name_or_path. was renamed")
            drawing = dataclasses.replace(config, **{k: changes[k] for k in changes.keys() & known})
            state = peft.get_peft_model(nn.Sequential(layer), drawing).state_dict()
    except Exception as error:  # whatever PEFT and torch raise for odd values in a file
        raise CliError(
            f"{adapter.source}: PEFT cannot draw the bases of projection_prng_key "
            f"{config.projection_prng_key!r}: {first_line(error)}"
        ) from error
    return {name: state[f"base_model.{name}.default"].float() for name in BASES}
