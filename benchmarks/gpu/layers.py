"""One layer in bf16, forward and backward, by every method, over sizes, tokens and densities.

Every path of ours is first compared with the plain expression in float64 on the same card. x needs
a gradient, as inside a model. Columns of a row:

    step_ms      forward and backward on the card, L2 flushed before (median; a CUDA graph where
                 `timing` says so), and over_frozen, its ratio to the frozen layer's
    forward_ms   the same without gradients, as in generation
    eager_ms     forward and backward launched one by one, as a training script does, caches warm
    saved_bytes  kept for backward beyond weights, adapters and bases
    peak_bytes   the most memory a step takes beyond what was there before
"""

import functools

import torch

from randlora_ext import explain
from randlora_ext.reference import linear_reference

from .card import Card, saved_bytes
from .methods import Method, Ours, all_methods, trained
from .stage import SCALING, SIZES, Stage, size_text

TOKENS = [8192, 16, 2048, 512, 1]  # the most telling first: time may end
LIMIT = 3e-2  # relative error of bf16 results, in the 2-norm


def step(layer: torch.nn.Module, leaves: list, x: torch.Tensor, dy: torch.Tensor) -> None:
    for leaf in leaves:
        leaf.grad = None
    layer(x).backward(dy)


def verify(layer: Ours, tokens: int = 24) -> float:
    """The largest relative error of y, dx, dlam, dgam against the plain expression in float64."""
    base, basis = layer.base, layer.basis
    device = base.weight.device
    x = torch.randn(tokens, basis.in_features, device=device).bfloat16().requires_grad_()
    dy = torch.randn(tokens, basis.out_features, device=device).bfloat16()
    got_y = layer(x)
    got = [got_y, *torch.autograd.grad(got_y, [x, layer.lam, layer.gam], dy)]
    A, B = basis.dense(device, torch.float64)
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.lam, layer.gam)]
    y = linear_reference(
        leaves[0], base.weight.double(), base.bias.double(), A, B, *leaves[1:], SCALING
    )
    want = [y, *torch.autograd.grad(y, leaves, dy.double())]
    pairs = ((g.detach().double(), w.detach()) for g, w in zip(got, want, strict=True))
    return max(float((g - w).norm() / w.norm()) for g, w in pairs)


def verify_all(stage: Stage, methods: list[Method], size: tuple[int, int]) -> None:
    for method in methods:
        if not isinstance(method.layer, Ours):
            continue
        what = {"size": size_text(size), "method": method.name, "density": method.density}
        try:
            error = verify(method.layer)
        except Exception as error:  # the table goes on: the row says what is wrong
            stage.failed(f"verification of {what}", error)
            continue
        stage.row(verified=error < LIMIT, error=error, **what)  # a NaN is not below the limit


def measure(
    stage: Stage, card: Card, methods: list[Method], size: tuple[int, int], tokens: int,
    seconds: float,
) -> None:  # fmt: skip
    """Rows of all methods for one size and token count."""
    x = torch.randn(tokens, size[0], device=card.device).bfloat16().requires_grad_()
    dy = torch.randn(tokens, size[1], device=card.device).bfloat16()
    steps, forwards, rows = {}, {}, {}
    for k, method in enumerate(methods):
        leaves = [x, *trained(method.layer)]
        call = functools.partial(step, method.layer, leaves, x, dy)
        forward = torch.no_grad()(functools.partial(method.layer, x))
        row = rows[k] = {"size": size_text(size), "tokens": tokens, "method": method.name,
                         "density": method.density, "timing": "host clock"}  # fmt: skip
        if isinstance(method.layer, Ours):
            row["chosen"] = is_chosen(method, size, tokens, card)
        try:
            call(), call()
            row["saved_bytes"] = saved_bytes(lambda m=method: m.layer(x), method.state)
            row["peak_bytes"] = card.peak_bytes(call)
            row["eager_ms"] = card.wall(call, min(0.06, seconds / 3 / len(methods)))
        except Exception as error:
            stage.failed(f"{row['method']} {row['density']} {row['size']} T={tokens}", error)
            del rows[k]
            continue
        try:
            steps[k], forwards[k] = card.captured(call), card.captured(forward)
            row["timing"] = "host clock" if card.dry else "graph"
        except Exception as error:
            print(f"no graph of {row}: {error!r}", flush=True)
            card.sync()
            steps[k], forwards[k], row["timing"] = call, forward, "eager"
    for column, calls in (("step_ms", steps), ("forward_ms", forwards)):
        for k, ms in card.medians(calls, seconds / 3).items():
            rows[k][column] = ms
    for row in rows.values():
        if 0 in rows:
            row["over_frozen"] = row["step_ms"] / rows[0]["step_ms"]
        stage.row(**row)


def is_chosen(method: Method, size: tuple[int, int], tokens: int, card: Card) -> bool:
    """Whether the cost model would take this method."""
    basis = method.layer.basis
    choice = explain(basis, tokens, torch.bfloat16, "cpu" if card.dry else "cuda")
    same_b = choice.path != "factored" or choice.b_side == method.layer.b_side
    return choice.path == method.layer.path and same_b


def main() -> None:
    stage = Stage(__doc__)
    card = Card(stage.dry)
    sizes = [(48, 48), (72, 40), (40, 72)] if stage.dry else SIZES
    tokens = [20, 1] if stage.dry else TOKENS
    rank = 8 if stage.dry else 32
    methods: dict[tuple[int, int], list[Method]] = {}
    for done, count in enumerate(tokens):
        for at, size in enumerate(sizes):
            what = f"{size_text(size)} T={count}"
            groups_left = (len(tokens) - done) * len(sizes) - at
            if stage.left() < 2:
                stage.skip(what, "out of time")
                continue
            if size not in methods:
                methods[size] = all_methods(size, card.device, stage.failed, rank)
                verify_all(stage, methods[size], size)
            try:
                measure(stage, card, methods[size], size, count, stage.left() / groups_left / 2)
            except Exception as error:
                stage.failed(what, error)
            card.free()


if __name__ == "__main__":
    main()
