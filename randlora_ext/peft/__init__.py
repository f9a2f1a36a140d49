"""RandLoRA of Hugging Face PEFT on the compiled kernels.

::

    import peft, randlora_ext.peft
    randlora_ext.peft.enable()
    model = peft.get_peft_model(model, peft.RandLoraConfig(sparse=True, target_modules=...))

After `enable`, every RandLoRA model that PEFT makes or loads computes its layers with
`torch.ops.randlora`. If its bases are ternary (``sparse``, ``very_sparse``, or a ``density`` of
`RandLoraConfig`), they are kept packed in 2 bits an element or less, and the numbers are those of
stock PEFT up to rounding. `accelerate` does the same to a model that exists already.
"""

from .version_check import check_version

check_version()

from .activation import accelerate, disable, enable  # noqa: E402  (after the check)
from .config import RandLoraConfig  # noqa: E402
from .loading import hotswap_adapter  # noqa: E402
from .lora import export_to_lora  # noqa: E402
from .saving import export_to_peft  # noqa: E402
from .summary import kernel_summary  # noqa: E402

__all__ = [
    "RandLoraConfig",
    "accelerate",
    "disable",
    "enable",
    "export_to_lora",
    "export_to_peft",
    "hotswap_adapter",
    "kernel_summary",
]
