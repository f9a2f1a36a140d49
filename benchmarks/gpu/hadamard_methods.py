"""The ways to train one layer that `hadamard_torch` compares, in plain torch."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

peft = None
with suppress(ModuleNotFoundError):  # the other methods need torch alone
    import peft


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


class AddmmLora(Frozen):
    """LoRA in the dtype of x, written out: what it costs at best in torch's products."""

    def __init__(self, p: Problem, rank: int) -> None:
        d, D = p.size
        super().__init__(p, [p.random(*shape) * 0.05 for shape in ((rank, d), (D, rank))])

    def delta(self, *leaves: Tensor) -> Tensor:
        return leaves[1] @ leaves[0]

    def step(self) -> tuple[Tensor, ...]:
        p, (down, up) = self.p, self.leaves
        h = p.x @ down.T
        y = (p.x @ p.W.T).addmm_(h, up.T)
        g = p.dy @ up
        dx = (p.dy @ p.W).addmm_(g, down)
        return y, dx, g.T @ p.x, p.dy.T @ h


class PeftLora(Frozen):
    """PEFT's own layer with its defaults: in 16 bits the adapter is in float32."""

    def __init__(self, p: Problem, rank: int) -> None:
        base = nn.Linear(*p.size, bias=False, device="meta")
        base.weight = nn.Parameter(p.W, requires_grad=False)
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
        self.layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
        leaves = [part["default"].weight for part in (self.layer.lora_A, self.layer.lora_B)]
        nn.init.normal_(leaves[1], std=0.05)
        super().__init__(p, leaves)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def delta(self, *leaves: Tensor) -> Tensor:
        return leaves[1] @ leaves[0]


def sylvester(size: int, like: Tensor) -> Tensor:
    """Hadamard's matrix of a power of two."""
    H = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


class Hadamard(Frozen):
    """Hadamard bases: class products by bmm, the transform as two matrix products.

    Nothing is fused and every intermediate is in the dtype of x, so kernels can only be faster. The
    steps are those of csrc/torch/hadamard.cpp: `expand` if the layer has more outputs than inputs,
    otherwise dW is transposed. Tensors called x have d features, those called y have D.
    """

    def __init__(self, p: Problem) -> None:
        (d, D), r = sorted(p.size), p.rank
        self.expand, self.d, self.D = p.size[0] == d, d, D
        self.n = -(-d // r)
        self.K = r * self.n
        self.N = 1 << (self.K - 1).bit_length()
        low = 1 << (self.N.bit_length() - 1) // 2
        self.low, self.high = sylvester(low, p.W), sylvester(self.N // low, p.W)
        self.mixing = sylvester(1 << (r - 1).bit_length(), p.W)[:r, :r].contiguous()
        self.s, self.row, self.col = p.signs(d), p.signs(D), p.signs(self.K)
        self.x, self.y = (p.x, p.dy) if self.expand else (p.dy, p.x)
        compute, scale = torch.promote_types(p.dtype, torch.float32), 0.5 * (d * self.K) ** -0.5
        lam, gam = p.random(r, self.n), scale * p.random(self.n, d)  # dW is half as large as W
        super().__init__(p, [lam.to(compute), gam.to(compute)])

    def blocks(self) -> Tensor:
        """gamma with the signs of A's columns, class by class: (r, columns of a class, n)."""
        signed = (self.leaves[1] * self.s).to(self.p.dtype)
        return signed.view(self.n, self.p.rank, self.n).permute(1, 2, 0)

    def weights(self) -> Tensor:
        """lambda with the signs of B's columns, (r, 1, n)."""
        signed = self.leaves[0].flatten() * self.col
        return signed.to(self.p.dtype).view(self.p.rank, 1, self.n)

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

    def repeated(self, v: Tensor) -> Tensor:
        """(T, N) at the D rows of B, which repeat."""
        return (
            v[:, : self.D] if self.D <= self.N else v.repeat(1, -(-self.D // self.N))[:, : self.D]
        )

    def folded(self, y: Tensor) -> Tensor:
        """The adjoint of `repeated`."""
        times = -(-self.D // self.N)
        y = F.pad(y, (0, times * self.N - self.D))
        return y if times == 1 else y.view(len(y), times, self.N).sum(1)

    def inner(self, blocks: Tensor) -> Tensor:
        """z, the class products with x."""
        return torch.bmm(self.classes(self.x), blocks)

    def add_up(self, y: Tensor, z: Tensor, weights: Tensor) -> None:
        v = (self.mix(z) * weights).transpose(0, 1).flatten(1)
        y.addcmul_(self.repeated(self.transform(F.pad(v, (0, self.N - self.K)))), self.row)

    def down(self) -> Tensor:
        """u, the transform of y: (r, T, n)."""
        return self.classes(self.transform(self.folded(self.y * self.row))[:, : self.K])

    def add_outer(self, x: Tensor, w: Tensor, blocks: Tensor) -> None:
        self.classes(x).baddbmm_(w, blocks.transpose(1, 2))

    def gradients(self, u: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        lam, gam = self.leaves
        of_lam = (u.to(lam.dtype) * self.mix(z)).sum(1).flatten() * self.col
        P = torch.bmm(w.transpose(1, 2), self.classes(self.x))  # (r, n, columns)
        of_gam = P.permute(1, 0, 2).flatten(1).to(gam.dtype) * self.s
        return of_lam.view_as(lam), of_gam

    def step(self) -> tuple[Tensor, ...]:
        p, blocks, weights = self.p, self.blocks(), self.weights()
        y = F.linear(p.x, p.W)
        if self.expand:
            self.add_up(y, self.inner(blocks), weights)
        else:
            self.add_outer(y, self.mix(self.down() * weights), blocks)
        dx, z, u = p.dy @ p.W, self.inner(blocks), self.down()  # nothing is kept for backward
        w = self.mix(u * weights)
        if self.expand:
            self.add_outer(dx, w, blocks)
        else:
            self.add_up(dx, z, weights)
        return y, dx, *self.gradients(u, z, w)

    def delta(self, *leaves: Tensor) -> Tensor:
        lam, gam = leaves
        A = sylvester(len(self.mixing), gam).repeat_interleave(self.n, 1)[:, : self.d] * self.s
        rows = torch.arange(self.D, device=gam.device) % self.N
        B = self.row[:, None] * sylvester(self.N, gam)[rows, : self.K] * self.col
        dW = B @ (lam[:, :, None] * A[:, None] * gam).flatten(end_dim=1)
        return dW if self.expand else dW.T


def methods(p: Problem) -> dict[str, Frozen]:
    """All methods by name: LoRA of the same r, and of as many parameters as RandLoRA has."""
    d, n = min(p.size), -(-min(p.size) // p.rank)
    equal = round((p.rank * n + n * d) / sum(p.size))
    of_lora = {f"r={p.rank}": p.rank, f"of equal parameters, r={equal}": equal}
    kinds: dict[str, Callable[[Problem, int], Frozen]] = {"LoRA by addmm": AddmmLora}
    if peft:
        kinds["PEFT's LoRA"] = PeftLora
    return {
        "frozen": Frozen(p),
        "Hadamard, plain torch": Hadamard(p),
        **{
            f"{kind} {which}": made(p, rank)
            for kind, made in kinds.items()
            for which, rank in of_lora.items()
        },
    }
