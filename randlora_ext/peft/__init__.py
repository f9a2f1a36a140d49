"""RandLoRA of Hugging Face PEFT on the compiled kernels.

::

    import peft, randlora_ext.peft
    randlora_ext.peft.enable()
    model = peft.get_peft_model(model, peft.RandLoraConfig(sparse=True, target_modules=...))

After `enable` every RandLoRA model that PEFT makes or loads computes its layers with
`torch.ops.randlora`, with the numbers of stock PEFT up to rounding, as long as its bases are
ternary (``sparse``, ``very_sparse``, or the ``density`` of `RandLoraConfig`); these are kept
packed, 2 bits an element and less. `accelerate` does the same to a model that exists already.
"""

from ._require import check_peft

check_peft()

from .config import RandLoraConfig  # noqa: E402  (needs the check above)
from .export import export_to_peft  # noqa: E402
from .hotswap import hotswap_adapter  # noqa: E402
from .summary import kernel_summary  # noqa: E402
from .switch import accelerate, disable, enable  # noqa: E402

__all__ = [
    "RandLoraConfig",
    "accelerate",
    "disable",
    "enable",
    "export_to_peft",
    "hotswap_adapter",
    "kernel_summary",
]
