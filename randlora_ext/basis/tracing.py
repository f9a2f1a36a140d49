"""Functions that run while torch.compile traces, and tokens for the objects they need."""

import itertools
import weakref
from typing import Any

_tokens = itertools.count()
_by_token: "weakref.WeakValueDictionary[str, Any]" = weakref.WeakValueDictionary()


def run_while_tracing(function):
    """torch.compiler.assume_constant_result, without its import of torch._dynamo (1.5 s)."""
    function._dynamo_marked_constant = True
    return function


def new_token(thing: Any) -> str:
    """A name for an object in this process: `run_while_tracing` allows only constants."""
    token = str(next(_tokens))
    _by_token[token] = thing
    return token


def living(token: str) -> Any:
    """The object of that token, while it lives."""
    return _by_token[token]
