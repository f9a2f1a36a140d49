"""PEFT's bases A and B: how they are drawn, what stands for them, and one layer's basis."""

import secrets
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary, ref

import peft
import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.randlora.model import RandLoraModel
from torch import Tensor, nn

from ..basis import Basis, BasisDescription
from ..basis.cache import ordinary_tensors, share
from ..basis.dense import DenseMatrices
from ..basis.description import Shape
from ..basis.ternary import ImportedMatrices, pack_dense
from ..nn.input_scale import tensor_misfits
from .config import description_of_config

BASIS_NAMES = ("randlora_A", "randlora_B")

# The state dict that each dictionary of bases wrote last.
_written: "WeakKeyDictionary[PackedBufferDict, ref]" = WeakKeyDictionary()


def largest(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(D, d) of the bases that PEFT shares among layers of these (in_features, out_features)."""
    all_in, all_out = zip(*sizes, strict=True)
    widest = max(all_in), max(all_out)
    return max(widest), min(widest)


class _DrawnByPeft(RandLoraModel):
    """PEFT's bases for layers of up to (D, d), by PEFT's own code, without a model of such layers.

    Its ``randlora_A`` and ``randlora_B`` hold them under "default".
    """

    def __init__(self, config: peft.RandLoraConfig, D: int, d: int) -> None:
        nn.Module.__init__(self)  # BaseTuner's would want a model
        self.sizes = D, d
        with torch.device("cpu"):  # real values, also for a model on the meta device
            self._pre_injection_hook(self, config, "default")

    def _find_dim(self, config: peft.RandLoraConfig) -> tuple[int, int]:
        return self.sizes


def new_bases(config: peft.RandLoraConfig, D: int, d: int) -> tuple[Tensor, Tensor]:
    """A (r, 1, d) and B (D, n, r): as stock PEFT draws them, or what stands for generated ones.

    Raises ValueError if PEFT leaves no non-zero in one of them.
    """
    description = description_of_config(config)
    if description is not None:
        n = -(-d // config.r)
        A = PackedBasis(description, 1.0, (config.r, 1, d), torch.float32, "cpu")
        B = PackedBasis(description, 1.0, (D, n, config.r), torch.float32, "cpu")
        return A, B
    drawn: Any = _DrawnByPeft(config, D, d)
    A, B = drawn.randlora_A["default"], drawn.randlora_B["default"]
    for name, matrix in zip(BASIS_NAMES, (A, B), strict=True):
        if not bool(matrix.isfinite().all()):  # PEFT divides by the standard deviation, 0
            raise ValueError(
                f"PEFT's sparse bases leave no non-zero in {name} {tuple(matrix.shape)}; the "
                "layers are too small for them"
            )
    return A, B


class PackedBasis(Tensor):
    """Stands for one of PEFT's bases: a matrix (rows, ...) of {-value, 0, value}, whose trailing
    dims are flattened into columns. It never changes, and `to` makes another one.

    PEFT reads ``shape``, ``dtype`` and ``device`` of its bases and calls ``to``, of tensors alone
    (``cast_adapter_dtype``); transformers reads ``shape``. This has no more: other operations raise
    RuntimeError. What of PEFT's layers computes with bases is overridden. PEFT's tests compare
    ``data_ptr``, which layers share.

    Args:
        content: bit planes (2, rows, ceil(columns / 64)), or the description that generates A and B
            of each layer, which has no dense form here.
        value: of the non-zeros.
        shape, dtype, device: of the tensor for which this stands. `content` stays where it is.
    """

    content: Tensor | BasisDescription
    value: float

    def __new__(
        cls,
        content: Tensor | BasisDescription,
        value: float,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "PackedBasis":
        place = torch.device(device)
        self = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=place)
        self.content, self.value = content, value
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} needs a dense tensor, which .dense() makes of a PackedBasis")

    def to(self, *args: Any, **kwargs: Any) -> "PackedBasis":
        # As nn.Module.to reads its arguments. A tensor as a probe could not leave the meta device.
        given: Any = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = given[0] or self.device, given[1] or self.dtype
        if (device, dtype) == (self.device, self.dtype):
            return self  # as a tensor does; adapters of one key share a basis
        # A narrower dtype rounds the value, as it rounds the elements of a dense tensor.
        value = float(torch.tensor(self.value, dtype=dtype, device="cpu"))
        return PackedBasis(self.content, value, self.shape, dtype, device)

    def dense(self) -> Tensor:
        """A new dense tensor with the same values. Raises RuntimeError if they are generated."""
        if not isinstance(self.content, Tensor):
            raise RuntimeError(
                "randlora_A and randlora_B have no dense form here, because each layer generates "
                "its own: layer.basis_of(adapter, device).dense()"
            )
        make = torch.ops.randlora.planes_to_dense
        dense = make(self.content, self.shape[1:].numel(), self.value, self.dtype)
        return dense.view(self.shape).to(self.device)

    def data_ptr(self) -> int:
        return id(self.content)

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        about = f"dtype={self.dtype}, device={self.device}, value={self.value:.6g}"
        return f"PackedBasis({tuple(self.shape)}, {about})"

    def __reduce_ex__(self, protocol):
        return PackedBasis, (self.content, self.value, self.shape, self.dtype, self.device)

    def __deepcopy__(self, memo: dict) -> "PackedBasis":
        return self  # constant, and copies of a model should share it


def description_of_matrix(basis: Tensor) -> BasisDescription | None:
    """What generates the bases for which `basis` stands; None if it has elements."""
    content = getattr(basis, "content", None)
    return content if isinstance(content, BasisDescription) else None


def dense_of(basis: Tensor) -> Tensor:
    return basis.dense() if isinstance(basis, PackedBasis) else basis


class PackedBufferDict(MutableMapping, BufferDict):
    """PEFT's ``BufferDict`` of one basis (A or B) by adapter, with ternary ones packed.

    Model and layers share it. The tensors are not registered buffers, so DistributedDataParallel
    does not send them. A state dict holds saved bases dense and once: under the model, or under the
    first layer if `inject_adapter_in_model` made no model.
    """

    __hash__ = nn.Module.__hash__
    __eq__ = nn.Module.__eq__
    _bases: dict[str, Tensor] = {}  # until there are some

    def __init__(self, bases: Any = (), persistent: bool = True) -> None:
        super().__init__(persistent=persistent)
        self._bases = {}
        self._changed()
        self.update(bases)

    def saved(self, prefix: str = "") -> dict[str, Tensor]:
        """The bases that files hold, by their keys there: none that a key generates."""
        bases = self._bases if self.persistent else {}
        return {
            prefix + key: each for key, each in bases.items() if description_of_matrix(each) is None
        }

    def _changed(self) -> None:
        # A plain number for this content, since torch.compile cannot guard on the tensors.
        self.__dict__["version"] = secrets.randbits(60)

    # In PEFT's dictionary buffers are attributes; transformers loads adapters through them.

    def __getattr__(self, name: str):
        return self._bases[name] if name in self._bases else super().__getattr__(name)

    def __setattr__(self, name: str, value) -> None:
        if name in self._bases and isinstance(value, Tensor):
            self[name] = value
        else:
            super().__setattr__(name, value)

    def __getitem__(self, key: str) -> Tensor:
        return self._bases[key]

    def __setitem__(self, key: str, basis: Tensor) -> None:
        if not isinstance(basis, PackedBasis):
            if basis.is_meta:
                if key in self._bases:  # PEFT moves bases with a weight; these would be lost
                    return
                raise ValueError(f"the basis of adapter {key!r} is on the meta device: no values")
            # One that is not ternary stays dense.
            packed = pack_dense(basis.detach().reshape(len(basis), -1))
            if packed is not None:
                planes, value = packed
                basis = PackedBasis(planes, value, basis.shape, basis.dtype, basis.device)
        self._bases[key] = basis
        self._changed()

    def __delitem__(self, key: str) -> None:
        del self._bases[key]
        self._changed()

    def __len__(self) -> int:
        return len(self._bases)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bases)

    def _apply(self, fn, recurse: bool = True):
        # Takes only device and dtype from `fn`: `to_empty` would leave arbitrary values.
        for key, basis in self._bases.items():
            probe = fn(torch.empty(0, dtype=basis.dtype, device=basis.device))
            if isinstance(basis, PackedBasis) or not probe.is_meta:
                self._bases[key] = basis.to(probe.device, probe.dtype)
        self._changed()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        if _written.get(self, lambda: None)() is destination:
            return
        with suppress(TypeError):  # a plain dict; then every layer writes, as with stock PEFT
            _written[self] = ref(destination)
        for key, basis in self.saved(prefix).items():
            destination[key] = dense_of(basis).detach()  # a constant, so `keep_vars` too

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # The model reports missing bases, so layers that share the dictionary report none.
        own = self.saved(prefix)
        for key in own.keys() & state_dict.keys():
            saved, basis = state_dict[key], own[key]
            problems = tensor_misfits(key, saved, basis)
            if problems:
                error_msgs += problems
            else:
                moved = saved.to(dtype=basis.dtype, device=basis.device, copy=True)
                self[key.removeprefix(prefix)] = moved
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in own]


@ordinary_tensors
def layer_basis(
    A: Tensor, B: Tensor, in_features: int, out_features: int, r: int, with_kernels: bool = True
) -> Basis:
    """The basis of one layer shape of A (r, 1, >= d) and B (>= D, >= n, r): of kind "dense" if one
    is not ternary, or if the device has no kernels for packed bases (`with_kernels`).

    A layer uses the leading slices; in PEFT's flat order those of B are its first K columns. Raises
    ValueError if they are too small.
    """
    sizes = in_features, out_features, r
    shape = Shape(*sizes)
    d, D, n = shape.d, shape.D, shape.n
    a_fits = A.shape[0] == r and A.shape[-1] >= d
    b_fits = B.shape[0] >= D and B.shape[1] >= n and B.shape[2] == r
    if not (a_fits and b_fits):
        raise ValueError(
            f"randlora_A {tuple(A.shape)} and randlora_B {tuple(B.shape)} do not serve a layer of "
            f"{in_features} -> {out_features} features at r={r}, which needs ({r}, 1, >= {d}) and "
            f"(>= {D}, >= {n}, {r})"
        )
    if with_kernels and isinstance(A, PackedBasis) and isinstance(B, PackedBasis):
        basis = Basis.of(*sizes, _ternary(A, B))
    else:
        basis = Basis.of(*sizes, _dense(A, B))
    return basis.canonical()


# Layers share matrices made of the same tensors, which the matrices keep alive: so nothing else can
# have the identity by which they are found.


def _ternary(A: PackedBasis, B: PackedBasis) -> ImportedMatrices:
    a_planes, b_planes = A.content, B.content
    assert isinstance(a_planes, Tensor) and isinstance(b_planes, Tensor)
    columns = B.shape[1:].numel()
    key = "imported", id(a_planes), id(b_planes), A.value, B.value
    return share(key, lambda: ImportedMatrices(a_planes, b_planes, columns, A.value, B.value))


def _dense(A: Tensor, B: Tensor) -> DenseMatrices:
    return share(("dense", id(A), id(B)), lambda: _made_dense(A, B))


def _made_dense(A: Tensor, B: Tensor) -> DenseMatrices:
    # Packed ones lie on the CPU, wherever the model is.
    a, b = (t.to("cpu").dense() if isinstance(t, PackedBasis) else t for t in (A, B))
    return DenseMatrices(a.detach().flatten(1), b.detach().flatten(1), made_from=(A, B))
