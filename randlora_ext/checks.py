"""Checks of arguments, whose errors name the argument, what it was and what is allowed."""

import contextlib
import difflib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}")


def warn_user(message: str) -> None:
    """Warns at the line that called this package, perhaps through torch or a library around it."""
    packages = [__file__, torch.__file__]
    for library in ("accelerate", "kernels", "peft", "transformers", "trl"):
        if library in sys.modules:
            packages.append(str(sys.modules[library].__file__))
    folders = [os.path.dirname(file) + os.sep for file in packages]
    not_users = (contextlib.__file__, *folders)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(not_users):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)


def at_most_ten(names: list[str]) -> str:
    """At most ten of them, for a message."""
    return f"{names[:10]}{' ...' if len(names) > 10 else ''}"


def check_one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raises ValueError, naming `name` and the nearest allowed value, unless it is one of them."""
    if not isinstance(value, str) or value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {[*allowed]}, got {value!r}{hint}")


def check_number(
    name: str, value: Any, allowed: str, fits: Callable[[Any], bool], types: Any = (int, float)
) -> None:
    """Raises TypeError or ValueError, naming `name`, unless `value` is a number that fits."""
    is_number = isinstance(value, types) and not isinstance(value, bool)
    is_huge = isinstance(value, int) and value.bit_length() > 1023  # a float may not hold it
    if not is_number or is_huge or not fits(value):
        shown = f"an integer of {value.bit_length()} bits" if is_huge else repr(value)
        error = ValueError if is_number else TypeError
        raise error(f"{name} must be {allowed}, got {shown}")


def check_integer(name: str, value: int, first: int, last: int, allowed: str = "") -> None:
    allowed = f"a Python integer in {allowed or [first, last]}"
    check_number(name, value, allowed, lambda v: first <= v <= last, int)


def check_seed(name: str, seed: int) -> None:
    check_integer(name, seed, 0, 2**64 - 1, "[0, 2**64)")


def check_r(r: int) -> None:
    # Memory and time grow with r, which a file may name. No layer needs r > d.
    check_integer("r", r, 1, 2**16)


def check_alpha(name: str, alpha: float) -> None:
    check_number(name, alpha, "a finite number", math.isfinite)


def check_dropout(dropout: float) -> None:
    check_number("randlora_dropout", dropout, "a number in [0, 1)", lambda v: 0 <= v < 1)


# ---- for dense_linear, what csrc/torch checks for the operators that have kernels ----------------

# Torch would broadcast or compute in another dtype.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_operand(
    name: str, t: Any, shape: tuple[int, ...], on: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Raises RuntimeError unless `t` is a tensor of that shape, on that device and of that dtype;
    None stands for all dtypes that kernels take."""
    dtypes = _DTYPES if dtype is None else (dtype,)
    fits = isinstance(t, Tensor) and tuple(t.shape) == shape and t.dtype in dtypes
    if fits and t.device == on:
        return
    allowed = "float32, float64, bfloat16 or float16" if dtype is None else str(dtype)
    raise RuntimeError(
        f"randlora: {name} must be a tensor {shape} of {allowed} on {on}, got {_described(t)}"
    )


def check_dimensions(name: str, t: Any, shape: str) -> None:
    """Raises RuntimeError unless `t` is a tensor with as many dimensions as the names in `shape`,
    none of them empty."""
    count = shape.count(",") + 1
    if not isinstance(t, Tensor) or t.dim() != count or t.numel() == 0:
        raise RuntimeError(f"randlora: {name} must be a tensor ({shape}), got {_described(t)}")


def _described(t: Any) -> str:
    if isinstance(t, Tensor):
        return f"{tuple(t.shape)} {t.dtype} on {t.device}"
    return repr(t)


def check_diagonals(lam: Any, gam: Any, d: int) -> None:
    """Raises RuntimeError unless lam is (r, n) and gam (n, d), with d at most r * n."""
    check_dimensions("lam", lam, "r, n")
    r, n = lam.shape
    check_operand("lam", lam, (r, n), lam.device)
    check_operand("gam", gam, (n, d), lam.device)
    if d > r * n:
        raise RuntimeError(
            f"randlora: gam must be (n, d) with d at most r * n = {r * n}, got {_described(gam)}"
        )


def check_linear(
    x: Any, weight: Any, bias: Any, lam: Tensor, sizes: tuple[int, int], dy: Any = None
) -> None:
    """Raises RuntimeError unless these fit a linear layer of `sizes`, (in, out), beside `lam`."""
    if weight is None and bias is not None:
        raise RuntimeError("randlora: bias was given without a weight; add it to the base output")
    n_in, n_out = sizes
    lead = tuple(x.shape[:-1]) if isinstance(x, Tensor) else ()
    on = lam.device
    check_operand("x", x, (*lead, n_in), on)
    if weight is not None:
        check_operand("weight", weight, (n_out, n_in), on, x.dtype)
    if bias is not None:
        check_operand("bias", bias, (n_out,), on, x.dtype)
    if dy is not None:
        check_operand(f"dy for x {tuple(x.shape)}", dy, (*lead, n_out), on, x.dtype)
