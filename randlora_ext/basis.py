"""`TernaryBasis`: which random matrices A and B a layer uses, and their packed form on a device."""

import copy
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .generation import Generated
from .imported import Imported
from .packing import Packed, shared, with_index
from .shape import Shape

# Above this density an independent B is kept as bit planes (2 bits an element), at or below it as
# index lists by row and by column (32 * density bits an element): equal memory at 1/16.
# docs/formats.md.
PLANES_ABOVE_DENSITY = 1 / 8

_ops = torch.ops.randlora
_tokens = itertools.count()


def _check_count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a positive integer, got {value!r}")
    if value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value}")
    return value


def _shape(in_features: int, out_features: int, r_name: str, r: int) -> Shape:
    return Shape.of(
        _check_count("in_features", in_features),
        _check_count("out_features", out_features),
        _check_count(r_name, r),
    )


class TernaryBasis:
    """The pair of fixed ternary bases of one layer shape: a description, packed on first use.

    A (r, d) and B (D, K) have the values ``{-1, 0, +1} / sqrt(density)``. They are a pure function
    of the seed (docs/basis-spec.md, docs/balanced-spec.md): equal on every device, and layers of
    different shapes see slices of the same infinite matrices.

    Args:
        in_features: of the base layer.
        out_features: likewise; d = min, D = max of the two.
        r: rank of one base; n = ceil(d / r) bases, K = n * r.
        density: share of non-zeros, in (0, 1]. 1/3 is PEFT's ``sparse``.
        seed: 0 <= seed < 2**64; PEFT's ``projection_prng_key``.
        support: "independent", every element by itself, each sign with probability ``density / 2``;
            or "balanced", exactly q in every column of A, and in any r consecutive columns of a row
            of B at the same places, with free signs. The density is then q / r.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.

    Equality and hash are those of the description; a copy is the same object. Pickling moves no
    matrix, but for an imported basis (`from_dense`), which is its matrices.
    Source: paper section 4.3 (sparse bases) and PEFT's ``_init_randlora_A_randlora_B_sparse``.
    """

    _packed: dict[Any, Packed]  # by torch.device
    _dense: dict[tuple, Packed]
    _paths: dict[tuple, Any]  # of cost.py
    _trace_pack: ClassVar[Callable[..., str]]  # this and the next are methods that tracing.py adds
    _trace_regions: ClassVar[Callable[..., tuple]]
    _token: str  # of this object, in this process: what compiled code guards on (tracing.py)

    def __new__(cls, *args, **kwargs) -> "TernaryBasis":
        self = super().__new__(cls)
        self._packed, self._dense, self._paths = {}, {}, {}
        self._token = str(next(_tokens))
        return self

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        density: float,
        seed: int = 0,
        support: str = "independent",
    ) -> None:
        self._shape = _shape(in_features, out_features, "r", r)
        generated = Generated(seed, density, support, r)
        self.density = generated.density
        self.seed: int | None = seed
        self.support: str | None = support
        self._imported: Imported | None = None

    @classmethod
    def from_dense(
        cls, A: Tensor, B: Tensor, in_features: int, out_features: int
    ) -> "TernaryBasis":
        """Imports dense bases exactly, as PEFT holds them.

        Args:
            A: (r, >= d) or (r, 1, >= d), values in {-a, 0, +a}.
            B: (>= D, >= n, r) or (D, K), values in {-b, 0, +b}. PEFT's memory order is kept:
                flat column c belongs to rank index c // n and base c % n.

        Raises:
            ValueError: where a shape is too small, or a matrix is not ternary (PEFT's default
                bases are uniform; they have no packed form).
        """
        A = A.detach().flatten(1) if A.dim() == 3 and A.shape[1] == 1 else A.detach()
        if A.dim() != 2:
            raise ValueError(f"A must be (r, d) or (r, 1, d), got {tuple(A.shape)}")
        self = cls.__new__(cls)
        self._shape = _shape(in_features, out_features, "r of A", A.shape[0])
        self._take(Imported.of(A, B, self._shape))
        return self

    @classmethod
    def from_planes(
        cls,
        a_planes: Tensor,
        b_planes: Tensor,
        a_value: float,
        b_value: float,
        in_features: int,
        out_features: int,
    ) -> "TernaryBasis":
        """Imports bases that are bit planes already: the first d columns of A, D and K of B.

        Args:
            a_planes: (2, r, >= ceil(d / 64)) int64, all r rows.
            b_planes: (2, >= D, >= ceil(K / 64)) int64.
            a_value: what +1 stands for in A.
            b_value: what +1 stands for in B.
        """
        self = cls.__new__(cls)
        self._shape = _shape(in_features, out_features, "r of a_planes", a_planes.shape[1])
        self._take(Imported.of_planes(a_planes, b_planes, a_value, b_value, self._shape))
        return self

    def _take(self, imported: Imported) -> None:
        self._imported = imported
        # The share of non-zeros of B decides the packed format and the predicted cost.
        self.density = max(imported.count_b() / (self.D * self.K), 2.0**-31)
        self.seed = self.support = None

    in_features = property(lambda self: self._shape.in_features)
    out_features = property(lambda self: self._shape.out_features)
    r = property(lambda self: self._shape.r)
    n = property(lambda self: self._shape.n)
    K = property(lambda self: self._shape.K)
    d = property(lambda self: self._shape.d)
    D = property(lambda self: self._shape.D)
    expand = property(lambda self: self._shape.expand, doc="Whether d is the input side.")

    @property
    def slice_expand(self) -> bool | None:
        """The operators' ``expand``: for a slice its orientation, which its sizes do not tell."""
        return None if self._shape.whole else self._shape.expand

    @property
    def scale(self) -> float:
        """(scale of A) * (scale of B): what the integer product must be multiplied by."""
        if self._imported is not None:
            return self._imported.a_value * self._imported.b_value
        return 1.0 / self.density

    @property
    def format(self) -> str:
        """How B is packed: ``"lists"``, ``"planes"`` or ``"balanced"`` (docs/formats.md)."""
        if self.n > 65536:  # the others are decoded by bases of 16-bit number
            return "lists"
        if self.support == "balanced":
            return "balanced"
        return "planes" if self.density > PLANES_ABOVE_DENSITY else "lists"

    def packed(self, device: torch.device | str = "cpu") -> list[Tensor]:
        """The tensors that ``torch.ops.randlora`` takes as ``packed``.

        Lists: ``[a_offset, a_index, b_row_offset, b_row_index, b_col_offset, b_col_index]``;
        planes: ``[a_offset, a_index, b_planes]``; balanced: ``[a_offset, a_index, b_offset, b_row,
        b_sign]`` (docs/formats.md). Made on first use, then shared by all layers of equal
        description on that device, for as long as one of them lives.
        """
        if torch.compiler.is_dynamo_compiling():
            from . import tracing

            return tracing.packed(self, torch.device(device)).tensors
        held = self._packed.get(device)  # at once where it is that of a tensor, as in training
        if held is None:
            on = with_index(torch.device(device))
            if on not in self._packed:
                self._packed[on] = shared((self._matrices(), on), on, lambda: self._pack(on))
            held = self._packed[on]
        return held.tensors

    def dense_b(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """B (D, K) unscaled (-1, 0, +1), made once and shared like `packed`: for GEMMs on CUDA."""
        if torch.compiler.is_dynamo_compiling():
            from . import tracing

            return tracing.packed(self, torch.device(device), dtype).tensors[0]
        key = (with_index(torch.device(device)), dtype)
        if key not in self._dense:
            self._dense[key] = shared(
                (self._matrices(), *key), key[0], lambda: [self._dense_b(*key)]
            )
        return self._dense[key].tensors[0]

    def _dense_b(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        form = self.format
        if form == "lists":
            offset, index = self.packed(device)[2:4]
            return _ops.lists_to_dense(offset, index, self.K, 1.0, dtype)
        planes = self.packed(device)[2] if form == "planes" else self._b_planes(device)
        return _ops.planes_to_dense(planes, self.K, 1.0, dtype)

    def packed_bytes(self, device: torch.device | str = "cpu") -> int:
        """Bytes of the packed form on that device."""
        return sum(t.numel() * t.element_size() for t in self.packed(device))

    def dense(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """The scaled dense bases A (r, d) and B (D, K), newly made: for tests, export and study."""
        device = torch.device(device)
        a, b = self._values()
        return (
            _ops.planes_to_dense(self._a_planes(device), self.d, a, dtype),
            _ops.planes_to_dense(self._b_planes(device), self.K, b, dtype),
        )

    def dense_a(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """A (r, d) alone, scaled."""
        offset, index = self.packed(device)[:2]
        return _ops.lists_to_dense(offset, index, self.d, self._values()[0], dtype)

    def _values(self) -> tuple[float, float]:
        if self._imported is not None:
            return self._imported.a_value, self._imported.b_value
        value = 1.0 / math.sqrt(self.density)
        return value, value

    def _generated(self) -> Generated:
        assert self.seed is not None and self.support is not None
        return Generated(self.seed, self.density, self.support, self.r)

    def _a_planes(self, device: torch.device) -> Tensor:
        if self._imported is not None:
            return self._imported.a_planes.to(device)
        return self._generated().a_planes(self._shape.first_column, self.d, device)

    def _b_planes(self, device: torch.device) -> Tensor:
        if self._imported is not None:
            return self._imported.b_planes.to(device)
        return self._generated().b_planes(self._shape.first_row, self.D, self.n, device)

    def _pack(self, device: torch.device) -> list[Tensor]:
        if device.type == "meta":  # how many entries there are depends on the elements
            return [t.to(device) for t in self.packed("cpu")]
        wide, form = self._shape.wide, self.format
        tensors = list(_ops.planes_to_lists(self._a_planes(device), self.d, False, wide))
        if form == "balanced":
            row = self._shape.first_row
            return [*tensors, *self._generated().b_balanced(row, self.D, self.n, wide, device)]
        b_planes = self._b_planes(device)
        if form == "planes":
            return [*tensors, b_planes]
        tensors += _ops.planes_to_lists(b_planes, self.K, False, wide)
        tensors += _ops.planes_to_lists(b_planes, self.K, True, wide)
        return tensors

    def transposed(self) -> "TernaryBasis":
        """The same matrices for a layer of swapped features; what is packed is shared."""
        other = copy.copy(self)
        other._shape = self._shape.transposed()
        return other

    def slice(self, inputs: range | None = None, outputs: range | None = None) -> "TernaryBasis":
        """What a rank needs that holds these inputs and outputs of the layer; None means all.

        The rows of B that belong to the features on the D side, the columns of A that belong to
        those on the d side. Generated by itself from the seed: nothing is cut out of anything, and
        no other rank is asked. r, n, K and the orientation stay the layer's, lambda (r, n) is
        whole, gamma the (n, d) of the slice (docs/distributed.md).

        Raises:
            TypeError, ValueError: a range of another step, empty, or outside the layer.
            ValueError: on an imported basis, which is not a function of indices.
        """
        if self._imported is not None:
            raise ValueError("slice() needs a generated basis, and this one is imported")
        inputs = range(self.in_features) if inputs is None else inputs
        outputs = range(self.out_features) if outputs is None else outputs
        other = copy.copy(self)
        other._shape = self._shape.part(inputs, outputs)
        return other

    def known(self) -> "TernaryBasis":
        """The first living basis of the same description: what layers hold.

        One object for all layers of a shape is one dictionary of packed tensors, and one guard of
        torch.compile, so that what was compiled for one layer serves the others.
        """
        return _known.setdefault(self._key(), self)

    def _matrices(self) -> tuple:
        """What decides A and B: the layer's orientation does not."""
        generated = (self.density, self.seed, self.support)
        origin = generated if self._imported is None else (self._imported,)
        at = self._shape.first_row, self._shape.first_column
        return (self.D, self.d, self.r, self.n, *at, *origin)

    def _key(self) -> tuple:
        return (self._shape, *self._matrices())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TernaryBasis) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __deepcopy__(self, memo: dict) -> "TernaryBasis":
        return self  # it never changes, and copies must go on sharing what it packs

    def __getstate__(self) -> dict:
        made = ("_packed", "_dense", "_paths", "_token")  # and what tracing.py calls by these names
        return {k: v for k, v in self.__dict__.items() if not k.startswith(made)}

    def __repr__(self) -> str:
        origin = "imported" if self._imported is not None else f"seed={self.seed}"
        origin += ", support='balanced'" if self.support == "balanced" else ""
        shape, part = self._shape, ""
        if not shape.whole:
            part = f", slice from row {shape.first_row} of B and column {shape.first_column} of A"
        return (
            f"TernaryBasis({self.in_features}, {self.out_features}, r={self.r}, "
            f"density={self.density:.6g}, {origin}, format={self.format!r}{part})"
        )


_known: "weakref.WeakValueDictionary[tuple, TernaryBasis]" = weakref.WeakValueDictionary()
