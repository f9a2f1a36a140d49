"""What experts multiply with an adapted parameter, seen from outside of the model's code."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .experts import AdaptedParameter


class _Product(NamedTuple):
    """How a function of torch names the arguments of a product: x, and at the next position the
    matrix. `ends`, at the one after that, says where the rows of each expert end."""

    x: str
    matrix: str
    position: int = 0  # of x
    ends: str | None = None


_LINEAR = "linear"  # by a matrix (out, in), the others by (in, out)
_PRODUCTS = {  # by the names of functions and of Tensor's methods
    _LINEAR: _Product("input", "weight"),
    "matmul": _Product("input", "other"),
    "mm": _Product("input", "mat2"),
    "bmm": _Product("input", "mat2"),
    "addmm": _Product("mat1", "mat2", position=1),
    "baddbmm": _Product("batch1", "batch2", position=1),
    "grouped_mm": _Product("mat_a", "mat_b", ends="offs"),
    "_grouped_mm": _Product("input", "mat2", ends="offs"),
    "grouped_mm_fallback": _Product("input", "weight", ends="offs"),  # of transformers
}


class ExpertProducts(TorchFunctionMode):
    """Reports the products of experts with adapted parameters while it is active.

    Args:
        layers: of the parameters. Each computes the base model's product meanwhile
            (``takes_base_weight``).
        report: is called as ``report(layer, x, seen, expert)`` for every product whose matrix lies
            in the memory of a layer's parameter: the expert's tokens x (tokens, in_features) and
            what is seen of their outputs (tokens, out_features), themselves or their gradients.
        watched: if given, gradients are seen, during backward: ``watched(y, keep)`` returns what
            the model goes on with, and has ``keep`` called with the gradient.
    """

    def __init__(
        self,
        layers: Sequence[AdaptedParameter],
        report: Callable[[AdaptedParameter, Tensor, Tensor, int], None],
        watched: Callable[[Tensor, Callable[[Tensor], None]], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.report = report
        self.watched = watched

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        product = _PRODUCTS.get(name)
        if product is None:
            return y

        def argument(position: int, keyword: str) -> Any:
            return args[position] if position < len(args) else kwargs.get(keyword)

        x = argument(product.position, product.x)
        matrix = argument(product.position + 1, product.matrix)
        ends = product.ends and argument(product.position + 2, product.ends)
        for layer in self.layers:
            if _lies_in(matrix, layer._base_weight()):
                stack = matrix.mT if name == _LINEAR else matrix
                report = partial(self._report_stack, layer, x.detach(), stack, ends)
                if self.watched is None:
                    report(y)
                else:
                    y = self.watched(y, report)
        return y

    def _report_stack(
        self, layer: AdaptedParameter, x: Tensor, matrix: Tensor, ends: Tensor | None, y: Tensor
    ) -> None:
        """The product y of x (..., in) and a matrix (in, out), or a stack of these; `ends` says
        where the rows of each expert end, if x has them one after the other."""
        if x.dim() < 2:
            # matmul takes vectors, too.
            x = x.unsqueeze(-2)
            y = y.unsqueeze(-2)
        if matrix.dim() != 3:
            self._report_one(layer, x, matrix, y)
            return
        xs: Sequence[Tensor] = [x] * len(matrix)
        ys: Sequence[Tensor]
        if ends is not None:
            cuts = ends.cpu().long()
            xs, ys = x.tensor_split(cuts), y.tensor_split(cuts)
        else:
            ys = y.unbind(-3)
            if x.dim() >= 3 and x.shape[-3] == len(matrix):
                xs = x.unbind(-3)
        for x_of_one, matrix_of_one, y_of_one in zip(xs, matrix, ys, strict=False):
            self._report_one(layer, x_of_one, matrix_of_one, y_of_one)

    def _report_one(self, layer: AdaptedParameter, x: Tensor, matrix: Tensor, y: Tensor) -> None:
        """Reports a product whose matrix is that of an expert, or some of its columns; passes over
        others."""
        W, (experts,) = layer._base_weight(), layer.experts
        along_inputs = W.stride(-2 if layer.transposed else -1)
        offset = matrix.data_ptr() - W.data_ptr()
        bytes_of_one = W.nbytes // experts
        if matrix.shape[:-1] != (layer.in_features,) or matrix.stride(0) != along_inputs:
            return
        if offset < W.nbytes:
            x, y = x.reshape(-1, layer.in_features), y.reshape(-1, y.shape[-1])
            # Llama 4 gives every expert all tokens, zero where they belong to another.
            kept = (x != 0).any(1)
            self.report(layer, x[kept], y[kept], offset // bytes_of_one)


def _lies_in(part: Tensor, whole: Tensor) -> bool:
    try:
        return 0 <= part.data_ptr() - whole.data_ptr() < whole.nbytes
    except RuntimeError:  # of vmap, or sparse
        return False
