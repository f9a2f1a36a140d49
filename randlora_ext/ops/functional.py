"""The operators as functions of a `TernaryBasis`, which layers and users call.

Each is differentiable with respect to lam, gam (and x); the bases are constants.
"""

import torch
from torch import Tensor

from ..basis import TernaryBasis
from ..basis.description import as_signed, check_seed
from ..kernels import serve
from . import autocast, autograd, dense, hadamard
from .dtensor import refuse_dtensor
from .path import choose

_ops = torch.ops.randlora
_PLAIN = (Tensor, torch.nn.Parameter)  # subclasses are looked at more closely


def _check_types(basis: TernaryBasis, **tensors: Tensor) -> None:
    """Checks what C++ cannot know; csrc/torch/check.cpp checks shapes, dtypes and devices."""
    if not isinstance(basis, TernaryBasis):
        raise TypeError(f"basis must be a TernaryBasis, got {type(basis)}")
    for name, value in tensors.items():
        if type(value) not in _PLAIN:
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value)}")
            refuse_dtensor(name, value)
    if torch.jit.is_tracing():
        raise RuntimeError(
            "randlora_ext does not support torch.jit.trace; use torch.export or torch.compile"
        )


def _check_served(basis: TernaryBasis, name: str, tensor: Tensor) -> None:
    """Raises ValueError if this kind of bases needs kernels that the device does not have."""
    kind = tensor.device.type
    if kind != "meta" and not serve(kind) and basis.format in ("lists", "planes"):
        raise ValueError(
            f"{name} is on {tensor.device}, for which no kernels are loaded here "
            "(randlora_ext.build_info()['cuda']); Hadamard and dense bases work without, in plain "
            "torch"
        )


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
        dtype = lam.dtype if lam.is_floating_point() else torch.float32  # refused by the operator
        basis_or_A = basis_or_A.dense_a(lam.device, dtype)
    return autograd.scaled_basis(basis_or_A, lam, gam)


def delta_weight(basis: TernaryBasis, lam: Tensor, gam: Tensor, scaling: float = 1.0) -> Tensor:
    """dW (out, in): ``scaling * B @ scaled_basis(A, lam, gam)``, transposed if d == out < in.

    The result has the dtype of lam; sums are in float32 (float64 for float64). With
    independent bases neither A' nor a dense B is made.
    Source: PEFT's ``get_delta_weight``; paper equation 3.
    """
    _check_types(basis, lam=lam, gam=gam)
    _check_served(basis, "lam", lam)
    if basis.kind == "hadamard":
        return hadamard.weight(None, basis, lam, gam, scaling)
    if basis.kind == "dense":
        return dense.delta_weight(basis, lam, gam, scaling)
    return autograd.delta_weight(
        lam,
        gam,
        basis.packed(lam.device),
        scaling * basis.scale,
        basis.out_features,
        basis.in_features,
        basis.slice_expand,
    )


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
    _check_types(basis, lam=lam, gam=gam)
    if tuple(weight.shape) != (basis.out_features, basis.in_features):
        raise ValueError(
            f"weight must be (out, in) = ({basis.out_features}, {basis.in_features}), "
            f"got {tuple(weight.shape)}"
        )
    if rounding_seed is not None:
        check_seed("rounding_seed", rounding_seed)
        rounding_seed = as_signed(rounding_seed)
        if not serve(weight.device.type):
            raise ValueError(f"rounding_seed needs our kernels, which {weight.device} has none of")
    _check_served(basis, "weight", weight)
    if basis.kind == "hadamard":
        return hadamard.weight(weight, basis, lam, gam, scaling, rounding_seed)
    if basis.kind == "dense":
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = dense.delta_weight(basis, lam.to(wide), gam.to(wide), scaling)
        if rounding_seed is None:
            return (weight.to(wide) + delta).to(weight.dtype)
        return _ops.add_rounded(weight, delta, rounding_seed)
    packed, scale = basis.packed(lam.device), scaling * basis.scale
    return _ops.merged_weight(weight, lam, gam, packed, scale, rounding_seed, basis.slice_expand)


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
    _check_types(basis, x=x, lam=lam, gam=gam)
    if x.dim() == 0 or x.shape[-1] != basis.in_features:
        raise ValueError(
            f"x must be (..., in_features) with in_features = {basis.in_features}, "
            f"got {tuple(x.shape)}"
        )
    kind = x.device.type
    _check_served(basis, "x", x)
    if autocast.is_on(kind):  # the path depends on the dtype
        x, weight, bias = autocast.cast(kind, (x, weight, bias))
    tokens = x.numel() // basis.in_features  # keeps a symbolic size symbolic
    path, b_side = choose(path, basis, tokens, x.dtype, weight is not None, kind)
    if basis.kind == "hadamard":
        return hadamard.linear(x, weight, bias, basis, lam, gam, scaling, path == "merged")
    if basis.kind == "dense":
        return dense.linear(x, weight, bias, basis, lam, gam, scaling, path)
    packed = basis.packed(x.device)
    if b_side == "dense" and path == "factored":
        packed = [*packed, basis.dense_b(x.device, x.dtype)]
    return autograd.linear(
        x,
        weight,
        bias,
        lam,
        gam,
        packed,
        scaling * basis.scale,
        basis.out_features,
        path,
        basis.slice_expand,
    )
