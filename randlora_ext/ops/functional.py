"""The operators as functions of a `Basis`, which layers and users call.

Each is differentiable with respect to lam, gam (and x); the bases are constants.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..basis import Basis
from ..checks import check_alpha
from ..ranks import is_dtensor
from . import dense, hadamard, independent
from .registration import autocast, autocast_is_on

# What multiplies by the bases of each kind. Every module has `basis_arguments`, `linear`,
# `delta` and `what_computes`, with the same parameters.
_OPERATORS: dict[str, Any] = {
    "hadamard": hadamard,
    "independent": independent,
    "imported": independent,
    "dense": dense,
}
_USUAL = (Tensor, torch.nn.Parameter)  # other types are looked at more closely


def _check(
    basis: Basis,
    lam: Tensor,
    gam: Tensor,
    scaling: float = 1.0,
    input_scale: Tensor | None = None,
) -> None:
    """Checks what C++ cannot know; csrc/torch checks dtypes, devices and other shapes."""
    if not isinstance(basis, Basis):
        raise TypeError(f"basis must be a Basis, got {type(basis)}")
    if not (type(lam) in _USUAL and type(gam) in _USUAL):
        _check_tensor("lam", lam)
        _check_tensor("gam", gam)
    fit = lam.shape == basis.lam_shape and gam.shape == basis.gam_shape
    if not (fit and lam.is_floating_point() and gam.is_floating_point()):
        raise ValueError(
            f"lam must be (r, n) = {basis.lam_shape} and gam (n, d) = {basis.gam_shape}, of "
            "floating dtypes, got "
            f"{tuple(lam.shape)} {lam.dtype} and {tuple(gam.shape)} {gam.dtype}"
        )
    # A tensor would be broadcast. (Compiled code cannot ask math.isfinite.)
    if type(scaling) is not float or not abs(scaling) <= sys.float_info.max:
        check_alpha("scaling", scaling)
    if input_scale is not None:
        _check_input_scale(basis, input_scale)


def _check_input_scale(basis: Basis, input_scale: Any) -> None:
    if basis.kind != "hadamard":
        raise ValueError(f"input_scale goes with Hadamard bases, got kind={basis.kind!r}")
    if type(input_scale) not in _USUAL:
        _check_tensor("input_scale", input_scale)
    fits = input_scale.shape == (basis.in_features,) and input_scale.dtype is torch.float32
    if not fits or input_scale.requires_grad:
        got = f"{tuple(input_scale.shape)} {input_scale.dtype}"
        if input_scale.requires_grad:
            got += " that requires a gradient"
        raise ValueError(
            f"input_scale must be (in,) = {(basis.in_features,)}, float32 and a constant, got {got}"
        )


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value)}")
    if value.is_nested:
        raise TypeError(f"{name} must not be a nested tensor; pass its values()")
    if is_dtensor(value):  # torch's own message would not say what to do
        placements = tuple(value.placements)
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor placed {placements}; in forward FSDP2 "
            "gives plain ones, elsewhere take t.to_local() or t.full_tensor()"
        )


def delta_weight(
    basis: Basis,
    lam: Tensor,
    gam: Tensor,
    scaling: float = 1.0,
    input_scale: Tensor | None = None,
) -> Tensor:
    """dW (out, in): ``scaling * B @ A'``, ``A'[j * n + i, k] = lam[j, i] * A[j, k] * gam[i, k]``,
    transposed if d == out < in, and times ``input_scale`` (in,), if there is one: a constant,
    float32, of Hadamard bases alone.

    The result has the dtype of lam; sums are in float32 (float64 for float64). Bases other than
    Hadamard make a dense B, which lives as long as the call. Source: PEFT's ``get_delta_weight``;
    paper equation 3. Raises TypeError or ValueError, naming the argument.
    """
    _check(basis, lam, gam, scaling, input_scale)
    return _OPERATORS[basis.kind].delta(basis, lam, gam, scaling, input_scale)


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    basis: Basis,
    lam: Tensor,
    gam: Tensor,
    scaling: float = 1.0,
    input_scale: Tensor | None = None,
) -> Tensor:
    """``F.linear(x, weight, bias) + scaling * F.linear(x, B @ A')`` (B @ A' oriented as weight).

    Args:
        x: (..., in) in float32, float64, bfloat16 or float16.
        weight: (out, in) in the dtype of x. None computes the adapter alone, for base layers of
            any kind.
        bias: (out,) in the dtype of x, or None.
        lam: (r, n), any floating dtype; layers use float32.
        gam: (n, d), likewise.
        input_scale: (in,), float32, a constant, for Hadamard bases alone: the adapter's part is
            that of ``x * input_scale``. None is a vector of ones.

    Backward keeps weight, lam, gam and, unless all of them are frozen, x. Under autocast x, weight
    and bias are cast, as by F.linear.

    Raises:
        ValueError, TypeError: naming the argument. RuntimeError: from the operator's own checks.
    """
    _check(basis, lam, gam, scaling, input_scale)
    if type(x) not in _USUAL:
        _check_tensor("x", x)
    if weight is not None and type(weight) not in _USUAL:
        _check_tensor("weight", weight)
    if bias is not None and type(bias) not in _USUAL:
        _check_tensor("bias", bias)
    device = x.device
    if autocast_is_on(device.type):
        x = autocast(device.type, x)
        weight = None if weight is None else autocast(device.type, weight)
        bias = None if bias is None else autocast(device.type, bias)
    operators = _OPERATORS[basis.kind]
    arguments = operators.basis_arguments(basis, device, scaling, x.dtype, input_scale)
    return operators.linear(x, weight, bias, lam, gam, **arguments)


def what_computes(basis: Basis, device: torch.device, dtype: torch.dtype) -> str:
    """What multiplies by the basis there, as the end of "computed by"."""
    if device.type == "meta":
        return "nothing on the meta device"
    kernels = f"{_C.isa() if device.type == 'cpu' else device.type} kernels"
    return _OPERATORS[basis.kind].what_computes(basis, device, dtype, kernels)
