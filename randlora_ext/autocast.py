"""torch.autocast of `linear`, where the dispatcher looks for it: as torch has it of F.linear.

torch.library.register_autocast would cast lambda and gamma as well, and always to one dtype.
"""

import torch

_library = torch.library.Library("randlora", "IMPL")  # registrations live as long as this

# What an autograd.Function of ours keeps out, of its operator and of all inside.
_keys = torch._C.DispatchKey
BELOW = torch._C.DispatchKeySet(_keys.AutogradFunctionality)
for _key in (
    _keys.AutogradOther,
    _keys.AutogradNestedTensor,
    _keys.AutocastCPU,
    _keys.AutocastCUDA,
):
    BELOW = BELOW.add(_key)


def is_on(device_type: str) -> bool:
    """torch.is_autocast_enabled, and False for "meta", which it does not know."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def cast(device_type: str, values: tuple) -> tuple:
    """Floating tensors in autocast's dtype; all else, and float64, as it is."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        v.to(dtype)
        if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dtype is not torch.float64
        else v
        for v in values
    )


def _register(device_type: str, key: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    forward, backward = (
        torch.ops.randlora.linear.default,
        torch.ops.randlora.linear_backward.default,
    )

    def linear(x, weight, bias, lam, gam, packed, *rest):
        x, weight, bias = cast(device_type, (x, weight, bias))
        packed = cast(device_type, packed)  # a dense B is a factor of x
        # Inside an operator torch's own must not cast: its kernels read what has x's dtype.
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return forward(x, weight, bias, lam, gam, packed, *rest)

    def linear_backward(*inputs):  # in the dtypes of the forward, whenever it runs
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return backward(*inputs)

    _library.impl("linear", linear, key)
    _library.impl("linear_backward", linear_backward, key)


_register("cpu", "AutocastCPU")
_register("cuda", "AutocastCUDA")
