"""`TernaryBasis`: the random matrices A and B of a layer, and their packed form on a device."""

import copy
import itertools
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .block import BlockMatrices, Chunks, check_sizes
from .cache import PackedTensors, get_or_make, with_index
from .dense import DenseMatrices
from .description import BasisDescription
from .generated import GeneratedMatrices
from .imported import ImportedMatrices
from .shape import Shape

# Above this density B is kept as bit planes (2 bits an element), at or below it as index lists by
# row and by column (32 * density bits an element): equal memory at 1/16. docs/formats.md.
PLANES_ABOVE_DENSITY = 1 / 8

_ops = torch.ops.randlora
_tokens = itertools.count()


def run_while_tracing(function):
    """torch.compiler.assume_constant_result, without its import of torch._dynamo (1.5 s)."""
    function._dynamo_marked_constant = True
    return function


class TernaryBasis:
    """The pair of fixed ternary bases of one layer shape: a description, packed on first use.

    A (r, d) and B (D, K) have the values ``{-1, 0, +1} / sqrt(density)``. They are a pure function
    of the seed (docs/basis-spec.md), equal on every device. Independent bases of different shapes
    are slices of the same infinite matrices. `of_dense` makes a basis of any given matrices.

    Args:
        in_features: of the base layer.
        out_features: likewise; d = min, D = max of the two.
        r: rank of one base; n = ceil(d / r) bases, K = n * r.
        density: share of non-zeros, in (0, 1]. 1/3 is PEFT's ``sparse``. Block bases take 1 / G
            for a G that divides in_features, out_features and r, with a power of two as r / G.
        seed: 0 <= seed < 2**64; PEFT's ``projection_prng_key``.
        kind: "independent": every element is drawn by itself, and each sign has the probability
            ``density / 2``. "block": the non-zeros fill 1 / density blocks, so that dW has full
            rank and every product is a batch of small dense ones.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.

    Equality and hash are those of the description. A basis never changes, so a deep copy is the
    same object. Pickling moves the description, except for an imported basis (`from_dense`,
    `from_planes`), which is its matrices.
    Source: paper section 4.3 (sparse bases) and PEFT's ``_init_randlora_A_randlora_B_sparse``.
    """

    _shape: Shape
    _source: GeneratedMatrices | ImportedMatrices | DenseMatrices
    _packed: dict[Any, PackedTensors]  # by torch.device
    _dense: dict[tuple, PackedTensors]  # by device and dtype
    path_regions: dict[tuple, tuple]  # filled by ops/path.py
    token: str  # of this object, in this process: compiled code guards on it

    def __new__(cls, *args, **kwargs) -> "TernaryBasis":
        self = super().__new__(cls)
        self._packed, self._dense, self.path_regions = {}, {}, {}
        self.token = str(next(_tokens))
        _by_token[self.token] = self
        return self

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        density: float,
        seed: int = 0,
        kind: str = "independent",
    ) -> None:
        self._shape = Shape.of(in_features, out_features, r)
        description = BasisDescription(kind, density, seed)
        if kind == "block":
            check_sizes(description.groups, in_features, out_features, r)
            self._source = BlockMatrices(description)
        else:
            self._source = GeneratedMatrices(description)

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
            ValueError: a shape is too small, or a matrix is not ternary (PEFT's default bases are
                uniform; they have no packed form).
        """
        A = A.detach().flatten(1) if A.dim() == 3 and A.shape[1] == 1 else A.detach()
        if A.dim() != 2 or A.shape[0] == 0:
            raise ValueError(f"A must be (r, d) or (r, 1, d), got {tuple(A.shape)}")
        self = cls.__new__(cls)
        self._shape = Shape.of(in_features, out_features, A.shape[0])
        self._source = ImportedMatrices.from_dense(A, B, self._shape)
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
        copy: bool = True,
    ) -> "TernaryBasis":
        """Imports bases that are bit planes already: the first d columns of A, D and K of B.

        Args:
            a_planes: (2, r, >= ceil(d / 64)) int64, all r rows.
            b_planes: (2, >= D, >= ceil(K / 64)) int64.
            a_value: what +1 stands for in A.
            b_value: what +1 stands for in B.
            copy: False keeps the tensors themselves if their shapes fit; nobody may write to them.

        Raises:
            ValueError: a shape is too small, or an element is +1 and -1 at once.
        """
        self = cls.__new__(cls)
        self._shape = Shape.of(in_features, out_features, a_planes.shape[1])
        planes = a_planes, b_planes, a_value, b_value
        self._source = ImportedMatrices.from_planes(*planes, self._shape, copy)
        return self

    @classmethod
    def of_dense(
        cls, matrices: DenseMatrices, in_features: int, out_features: int
    ) -> "TernaryBasis":
        """Of dense A and B, which are no ternary matrices; the tensors themselves are multiplied.

        Nobody may write to them. ValueError if one is too small.
        """
        self = cls.__new__(cls)
        self._shape = Shape.of(in_features, out_features, matrices.A.shape[0])
        matrices.check(self._shape)
        self._source = matrices
        return self

    in_features = property(lambda self: self._shape.in_features)
    out_features = property(lambda self: self._shape.out_features)
    r = property(lambda self: self._shape.r)
    n = property(lambda self: self._shape.n)
    K = property(lambda self: self._shape.K)
    d = property(lambda self: self._shape.d)
    D = property(lambda self: self._shape.D)
    expand = property(lambda self: self._shape.expand, doc="Whether d is the input side.")
    density = property(lambda self: self._source.density, doc="Share of non-zeros, in (0, 1].")
    scale = property(
        lambda self: self._source.scale,
        doc="What the product of the unscaled matrices must be multiplied by.",
    )

    @property
    def description(self) -> BasisDescription | None:
        """Kind, density and seed; None for an imported or dense basis."""
        source = self._source
        return source.description if isinstance(source, GeneratedMatrices) else None

    @property
    def kind(self) -> str:
        """``"independent"``, ``"block"``, ``"imported"`` or ``"dense"``."""
        source = self._source
        return source.description.kind if isinstance(source, GeneratedMatrices) else source.kind

    @property
    def seed(self) -> int | None:
        """None for an imported or dense basis."""
        return None if self.description is None else self.description.seed

    @property
    def slice_expand(self) -> bool | None:
        """The operators' ``expand``: a slice's sizes do not tell which side is d."""
        return self._shape.expand if self._shape.is_slice else None

    @property
    def layer_features(self) -> tuple[int, int]:
        """d and D of the layer, also in a slice."""
        return self._shape.layer_d, self._shape.layer_D

    @property
    def chunks(self) -> Chunks | None:
        """What a slice of block bases holds of the blocks; None for any other basis."""
        if not self._shape.is_slice or not isinstance(self._source, BlockMatrices):
            return None
        return self._source.chunks(self._shape)

    def held(self, lam: Tensor) -> Tensor:
        """The rows of lambda (r, n) that the operators take: those of a slice's `chunks`.

        Raises:
            ValueError: lam has another shape.
        """
        chunks = self.chunks
        if chunks is None:
            return lam
        if tuple(lam.shape) != (self.r, self.n):
            raise ValueError(f"lam must be (r, n) = ({self.r}, {self.n}), got {tuple(lam.shape)}")
        return lam[chunks.ranks.start : chunks.ranks.stop]

    @property
    def format(self) -> str:
        """``"lists"``, ``"planes"``, ``"blocks"`` or, unpacked, ``"dense"`` (docs/formats.md)."""
        if self.kind == "block":
            return "blocks"
        if self.kind == "dense":
            return "dense"
        if self.n > 65536:  # planes are decoded with 16-bit base numbers
            return "lists"
        return "planes" if self.density > PLANES_ABOVE_DENSITY else "lists"

    def packed(self, device: torch.device | str = "cpu") -> list[Tensor]:
        """The tensors that ``torch.ops.randlora`` takes as ``packed``.

        Lists: ``[a_offset, a_index, b_row_offset, b_row_index, b_col_offset, b_col_index]``;
        planes: ``[a_offset, a_index, b_planes]``; blocks: ``[a, b_planes]``, of a slice
        ``[a, b_planes, place]``; dense: ``[A, B]`` (docs/formats.md).
        They are made on first use and shared by all layers of equal description on that device,
        while one of them lives.

        Warns if A or B has no non-zero element at all: such an adapter cannot learn.
        """
        if torch.compiler.is_dynamo_compiling():
            name = self._pack_while_tracing(self.token, torch.device(device), None)
            return getattr(self, name).tensors
        held = self._packed.get(device)  # a tensor's device is found at once, as in training
        if held is None:
            on = with_index(torch.device(device))
            if on not in self._packed:
                key = (*self._matrices_key(), on)
                self._packed[on] = get_or_make(key, on, lambda: self._pack(on))
            held = self._packed[on]
        return held.on_current_stream()

    def dense_b(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """B unscaled (-1, 0, +1) as a factor of GEMMs, made once and shared like `packed`.

        (D, K), of dense bases as it is; for block bases (K, D / G), where row c is column c of B
        within chunk c % G; for a slice of them its rows e (`chunks`).
        """
        if torch.compiler.is_dynamo_compiling():
            name = self._pack_while_tracing(self.token, torch.device(device), dtype)
            return getattr(self, name).tensors[0]
        key = (with_index(torch.device(device)), dtype)
        if key not in self._dense:
            matrices = (*self._matrices_key(), *key)
            self._dense[key] = get_or_make(matrices, key[0], lambda: [self._make_dense_b(*key)])
        return self._dense[key].on_current_stream()[0]

    # Dynamo calls this with constants while it traces (torch 2.11 takes no object as an argument)
    # and finds the tensors as an attribute, which makes them inputs of the graph. Constants of the
    # graph would live as long as it does, and no guard could tell that a model has moved.
    @run_while_tracing
    def _pack_while_tracing(
        self, token: str, device: torch.device, dtype: torch.dtype | None
    ) -> str:
        self.packed(device)
        if dtype is None:
            name, made = f"_packed_{device}", self._packed[with_index(device)]
        else:
            self.dense_b(device, dtype)
            name = f"_dense_{str(dtype)[6:]}_{device}"  # without the dot, which Dynamo refuses
            made = self._dense[with_index(device), dtype]
        for tensor in made.tensors:  # no symbolic sizes, and CUDA graphs need not copy them
            torch._dynamo.mark_static(tensor)
            torch._dynamo.mark_static_address(tensor, guard=False)
        setattr(self, name, made)
        return name

    def packed_bytes(self, device: torch.device | str = "cpu") -> int:
        """Bytes of the packed form on that device."""
        return sum(t.numel() * t.element_size() for t in self.packed(device))

    def dense(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """The scaled dense bases A (r, d) and B (D, K), newly made: for tests, export and study."""
        device, source = torch.device(device), self._source
        if isinstance(source, DenseMatrices):
            A, B = source.part(self._shape, device)
            return A.to(dtype, copy=True), B.to(dtype, copy=True)
        if device.type != "meta" and not kernels.serve(device.type):
            A, B = self.dense("cpu", dtype)
            return A.to(device), B.to(device)
        a, b = source.a_planes(self._shape, device), source.b_planes(self._shape, device)
        return (
            _ops.planes_to_dense(a, self.d, source.a_value, dtype),
            _ops.planes_to_dense(b, self.K, source.b_value, dtype),
        )

    def dense_a(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """A (r, d) alone, scaled."""
        if isinstance(self._source, DenseMatrices):
            return self.packed(device)[0].to(dtype)
        if self.format == "blocks":
            if not kernels.serve(torch.device(device).type):
                return self.dense_a("cpu", dtype).to(device)
            planes = self._source.a_planes(self._shape, torch.device(device))
            return _ops.planes_to_dense(planes, self.d, self._source.a_value, dtype)
        offset, index = self.packed(device)[:2]
        return _ops.lists_to_dense(offset, index, self.d, self._source.a_value, dtype)

    def _make_dense_b(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if isinstance(self._source, DenseMatrices):
            return self._source.part(self._shape, device, dtype)[1]
        if not kernels.serve(device.type):
            return self.dense_b("cpu", dtype).to(device)
        if self.format == "blocks":
            a, b_planes, *_ = self.packed(device)
            height = self._shape.layer_D * a.shape[1] // self._shape.layer_d
            return _ops.planes_to_dense(b_planes, height, 1.0, dtype)
        if self.format == "lists":
            offset, index = self.packed(device)[2:4]
            return _ops.lists_to_dense(offset, index, self.K, 1.0, dtype)
        return _ops.planes_to_dense(self.packed(device)[2], self.K, 1.0, dtype)

    def _pack(self, device: torch.device) -> list[Tensor]:
        if isinstance(self._source, DenseMatrices):
            return list(self._source.part(self._shape, device))
        if not kernels.serve(device.type):  # "meta" too: how many entries depends on the elements
            return [t.to(device) for t in self.packed("cpu")]
        shape, wide = self._shape, self._shape.wide
        if isinstance(self._source, BlockMatrices):
            a, b = self._source.blocks(shape, device)
            chunks = self.chunks
            return [a, b, *([chunks.place(device)] if chunks else [])]
        a_planes, b_planes = (
            self._source.a_planes(shape, device),
            self._source.b_planes(shape, device),
        )
        a_offset, a_index = _ops.planes_to_lists(a_planes, self.d, False, wide)
        if self.format == "planes":
            packed, empty_b = [a_offset, a_index, b_planes], False
        else:
            by_row = _ops.planes_to_lists(b_planes, self.K, False, wide)
            by_column = _ops.planes_to_lists(b_planes, self.K, True, wide)
            packed, empty_b = [a_offset, a_index, *by_row, *by_column], by_row[1].numel() == 0
        packed += _ops.support_tables(a_offset, a_index, self.d)  # on CUDA one, elsewhere none
        if not shape.is_slice and (a_index.numel() == 0 or empty_b):
            warnings.warn(
                f"{self!r} has no non-zero element in {'B' if empty_b else 'A'}, so its adapter "
                "cannot learn anything; take a larger density",
                stacklevel=5,
            )
        return packed

    def transposed(self) -> "TernaryBasis":
        """The same matrices for a layer of swapped features; what is packed is shared."""
        return self._with_shape(self._shape.transposed())

    def slice(self, inputs: range | None = None, outputs: range | None = None) -> "TernaryBasis":
        """The part for a rank that holds these inputs and outputs of the layer; None means all.

        It has the rows of B of the features on the D side and the columns of A of those on the d
        side. A rank generates them from the seed without asking another. r, n, K and the
        orientation stay the layer's; lambda (r, n) is complete, gamma the (n, d) of the slice
        (docs/distributed.md).

        Raises:
            TypeError, ValueError: a range of another step, empty, or outside the layer.
            ValueError: on an imported or dense basis, which is not a function of indices; or a
                slice of a block basis that starts or ends within one of a side's chunks.
        """
        if self.description is None:
            raise ValueError(f"slice() needs a generated basis, and this one is {self.kind}")
        inputs = range(self.in_features) if inputs is None else inputs
        outputs = range(self.out_features) if outputs is None else outputs
        shape = self._shape.part(inputs, outputs)
        if isinstance(self._source, BlockMatrices):
            self._source.chunks(shape)
        return self._with_shape(shape)

    def _with_shape(self, shape: Shape) -> "TernaryBasis":
        other = copy.copy(self)
        other._shape = shape
        return other

    def canonical(self) -> "TernaryBasis":
        """The first living basis equal to this one, which layers hold.

        One object for all layers of a shape means one dictionary of packed tensors and one guard
        of torch.compile: what was compiled for one layer serves the others.
        """
        return _by_key.setdefault(self._key(), self)

    def _matrices_key(self) -> tuple:
        """What decides A and B: the layer's orientation does not."""
        shape = self._shape
        at = shape.first_row, shape.first_column, shape.layer_d, shape.layer_D
        return (self.D, self.d, self.r, self.n, *at, self._source)

    def _key(self) -> tuple:
        return (self._shape, *self._matrices_key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TernaryBasis) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __deepcopy__(self, memo: dict) -> "TernaryBasis":
        return self

    def __getstate__(self) -> dict:
        return {"_shape": self._shape, "_source": self._source}

    def __repr__(self) -> str:
        origin = self.kind if self.description is None else f"seed={self.seed}, kind={self.kind!r}"
        shape, part = self._shape, ""
        if shape.is_slice:
            part = f", slice from row {shape.first_row} of B and column {shape.first_column} of A"
        return (
            f"TernaryBasis({self.in_features}, {self.out_features}, r={self.r}, "
            f"density={self.density:.6g}, {origin}, format={self.format!r}{part})"
        )


_by_key: "weakref.WeakValueDictionary[tuple, TernaryBasis]" = weakref.WeakValueDictionary()
_by_token: "weakref.WeakValueDictionary[str, TernaryBasis]" = weakref.WeakValueDictionary()


def living(token: str) -> TernaryBasis:
    """The basis of that token, while it lives."""
    return _by_token[token]
