"""What behaves differently while torch.compile or torch.export traces."""

import itertools

import torch

MANY = 2**62  # tokens: more than any call has

_tokens = itertools.count()


def run_while_tracing(function):
    """torch.compiler.assume_constant_result, without its import of torch._dynamo (1.5 s)."""
    function._dynamo_marked_constant = True
    return function


def new_token() -> str:
    """A name for an object in this process: `run_while_tracing` allows only constants."""
    return str(next(_tokens))


def at_least(tokens: int, limit: int, unknown: bool = False) -> bool:
    """tokens >= limit, for a symbolic number too: torch.compile guards on the answer.

    An exported program serves a range of numbers. Where the range leaves the answer open, it is
    `unknown`.
    """
    if limit >= MANY:  # of which a symbolic number cannot be known to fall short
        return False
    if not torch.compiler.is_compiling():
        return tokens >= limit
    from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

    if not torch.compiler.is_exporting():
        return guard_or_false(tokens >= limit)
    if statically_known_true(tokens >= limit):
        return True
    return unknown and not statically_known_true(tokens < limit)
