"""What operator tests share: random layers, the ways to run them, and the error rule."""

import functools
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from randlora_ext import Basis, linear
from randlora_ext.basis.ternary import ImportedMatrices, pack_dense
from randlora_ext.ops import dense, hadamard, independent
from randlora_ext.reference import delta_weight_reference, linear_reference

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
NAMES = ("y", "dx", "dlam", "dgam")

# in, out, r: square, wide, tall, d not a multiple of r (the last base overhangs), r > d, r == d,
# r == 1 (n > 64: several plane words per rank index), one feature, sizes near vector lengths.
SHAPES = [
    (64, 64, 8), (48, 80, 8), (80, 48, 8), (50, 37, 7), (37, 50, 7), (20, 24, 32), (24, 24, 24),
    (101, 67, 1), (1, 1, 1), (5, 1, 2), (33, 130, 16),
]  # fmt: skip
DENSITIES = [1.0, 1 / 3, 0.07, 1 / 64]  # the first two are packed as planes, the others as lists
# Independent bases by their density, others by their kind.
BASES = [*DENSITIES, "hadamard", "dense"]
SCALED = "scaled hadamard"
# Every way in which a basis is stored.
KINDS = [1 / 3, 0.07, "hadamard", "dense"]
CALLS = pytest.mark.parametrize("basis", KINDS)


@dataclass
class Layer:
    """The arguments of one call of `linear`, and the gradient of its result."""

    basis: Basis
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    lam: Tensor
    gam: Tensor
    dy: Tensor
    scaling: float = 0.75
    input_scale: Tensor | None = None

    def to(self, target: torch.dtype | torch.device | str) -> "Layer":
        """With its tensors in that dtype, or on that device."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        moved = {k: v.to(target) for k, v in tensors.items()}
        if self.input_scale is not None:  # float32 in every dtype
            moved["input_scale"] = moved["input_scale"].float()
        return replace(self, **moved)

    def without_weight(self) -> "Layer":
        return replace(self, weight=None, bias=None)


@functools.lru_cache(4)  # packed once for the calls that follow each other
def make_basis(
    in_features: int,
    out_features: int,
    r: int,
    basis: float | str,
    seed: int = 3,
    dtype: torch.dtype = torch.float64,
) -> Basis:
    """Of the density of independent bases, or a kind; SCALED are Hadamard bases."""
    sizes = in_features, out_features, r
    if basis == "dense":
        return dense_basis(*sizes, dtype)
    if isinstance(basis, float):
        return Basis(*sizes, basis, seed)
    return Basis(*sizes, seed=seed, kind="hadamard")


def make_layer(
    in_features: int,
    out_features: int,
    r: int,
    basis: float | str,
    tokens: int,
    dtype: torch.dtype = torch.float64,
    lead: tuple[int, ...] = (),
    seed: int = 3,
) -> Layer:
    """Unit-variance x and dy, W of variance 1 / in; diagonals in float32, float64 for float64."""
    diagonals = torch.promote_types(dtype, torch.float32)
    input_scale = torch.linspace(0.1, 3, in_features) if basis == SCALED else None
    basis = make_basis(in_features, out_features, r, basis, seed, diagonals)
    make = torch.Generator().manual_seed(1000 * in_features + 10 * out_features + r + tokens)

    def normal(*shape, like=dtype, std=1.0):
        return (torch.randn(shape, generator=make, dtype=torch.float64) * std).to(like)

    return Layer(
        basis,
        normal(*lead, tokens, in_features),
        normal(out_features, in_features, std=in_features**-0.5),
        normal(out_features),
        normal(basis.r, basis.n, like=diagonals, std=basis.r**-0.5),
        normal(basis.n, basis.d, like=diagonals, std=basis.d**-0.5),
        normal(*lead, tokens, out_features),
        input_scale=input_scale,
    )


def with_basis_arguments(case: tuple, dtype: torch.dtype = torch.float32) -> tuple[Layer, tuple]:
    """A small layer, each of whose tensors wants a gradient, and its basis as operators take it."""
    # Of this seed neither A nor B is without elements.
    layer = make_layer(*case, 3, dtype, lead=(1,), seed=4)
    for tensor in (layer.x, layer.weight, layer.bias, layer.lam, layer.gam, layer.dy):
        tensor.requires_grad_()
    return layer, basis_arguments(layer)


def operator(basis: Basis, end: str = "linear"):
    """Of `torch.ops.randlora`, for that kind of basis."""
    return getattr(torch.ops.randlora, f"{basis.kind}_{end}")


def basis_arguments(layer: Layer) -> tuple:
    """The basis as its operators take it."""
    module = {"hadamard": hadamard, "dense": dense}.get(layer.basis.kind, independent)
    named = module.basis_arguments(
        layer.basis, layer.x.device, layer.scaling, layer.x.dtype, layer.input_scale
    )
    return tuple(named.values())


def dense_basis(in_features: int, out_features: int, r: int, dtype: torch.dtype) -> Basis:
    """Uniform, of matrices larger than the layer needs, as PEFT shares them over layers."""
    d, D = sorted((in_features, out_features))
    make = torch.Generator().manual_seed(d + D + r)
    A, B = (
        (12**0.5 * (torch.rand(shape, generator=make, dtype=torch.float64) - 0.5)).to(dtype)
        for shape in ((r, d + 3), (D + 5, -(-d // r) * r + 2))
    )
    return Basis.from_dense(A, B, in_features, out_features)


def imported_basis(A: Tensor, B: Tensor, in_features: int, out_features: int) -> Basis:
    """Of ternary matrices A (r, d) and B (D, K), packed as PEFT's are."""
    (a, a_value), (b, b_value) = pack_dense(A), pack_dense(B)
    matrices = ImportedMatrices(a, b, B.shape[1], a_value, b_value)
    return Basis.of(in_features, out_features, len(A), matrices)


@functools.lru_cache(8)
def matrices(basis: Basis, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return basis.dense(dtype=dtype)


def scaled_matrices(
    basis: Basis, input_scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A and B, of which the one on the input side is multiplied by the scale of the inputs."""
    A, B = matrices(basis, dtype)
    if input_scale is None:
        return A, B
    scale = input_scale.to(dtype)
    return (A * scale, B) if basis.expand else (A, B * scale[:, None])


def delta_by_reference(
    basis: Basis, lam: Tensor, gam: Tensor, scaling: float, input_scale: Tensor | None = None
) -> Tensor:
    """dW (out, in) by the plain PyTorch expression on float64 matrices."""
    sizes = basis.out_features, basis.in_features
    A, B = scaled_matrices(basis, input_scale, torch.float64)
    return delta_weight_reference(A, B, lam, gam, scaling, *sizes)


def forward_backward(function, layer: Layer) -> dict[str, Tensor]:
    """y, dx, dlam and dgam of function(x, lam, gam)."""
    leaves = [t.detach().requires_grad_() for t in (layer.x, layer.lam, layer.gam)]
    y = function(*leaves)
    gradients = torch.autograd.grad(y, leaves, layer.dy.to(y.dtype))
    return dict(zip(NAMES, (y.detach(), *gradients), strict=True))


def kept_by(function):
    """Every tensor that autograd saves while function runs, and its result."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return kept, result


def call(layer: Layer, **changes) -> Tensor:
    """y of `linear`, with other arguments where some are given."""
    names = ("x", "weight", "bias", "basis", "lam", "gam", "scaling", "input_scale")
    values = {name: getattr(layer, name) for name in names} | changes
    return linear(*(values[name] for name in names))


def ours(layer: Layer) -> dict[str, Tensor]:
    return forward_backward(lambda x, lam, gam: call(layer, x=x, lam=lam, gam=gam), layer)


def plain(layer: Layer) -> dict[str, Tensor]:
    """The plain PyTorch expression, everything in the dtype of x, gradients included."""
    layer = layer.to(layer.x.dtype)
    A, B = scaled_matrices(layer.basis, layer.input_scale, layer.x.dtype)
    return forward_backward(
        lambda x, lam, gam: linear_reference(
            x, layer.weight, layer.bias, A, B, lam, gam, layer.scaling
        ),
        layer,
    )


def by_plain_torch(layer: Layer) -> dict[str, Tensor]:
    """Of a Hadamard basis, by the functions for devices without kernels."""
    inputs = x, weight, _, lam, gam = layer.x, layer.weight, layer.bias, layer.lam, layer.gam
    bases = basis_arguments(layer)
    gradients = hadamard._plain_linear_backward(layer.dy, x, weight, lam, gam, *bases, True, True)
    return dict(zip(NAMES, (hadamard._plain_linear(*inputs, *bases), *gradients), strict=True))


WAYS = {"kernels": ours, "plain torch": by_plain_torch}


def ways(layer: Layer) -> dict:
    """Those that compute layers of this kind."""
    return WAYS if layer.basis.kind == "hadamard" else {"kernels": ours}


def exact(layer: Layer) -> dict[str, Tensor]:
    """The oracle: the same numbers, computed in float64."""
    return plain(layer.to(torch.float64))


def relative(value: Tensor, expected: Tensor) -> float:
    """||value - expected|| / ||expected||."""
    difference = (value.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-300)).item()


def largest_error(value: Tensor, oracle: Tensor) -> float:
    """Largest difference relative to the oracle's largest element; one wrong element shows."""
    if oracle.numel() == 0:
        return 0.0
    difference, size = (value - oracle).abs().max().item(), oracle.abs().max().item()
    return difference / size if size else (math.inf if difference else 0.0)


def assert_rule(
    results: dict[str, Tensor],
    simple: dict[str, Tensor],
    oracle: dict[str, Tensor],
    dtype: torch.dtype,
    floor: float = 1.0,
) -> None:
    """Every result errs at most twice as much as plain PyTorch does, plus `floor` eps of dtype.

    The floor is for sizes at which PyTorch happens to round hardly at all.
    """
    for name, value in results.items():
        error, allowed = relative(value, oracle[name]), relative(simple[name], oracle[name])
        bound = 2 * allowed + floor * torch.finfo(dtype).eps
        assert error <= bound, f"{name} errs by {error:.3g}, PyTorch by {allowed:.3g} in {dtype}"


def run_python(*arguments: object, **environment: str) -> str:
    """What a new process with this one's modules prints; it must succeed."""
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout
