"""The ways to train one layer that `hadamard_torch` compares, in plain torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

SCALING = 1.0  # multiplied in by a kernel of its own, as PEFT does


@dataclass
class Problem:
    """One layer and its batch: W (D, d), x (T, d), dy (T, D)."""

    size: tuple[int, int]
    tokens: int
    rank: int
    dtype: torch.dtype
    device: torch.device
    W: Tensor = field(init=False)
    x: Tensor = field(init=False)
    dy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        d, D = self.size
        self.W = self.random(D, d) / d**0.5
        self.x, self.dy = self.random(self.tokens, d), self.random(self.tokens, D)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def signs(self, *shape: int) -> Tensor:
        return (torch.randint(0, 2, shape, device=self.device) * 2 - 1).to(self.dtype)


class Frozen:
    """y = x W^T and dx = dy W; the methods below add an adapter to it."""

    def __init__(self, p: Problem, leaves: Sequence[Tensor] = ()) -> None:
        self.p, self.leaves = p, leaves

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.p.W)

    def delta(self, *leaves: Tensor) -> Tensor:
        """dW in float64, of `leaves` in float64: what the oracle multiplies by."""
        return leaves[0].new_zeros(()) if leaves else torch.zeros((), device=self.p.device)

    def step(self) -> tuple[Tensor, ...]:
        """y, dx and the gradients of the leaves."""
        x = self.p.x.detach().requires_grad_()
        y = self.forward(x)
        return y.detach(), *torch.autograd.grad(y, [x, *self.leaves], self.p.dy)

    def error(self) -> float:
        """The largest relative error of `step` against float64."""
        p = self.p
        x, *leaves = (t.detach().double().requires_grad_() for t in (p.x, *self.leaves))
        y = x @ (p.W.double() + self.delta(*leaves)).T
        want = [y, *torch.autograd.grad(y, [x, *leaves], p.dy.double())]
        got = [t.double() for t in self.step()]
        return max(
            float((g - w.detach()).norm() / w.detach().norm())
            for g, w in zip(got, want, strict=True)
        )


class Lora(Frozen):
    """As PEFT computes it: the adapter in its own dtype, x and the sum converted."""

    def __init__(self, p: Problem, dtype: torch.dtype, rank: int) -> None:
        self.dtype, (d, D) = dtype, p.size
        down, up = p.random(rank, d), p.random(D, rank)
        super().__init__(p, [(t * 0.05).to(dtype).requires_grad_() for t in (down, up)])

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.leaves
        y = super().forward(x) + F.linear(F.linear(x.to(self.dtype), down), up) * SCALING
        return y.to(x.dtype)

    def delta(self, *leaves: Tensor) -> Tensor:
        return leaves[1] @ leaves[0]


class _ScaledA(torch.autograd.Function):
    """lambda * A * gamma, (r, n, d), keeping only its operands."""

    @staticmethod
    def forward(ctx, A, lam, gam):
        ctx.save_for_backward(A, lam, gam)
        return lam[:, :, None] * A[:, None] * gam

    @staticmethod
    def backward(ctx, grad):
        A, lam, gam = ctx.saved_tensors
        of_lam = torch.einsum("jik,jk,ik->ji", grad, A, gam)
        return None, of_lam, torch.einsum("jik,jk,ji->ik", grad, A, lam)


class Dense(Frozen):
    """Dense bases as PEFT multiplies by them: two GEMMs forward, three backward."""

    def __init__(self, p: Problem, dtype: torch.dtype) -> None:
        self.dtype, (d, D) = dtype, p.size
        n = -(-d // p.rank)
        self.A, self.B = p.signs(p.rank, d).to(dtype), p.signs(D, p.rank * n).to(dtype)
        super().__init__(p, diagonals(p, n, (d * p.rank * n) ** -0.5, dtype))

    def forward(self, x: Tensor) -> Tensor:
        scaled = _ScaledA.apply(self.A, *self.leaves).flatten(end_dim=1)
        y = super().forward(x) + F.linear(F.linear(x.to(self.dtype), scaled), self.B) * SCALING
        return y.to(x.dtype)

    def delta(self, *leaves: Tensor) -> Tensor:
        return self.B.double() @ _ScaledA.apply(self.A.double(), *leaves).flatten(end_dim=1)


def diagonals(p: Problem, n: int, scale: float, dtype: torch.dtype) -> list[Tensor]:
    """lambda (r, n) and gamma (n, d); `scale`, which makes dW half as large as W, is in gamma."""
    lam, gam = p.random(p.rank, n), 0.5 * scale * p.random(n, p.size[0])
    return [t.to(dtype).requires_grad_() for t in (lam, gam)]


def sylvester(size: int, like: Tensor) -> Tensor:
    """Hadamard's matrix of a power of two."""
    H = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


class Hadamard(Frozen):
    """Hadamard bases, d == in: class products by bmm, the transform as two matrix products.

    Nothing is fused and every intermediate is in the dtype of x, so kernels can only be faster. The
    steps are those of csrc/torch/hadamard.cpp.
    """

    def __init__(self, p: Problem) -> None:
        (d, D), r = p.size, p.rank
        self.n = -(-d // r)
        self.K = r * self.n
        self.N = 1 << (self.K - 1).bit_length()
        low = 1 << (self.N.bit_length() - 1) // 2
        self.low, self.high = sylvester(low, p.W), sylvester(self.N // low, p.W)
        self.mixing = sylvester(1 << (r - 1).bit_length(), p.W)[:r, :r].contiguous()
        self.s, self.row, self.col = p.signs(d), p.signs(D), p.signs(self.K)
        compute = torch.promote_types(p.dtype, torch.float32)
        super().__init__(p, diagonals(p, self.n, (d * self.K) ** -0.5, compute))

    def blocks(self) -> Tensor:
        """gamma with the signs of A's columns, class by class: (r, columns of a class, n)."""
        signed = (self.leaves[1].detach() * self.s).to(self.p.dtype)
        return signed.view(self.n, self.p.rank, self.n).permute(1, 2, 0)

    def classes(self, x: Tensor) -> Tensor:
        """(T, d) as (r, T, n)."""
        return x.view(len(x), self.p.rank, self.n).transpose(0, 1)

    def mix(self, z: Tensor) -> Tensor:
        """H over the rank indices: (r, T, n)."""
        return (self.mixing @ z.flatten(1)).view_as(z)

    def transform(self, v: Tensor) -> Tensor:
        """(T, N) @ H."""
        halves = v.view(len(v), len(self.high), len(self.low))
        return (self.high @ halves @ self.low).flatten(1)

    def weights(self) -> Tensor:
        """lambda with the signs of B's columns, (r, 1, n)."""
        signed = self.leaves[0].detach().flatten() * self.col
        return signed.to(self.p.dtype).view(self.p.rank, 1, self.n)

    def repeated(self, v: Tensor) -> Tensor:
        """(T, N) at the D rows of B, which repeat."""
        D = self.p.size[1]
        return v[:, :D] if D <= self.N else v.repeat(1, -(-D // self.N))[:, :D]

    def folded(self, y: Tensor) -> Tensor:
        """The adjoint of `repeated`."""
        times = -(-y.shape[1] // self.N)
        y = F.pad(y, (0, times * self.N - y.shape[1]))
        return y if times == 1 else y.view(len(y), times, self.N).sum(1)

    def add_to_y(self, y: Tensor, z: Tensor, weights: Tensor) -> None:
        v = (self.mix(z) * weights).transpose(0, 1).flatten(1)
        y.addcmul_(self.repeated(self.transform(F.pad(v, (0, self.N - self.K)))), self.row)

    def make_u(self, y: Tensor) -> Tensor:
        """(r, T, n)."""
        u = self.transform(self.folded(y * self.row))[:, : self.K]
        return self.classes(u)

    def gradients(self, u: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        lam, gam = self.leaves
        of_lam = (u.to(lam.dtype) * self.mix(z)).sum(1).flatten() * self.col
        P = torch.bmm(w.transpose(1, 2), self.classes(self.p.x))  # (r, n, columns)
        of_gam = P.permute(1, 0, 2).flatten(1).to(gam.dtype) * self.s
        return of_lam.view_as(lam), of_gam

    def step(self) -> tuple[Tensor, ...]:
        p, blocks, weights = self.p, self.blocks(), self.weights()
        y = F.linear(p.x, p.W)
        self.add_to_y(y, torch.bmm(self.classes(p.x), blocks), weights)
        dx = p.dy @ p.W
        z, u = torch.bmm(self.classes(p.x), blocks), self.make_u(p.dy)
        w = self.mix(u * weights)
        self.classes(dx).baddbmm_(w, blocks.transpose(1, 2))
        return y, dx, *self.gradients(u, z, w)

    def delta(self, *leaves: Tensor) -> Tensor:
        lam, gam = leaves
        (d, D), wide = self.p.size, gam
        A = sylvester(len(self.mixing), wide).repeat_interleave(self.n, 1)[:, :d] * self.s
        H = sylvester(self.N, wide)
        B = self.row[:, None] * H[torch.arange(D, device=H.device) % self.N, : self.K] * self.col
        return B @ _ScaledA.apply(A, lam, gam).flatten(end_dim=1)


def methods(p: Problem) -> dict[str, Frozen]:
    """All methods by name. One LoRA has as many parameters as RandLoRA."""
    fp32, (d, D) = torch.promote_types(p.dtype, torch.float32), p.size
    n = -(-d // p.rank)
    equal = round((p.rank * n + n * d) / (d + D))
    return {
        "frozen": Frozen(p),
        f"LoRA r={p.rank}, fp32 adapter (PEFT's default)": Lora(p, fp32, p.rank),
        f"LoRA r={p.rank}, bf16 adapter": Lora(p, p.dtype, p.rank),
        f"LoRA of equal parameters (r={equal}), bf16 adapter": Lora(p, p.dtype, equal),
        "dense bases, bf16 adapter": Dense(p, p.dtype),
        "Hadamard, plain torch": Hadamard(p),
    }
