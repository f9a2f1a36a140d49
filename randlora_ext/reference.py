"""RandLoRA in plain PyTorch on dense bases: the oracle of tests and benchmarks.

Nothing here is compiled or clever. Autograd through these functions gives reference gradients; in
float64 they agree with PEFT to rounding (tests/peft/test_peft.py).

Letters as everywhere: A (r, d), B (D, K), lam (r, n), gam (n, d), K = r * n, column c = j * n + i.
"""

import torch
from torch import Tensor


def scaled_basis_reference(A: Tensor, lam: Tensor, gam: Tensor) -> Tensor:
    """A' (K, d) with ``A'[j * n + i, k] = lam[j, i] * A[j, k] * gam[i, k]``."""
    return (lam[:, :, None] * A[:, None, :] * gam[None, :, :]).flatten(0, 1)


def delta_weight_reference(
    A: Tensor,
    B: Tensor,
    lam: Tensor,
    gam: Tensor,
    scaling: float,
    out_features: int,
    in_features: int,
) -> Tensor:
    """dW (out, in): ``scaling * B @ A'``, transposed if d == out < in."""
    product = scaling * (B @ scaled_basis_reference(A, lam, gam))
    return product if product.shape == (out_features, in_features) else product.T


def linear_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    lam: Tensor,
    gam: Tensor,
    scaling: float = 1.0,
) -> Tensor:
    """``F.linear(x, weight, bias) + scaling * adapter(x)``, in the order in which PEFT computes.

    x (..., in); the adapter is ``(x @ A'^T) @ B^T`` if d == in and ``(x @ B) @ A'`` if
    d == out < in. Without a weight, y is the adapter's part alone.
    """
    scaled = scaled_basis_reference(A, lam, gam)
    if x.shape[-1] == A.shape[1]:
        y = torch.nn.functional.linear(torch.nn.functional.linear(x, scaled), B) * scaling
    else:
        y = torch.nn.functional.linear(torch.nn.functional.linear(x, B.T), scaled.T) * scaling
    return y if weight is None else torch.nn.functional.linear(x, weight, bias) + y
