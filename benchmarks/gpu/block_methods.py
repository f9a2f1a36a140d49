"""The ways to train one layer that `block_gemm` compares, in plain torch."""

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

    def __init__(self, p: Problem, dtype: torch.dtype) -> None:
        self.dtype, (d, D) = dtype, p.size
        down, up = p.random(p.rank, d), p.random(D, p.rank)
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


def chunks(m: Tensor, G: int) -> Tensor:
    """(rows, G * columns) seen as (G, rows, columns)."""
    return m.view(m.shape[0], G, -1).transpose(0, 1)


class Block(Frozen):
    """The factored path with block bases. lambda and gamma are fp32 (float64 in that check)."""

    def __init__(self, p: Problem, G: int, align: int = 8) -> None:
        """V and U have a leading dimension that is a multiple of `align` elements."""
        (d, D), self.G, self.q = p.size, G, p.rank // G
        self.n = -(-d // p.rank)
        self.K = p.rank * self.n
        self.pitch = -(-p.tokens // align) * align
        self.signs = p.signs(G, self.q, d // G)  # of A; Hadamard's would cost the same
        self.Bt = p.signs(G, self.K // G, D // G)
        compute = torch.promote_types(p.dtype, torch.float32)
        super().__init__(p, diagonals(p, self.n, (d * self.K / G**2) ** -0.5, compute))

    # The products, each one batched GEMM.

    def blocks(self) -> Tensor:
        """A' as (G, K/G, d/G)."""
        lam, gam = (t.detach() for t in self.leaves)
        lam, gam = lam.view(self.G, self.q, self.n, 1), chunks(gam, self.G)[:, None]
        return (self.signs[:, :, None] * (lam * gam)).to(self.p.dtype).flatten(1, 2)

    def low(self) -> Tensor:
        """An empty V^T or U^T, (K, T)."""
        return self.p.x.new_empty(self.K, self.pitch)[:, : self.p.tokens]

    def by_a(self, low: Tensor) -> Tensor:
        """(K, T) as A' has it, (G, K/G, T)."""
        return low.view(self.G, -1, self.p.tokens)

    def by_b(self, low: Tensor) -> Tensor:
        """(K, T) as B has it, (G, K/G, T): every G-th row. A leading dimension, not a copy."""
        return low.view(-1, self.G, self.p.tokens).transpose(0, 1)

    def make_v(self, blocks: Tensor) -> Tensor:
        low = self.low()
        torch.bmm(blocks, chunks(self.p.x, self.G).transpose(1, 2), out=self.by_a(low))
        return low

    def add_to_y(self, y: Tensor, v: Tensor) -> None:
        chunks(y, self.G).baddbmm_(self.by_b(v).transpose(1, 2), self.Bt)

    def make_u(self) -> Tensor:
        low = self.low()
        torch.bmm(self.Bt, chunks(self.p.dy, self.G).transpose(1, 2), out=self.by_b(low))
        return low

    def add_to_dx(self, dx: Tensor, u: Tensor, blocks: Tensor) -> None:
        chunks(dx, self.G).baddbmm_(self.by_a(u).transpose(1, 2), blocks)

    def make_p(self, u: Tensor) -> Tensor:
        return torch.bmm(self.by_a(u), chunks(self.p.x, self.G))

    def contract(self, P: Tensor) -> tuple[Tensor, Tensor]:
        lam, gam = (t.detach() for t in self.leaves)
        terms = P.view(self.G, self.q, self.n, -1) * self.signs[:, :, None]
        of_lam = (terms * chunks(gam, self.G)[:, None]).sum(-1).reshape(lam.shape)
        of_gam = (terms * lam.view(self.G, self.q, self.n, 1)).sum(1)
        return of_lam, of_gam.transpose(0, 1).reshape(gam.shape)

    def merged(self, blocks: Tensor) -> Tensor:
        """W + dW, one batched GEMM for each chunk of outputs, K / G^2 deep."""
        W = torch.empty_like(self.p.W)
        for g in range(self.G):
            rows_of = slice(g * (len(W) // self.G), (g + 1) * (len(W) // self.G))
            left = self.Bt[g].view(self.G, -1, len(W) // self.G).transpose(1, 2)
            old, new = (chunks(w[rows_of], self.G) for w in (self.p.W, W))
            torch.baddbmm(old, left, blocks[:, g :: self.G], out=new)
        return W

    # The steps. With `blocks` given (and W'), they are the products alone.

    def step(self, blocks: Tensor | None = None) -> tuple[Tensor, ...]:
        p, made = self.p, blocks
        y = F.linear(p.x, p.W)
        self.add_to_y(y, self.make_v(self.blocks() if made is None else made))
        dx, u = p.dy @ p.W, self.make_u()
        self.add_to_dx(dx, u, self.blocks() if made is None else made)
        P = self.make_p(u)
        return (y, dx, *self.contract(P)) if made is None else (y, dx, P)

    def delta(self, *leaves: Tensor) -> Tensor:
        d, D = self.p.size
        A = self.signs.new_zeros(self.p.rank, d, dtype=torch.float64)
        B = A.new_zeros(D, self.K)
        for g in range(self.G):
            A[g * self.q : (g + 1) * self.q, g * (d // self.G) : (g + 1) * (d // self.G)] = (
                self.signs[g]
            )
            B[g * (D // self.G) : (g + 1) * (D // self.G), g :: self.G] = self.Bt[g].T
        return B @ _ScaledA.apply(A, *leaves).flatten(end_dim=1)


class Merged(Block):
    """W' is formed anew forward and backward, as it would be in training."""

    def step(self, W: Tensor | None = None) -> tuple[Tensor, ...]:
        p = self.p
        y = F.linear(p.x, self.merged(self.blocks()) if W is None else W)
        dx = p.dy @ (self.merged(self.blocks()) if W is None else W)
        P = self.make_p(self.make_u())
        return (y, dx, *self.contract(P)) if W is None else (y, dx, P)


def methods(p: Problem, groups: list[int]) -> dict[tuple[str, str], Frozen]:
    """All methods, by name and density."""
    fp32 = torch.promote_types(p.dtype, torch.float32)
    made: dict[tuple[str, str], Frozen] = {
        ("frozen", ""): Frozen(p),
        (f"LoRA r={p.rank}, fp32 adapter (PEFT's default)", ""): Lora(p, fp32),
        (f"LoRA r={p.rank}, bf16 adapter", ""): Lora(p, p.dtype),
        ("dense bases, fp32 adapter (PEFT's default)", ""): Dense(p, fp32),
        ("dense bases, bf16 adapter", ""): Dense(p, p.dtype),
    }
    for G in groups:
        made["block, factored", f"1/{G}"] = Block(p, G)
        made["block, merged", f"1/{G}"] = Merged(p, G)
    return made
