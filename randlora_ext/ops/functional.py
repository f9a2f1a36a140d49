"""The operators as functions of a `TernaryBasis`, which layers and users call.

Each is differentiable with respect to lam, gam (and x); the bases are constants.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..basis import TernaryBasis
from ..basis.description import as_signed, check_seed
from ..devices import serve
from ..ranks import is_dtensor
from . import dense, hadamard, ternary
from .path import choose
from .registration import autocast, autocast_is_on

_ops = torch.ops.randlora
_PLAIN = (Tensor, torch.nn.Parameter)  # subclasses are looked at more closely


def _check_types(basis: TernaryBasis, **tensors: Any) -> None:
    """Checks what C++ cannot know; csrc/torch/check.cpp checks dtypes, devices and other shapes."""
    if not isinstance(basis, TernaryBasis):
        raise TypeError(f"basis must be a TernaryBasis, got {type(basis)}")
    for name, value in tensors.items():
        if type(value) not in _PLAIN:
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value)}")
            if is_dtensor(value):  # torch's own message would not say what to do
                placements = tuple(tensors[name].placements)
                raise TypeError(
                    f"{name} must be a plain tensor, got a DTensor placed {placements}; in forward "
                    "FSDP2 gives plain ones, and elsewhere take t.to_local() or t.full_tensor()"
                )
    if torch.jit.is_tracing():
        raise RuntimeError(
            "randlora_ext does not support torch.jit.trace; use torch.export or torch.compile"
        )
    r, n, d = basis.r, basis.n, basis.d
    for name, letters, shape in (("lam", "(r, n)", (r, n)), ("gam", "(n, d)", (n, d))):
        value = tensors[name]
        if tuple(value.shape) != shape or not value.is_floating_point():
            raise ValueError(
                f"{name} must be {letters} = {shape} of a floating dtype, got "
                f"{tuple(value.shape)} {value.dtype}"
            )


def _module(basis: TernaryBasis, name: str, tensor: Tensor) -> ModuleType:
    """`hadamard`, `ternary` or `dense`: the operators that compute on the device of `tensor`.

    Raises ValueError if this kind of bases needs kernels that the device does not have.
    """
    if basis.kind in ("hadamard", "dense"):
        return hadamard if basis.kind == "hadamard" else dense
    if not tensor.is_meta and not serve(tensor.device.type):
        raise ValueError(
            f"{name} is on {tensor.device}, for which no kernels are loaded here "
            "(randlora_ext.build_info()['cuda']); Hadamard and dense bases work without, in plain "
            "torch"
        )
    return ternary


def scaled_basis(basis_or_A: TernaryBasis | Tensor, lam: Tensor, gam: Tensor) -> Tensor:
    """A' (K, d): ``(lam[:, :, None] * A[:, None] * gam[None]).flatten(0, 1)``.

    Args:
        basis_or_A: a basis (its scaled A is used), or a dense A (r, d) of any floating type.
        lam: (r, n).  gam: (n, d).

    Returns:
        (K, d) in the dtype of A; for a basis in the dtype of lam. Row c = j * n + i.

    One pass forward, and one backward for lam and gam; neither makes another (K, d) tensor.
    Source: PEFT's ``UniqueBaseGrad``. Raises TypeError or RuntimeError, naming the argument.
    """
    if isinstance(basis_or_A, TernaryBasis):
        _check_types(basis_or_A, lam=lam, gam=gam)
        _module(basis_or_A, "lam", lam)
        basis_or_A = basis_or_A.dense_a(lam.device, lam.dtype)
    return dense.scaled(basis_or_A, lam, gam)


def delta_weight(basis: TernaryBasis, lam: Tensor, gam: Tensor, scaling: float = 1.0) -> Tensor:
    """dW (out, in): ``scaling * B @ scaled_basis(A, lam, gam)``, transposed if d == out < in.

    The result has the dtype of lam; sums are in float32 (float64 for float64). With
    independent bases neither A' nor a dense B is made.
    Source: PEFT's ``get_delta_weight``; paper equation 3.
    """
    _check_types(basis, lam=lam, gam=gam)
    module = _module(basis, "lam", lam)
    if module is dense:
        return dense.delta(basis, lam, gam, scaling)
    bases = module.operands(basis, lam.device, scaling)
    if module is hadamard:
        return hadamard.weight(None, lam, gam, *bases, None)
    return ternary.delta(lam, gam, *bases)


@torch.no_grad()
def merged_weight(
    basis: TernaryBasis,
    weight: Tensor,
    lam: Tensor,
    gam: Tensor,
    scaling: float = 1.0,
    rounding_seed: int | None = None,
) -> Tensor:
    """W + dW: ``(weight.float() + delta_weight(...)).to(weight.dtype)``, in one pass; no gradient.

    Args:
        weight: (out, in). The sum is computed in float32 (float64 for float64), rounded once.
        rounding_seed: in [0, 2**64), for a 16-bit weight: rounds up or down at random so that the
            expected value is exact, and changes below half an ulp are not all lost. The random
            words depend on seed and element alone (csrc/core/stochastic.h), not on the device.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument.
    """
    _check_types(basis, lam=lam, gam=gam, weight=weight)
    if tuple(weight.shape) != (basis.out_features, basis.in_features):
        raise ValueError(
            f"weight must be (out, in) = ({basis.out_features}, {basis.in_features}), "
            f"got {tuple(weight.shape)}"
        )
    if rounding_seed is not None:
        check_seed("rounding_seed", rounding_seed)
        rounding_seed = as_signed(rounding_seed)
        if weight.device.type != "meta" and not serve(weight.device.type):
            raise ValueError(f"rounding_seed needs our kernels, which {weight.device} has none of")
    module = _module(basis, "weight", weight)
    if module is dense:
        wide = torch.promote_types(weight.dtype, torch.float32)
        dW = dense.delta(basis, lam.to(wide), gam.to(wide), scaling)
        if rounding_seed is None:
            return (weight.to(wide) + dW).to(weight.dtype)
        return _ops.add_rounded(weight, dW, rounding_seed)
    bases = module.operands(basis, lam.device, scaling)
    operator = _ops.hadamard_weight if module is hadamard else _ops.merged_weight
    return operator(weight, lam, gam, *bases, rounding_seed)


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    basis: TernaryBasis,
    lam: Tensor,
    gam: Tensor,
    scaling: float = 1.0,
    path: str = "auto",
) -> Tensor:
    """``F.linear(x, weight, bias) + scaling * F.linear(x, B @ A')`` (B @ A' oriented as weight).

    Args:
        x: (..., in) in float32, float64, bfloat16 or float16.
        weight: (out, in) in the dtype of x. None computes the adapter alone, for base layers of
            any kind.
        bias: (out,) in the dtype of x, or None.
        lam: (r, n), any floating dtype; layers use float32.
        gam: (n, d), likewise.
        path: "factored", "delta", "merged" or "auto"; see `randlora_ext.explain`. Hadamard bases
            have no "delta".

    Backward keeps x, lam and gam. Under autocast x, weight and bias are cast as by F.linear.

    Raises:
        ValueError, TypeError: naming the argument. RuntimeError: from the operator's own checks.
    """
    given = {name: t for name, t in (("weight", weight), ("bias", bias)) if t is not None}
    _check_types(basis, x=x, lam=lam, gam=gam, **given)
    if x.dim() == 0 or x.shape[-1] != basis.in_features:
        raise ValueError(
            f"x must be (..., in_features) with in_features = {basis.in_features}, "
            f"got {tuple(x.shape)}"
        )
    module, kind = _module(basis, "x", x), x.device.type
    if autocast_is_on(kind):  # the path depends on the dtype
        x, weight, bias = autocast(kind, (x, weight, bias))
    tokens = x.numel() // basis.in_features  # keeps a symbolic size symbolic
    path, b_side = choose(path, basis, tokens, x.dtype, weight is not None, kind)
    inputs = x, weight, bias, lam, gam
    if module is hadamard:
        bases = hadamard.operands(basis, x.device, scaling)
        return hadamard.linear(*inputs, *bases, path == "merged")
    if module is dense:
        return dense.linear(*inputs, *dense.operands(basis, x.device, scaling, x.dtype), path)
    b_dense = basis.dense_b(x.device, x.dtype) if b_side == "dense" else None
    return ternary.linear(*inputs, *ternary.operands(basis, x.device, scaling), path, b_dense)
