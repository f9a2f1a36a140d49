"""What torch.compile is told of functions that Dynamo cannot trace."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable)


def constant_while_tracing(function: F) -> F:
    """Dynamo calls the function while it traces, and takes its result for a constant.

    As torch.compiler.assume_constant_result, whose import of torch._dynamo takes 1.5 s.
    """
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function
