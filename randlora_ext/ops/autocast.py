"""torch.autocast for `linear`, as torch has it for F.linear.

torch.library.register_autocast would cast lambda and gamma as well, and always to one dtype.
"""

import torch

# torch has no public way to register a kernel for autocast that casts some arguments only.
KEYS = {
    "cpu": torch._C.DispatchKey.AutocastCPU,
    "cuda": torch._C.DispatchKey.AutocastCUDA,
}
# Of every device; `functional.linear` casts for those that have no key of ours.
ALL_KEYS = [name for name in torch._C.DispatchKey.__members__ if name.startswith("Autocast")]
_library = torch.library.Library("randlora", "IMPL")  # registrations live as long as this


def is_on(device_type: str) -> bool:
    """torch.is_autocast_enabled, but False for "meta", for which that raises."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def cast(device_type: str, values: tuple) -> tuple:
    """Casts floating tensors other than float64 to autocast's dtype; leaves all else as it is."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        v.to(dtype)
        if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dtype is not torch.float64
        else v
        for v in values
    )


def _register(name: str, device_type: str, key: torch._C.DispatchKey) -> None:
    here = torch._C.DispatchKeySet(key)
    forward = getattr(torch.ops.randlora, name).default
    backward = getattr(torch.ops.randlora, f"{name}_backward").default

    def linear(x, weight, bias, lam, gam, *bases):
        x, weight, bias, *bases = cast(device_type, (x, weight, bias, *bases))  # a dense B, too
        with torch._C._ExcludeDispatchKeyGuard(here):
            return forward(x, weight, bias, lam, gam, *bases)

    def linear_backward(*inputs):  # keeps the dtypes of the forward, under autocast or not
        with torch._C._ExcludeDispatchKeyGuard(here):
            return backward(*inputs)

    _library.impl(name, linear, key.name)
    _library.impl(f"{name}_backward", linear_backward, key.name)


def register(name: str) -> None:
    for device_type, key in KEYS.items():
        _register(name, device_type, key)
