"""`Basis`: the random matrices A and B of a layer, and their packed form on a device."""

import itertools
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .. import devices
from ..checks import warn_user
from ..tracing import constant_while_tracing
from .cache import PackedTensors, get_or_make, ordinary_tensors, share
from .dense import DenseMatrices
from .description import BasisDescription, Shape
from .hadamard import HadamardMatrices
from .matrices import Matrices
from .packed import Packed, PackedLists, PackedPlanes, with_each
from .ternary import IndependentMatrices, TernaryMatrices

_serials = itertools.count()
_GENERATED = {"hadamard": HadamardMatrices, "independent": IndependentMatrices}


@ordinary_tensors
def _is_zero(t: Tensor) -> bool:
    return not t.any()


class Basis(Shape):
    """The fixed bases A and B of one layer shape: a description, packed on first use.

    A (r, d) and B (D, K) have the values -1 and +1 or, if independent, ``{-1, 0, +1} /
    sqrt(density)``. They are a pure function of the seed (docs/basis-spec.md), equal on every
    device. `from_dense` takes given matrices.

    Args:
        in_features: of the base layer.
        out_features: likewise; d = min, D = max of the two.
        r: rows of A, at most 65,536; n = ceil(d / r) copies of each, K = n * r.
        density: share of non-zeros of independent bases, in (0, 1]. None means 1/3, PEFT's
            ``sparse``. Hadamard bases have no zeros and take none.
        seed: 0 <= seed < 2**64; ``projection_prng_key`` of our `RandLoraConfig`. PEFT's own bases
            of that key are others.
        kind: "hadamard": A and B are parts of Hadamard matrices with random signs, so that a
            product with A costs as many multiply-adds as gamma has elements, and one with B only
            additions. "independent": every element is drawn independently, each sign with
            probability ``density / 2``. None means "independent" if a density is given, else
            "hadamard".

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.

    Attributes: the arguments; n, K, d, D; expand, whether d is the input side; kind, also "dense"
    or "imported" (PEFT's ternary tensors); scale, by which the product of the unscaled matrices
    must be multiplied; description and seed, None for dense and imported bases; format, "lists",
    "planes", "hadamard" or "dense" (docs/formats.md).

    Bases of equal shape and description are equal; imported and dense ones compare the identity of
    their matrices. A basis never changes, so a deep copy is the same object. Pickling writes the
    description or, for imported and dense ones, the matrices.
    Source: paper section 4.3 (sparse bases) and PEFT's ``_init_randlora_A_randlora_B_sparse``;
    Hadamard bases are ours.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        density: float | None = None,
        seed: int = 0,
        kind: str | None = None,
    ) -> None:
        if kind is None:
            kind = "hadamard" if density is None else "independent"
        description = BasisDescription(kind, density, seed)
        self._set(in_features, out_features, r, _GENERATED[kind](description))

    def _set(self, in_features: int, out_features: int, r: int, matrices: Matrices) -> None:
        super().__init__(in_features, out_features, r)
        self.kind = matrices.kind
        self.density = matrices.density
        self.scale = matrices.scale
        self.description = matrices.description
        self.seed = None if matrices.description is None else matrices.description.seed
        self.format = matrices.format(self)
        self._matrices = matrices
        self._identity = in_features, out_features, r, matrices.identity
        self._packed: dict[tuple, PackedTensors] = {}  # by device and dtype or None
        self._traced = SimpleNamespace()  # the same, for compiled code
        # Of this object, in this process: compiled code guards on it.
        self._serial = str(next(_serials))

    @classmethod
    def described(
        cls, description: BasisDescription, in_features: int, out_features: int, r: int
    ) -> "Basis":
        """The basis of this description for a layer."""
        return cls.of(in_features, out_features, r, _GENERATED[description.kind](description))

    @classmethod
    def from_dense(cls, A: Tensor, B: Tensor, in_features: int, out_features: int) -> "Basis":
        """A basis of A (r, >= d) and B (>= D, >= K) of any values, whose leading parts it uses.

        Products use the tensors themselves: do not write to them afterwards. Raises TypeError if
        one is no tensor of real numbers, ValueError if it is no matrix or too small.
        """
        for name, matrix in (("A", A), ("B", B)):
            if not isinstance(matrix, Tensor) or matrix.is_complex():
                got = matrix.dtype if isinstance(matrix, Tensor) else repr(matrix)
                raise TypeError(f"{name} must be a tensor of real numbers, got {got}")
            if matrix.dim() != 2 or matrix.numel() == 0:
                raise ValueError(f"{name} must be a matrix, got {tuple(matrix.shape)}")
        self = cls.of(in_features, out_features, A.shape[0], DenseMatrices(A, B))
        if A.shape[1] < self.d or B.shape[0] < self.D or B.shape[1] < self.K:
            raise ValueError(
                f"A must be (r, >= d) = ({self.r}, >= {self.d}) and B (>= D, >= K) = "
                f"(>= {self.D}, >= {self.K}), got {tuple(A.shape)} and {tuple(B.shape)}"
            )
        return self

    @classmethod
    def of(cls, in_features: int, out_features: int, r: int, matrices: Matrices) -> "Basis":
        """A basis of these matrices, which must be large enough."""
        self = cls.__new__(cls)
        self._set(in_features, out_features, r, matrices)
        return self

    def packed(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Packed:
        """The tensors of the bases that ``torch.ops.randlora`` takes, a named tuple
        (docs/formats.md).

        They are made on first use and shared by all layers of equal shape and description on that
        device, as long as one of them lives. Those of dense bases may be asked for in a dtype.
        Warns if A or B has no non-zero element at all.
        """
        if torch.compiler.is_dynamo_compiling():
            name = self._traced_name(self._serial, torch.device(device), dtype)
            return getattr(self._traced, name)
        found = self._packed.get((device, dtype))
        if found is None:  # of a tensor's device it is found above, and at once
            # "cuda" and "cuda:0" share one entry.
            full_device = torch.empty(0, device=device).device
            found = self._packed.get((full_device, dtype))
        if found is None:
            found = self._pack(full_device, dtype)
            self._packed[full_device, dtype] = found
        return found.on_current_stream()

    def _pack(self, device: torch.device, dtype: torch.dtype | None) -> PackedTensors:
        """From the cache, or newly made."""
        # Where our kernels cannot pack, what the CPU has packed is copied. So it is to "meta": the
        # lengths of lists depend on the elements.
        of_cpu = None
        if self.kind != "dense" and not devices.has_kernels(device):
            of_cpu = self.packed()  # outside `make`, which must not ask the cache

        def make() -> Packed:
            tensors = self._matrices.pack(self, device) if of_cpu is None else of_cpu
            return with_each(tensors, lambda t: t.to(device, dtype or t.dtype))

        # Without the orientation, which packed tensors do not have.
        key = self.D, self.d, self.r, self._matrices.identity, device, dtype
        packed = get_or_make(key, device, make)
        if of_cpu is None:  # else `self.packed()` has warned
            self._warn_of_zeros(packed.tensors)
        return packed

    def _warn_of_zeros(self, packed: Packed) -> None:
        empty = None
        if isinstance(packed, (PackedLists, PackedPlanes)) and packed.a_index.numel() == 0:
            empty = "A"
        if isinstance(packed, PackedLists) and packed.b_row_index.numel() == 0:
            empty = "B"
        if isinstance(packed, PackedPlanes) and _is_zero(packed.b_planes):
            empty = "B"
        if empty is not None:
            warn_user(
                f"{self!r} has no non-zero element in {empty}, so its adapter cannot learn "
                "anything; take a larger density"
            )

    # Dynamo calls this with constants while it traces (torch 2.11 takes no object as an argument).
    # The tensors are attributes of a namespace, since Dynamo looks into a dictionary only once a
    # trace. So they are inputs of the graph, and a guard sees when the model has moved. Parameters
    # have no symbolic sizes, and CUDA graphs need not copy them.
    @constant_while_tracing
    def _traced_name(self, serial: str, device: torch.device, dtype: torch.dtype | None) -> str:
        name = f"{device} {str(dtype).removeprefix('torch.')}"  # Dynamo refuses the dot
        made = self.packed(device, dtype)
        if not torch.compiler.is_exporting():  # which knows the parameters of modules alone
            made = with_each(made, lambda t: nn.Parameter(t, requires_grad=False))
        vars(self._traced)[name] = made
        return name

    def dense(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """The scaled dense bases A (r, d) and B (D, K), newly made: for tests, export and study."""
        on = torch.device(device)
        with_kernels = self.kind == "dense" or devices.has_kernels(on)
        A, B = self._matrices.dense(self, on if with_kernels else torch.device("cpu"), dtype)
        return A.to(on), B.to(on)

    def canonical(self) -> "Basis":
        """The first living basis equal to this one, which layers hold.

        One object for all layers of a shape means one dictionary of packed tensors and one guard
        of torch.compile: what was compiled for one layer serves the others.
        """
        return share(self._identity, lambda: self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Basis) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __deepcopy__(self, memo: dict) -> "Basis":
        return self

    def __reduce__(self) -> tuple:
        return Basis.of, (self.in_features, self.out_features, self.r, self._matrices)

    @property
    def name(self) -> str:
        """In a few words: the kind or, of ternary bases, the density that they have."""
        ternary = isinstance(self._matrices, TernaryMatrices)
        return f"density {self.density:.3g}" if ternary else self.kind

    def __repr__(self) -> str:
        origin = self.kind if self.description is None else f"seed={self.seed}, kind={self.kind!r}"
        if self.kind != "hadamard":
            origin = f"density={self.density:.6g}, {origin}"
        return (
            f"Basis({self.in_features}, {self.out_features}, r={self.r}, {origin}, "
            f"format={self.format!r})"
        )
