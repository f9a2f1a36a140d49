"""What behaves differently while torch.compile or torch.export traces."""

import itertools

_tokens = itertools.count()


def run_while_tracing(function):
    """torch.compiler.assume_constant_result, without its import of torch._dynamo (1.5 s)."""
    function._dynamo_marked_constant = True
    return function


def new_token() -> str:
    """A name for an object in this process: `run_while_tracing` allows only constants."""
    return str(next(_tokens))
