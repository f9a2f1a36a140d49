"""Tensor parallelism: styles for torch's `parallelize_module` (docs/distributed.md).

DDP, FSDP2 and distributed checkpoints need nothing from here: lambda and gamma are ordinary
parameters, and bases are neither parameters nor buffers.
"""

from .layer import TensorParallelRandLoraLinear
from .styles import RandLoraColwise, RandLoraRowwise

__all__ = ["RandLoraColwise", "RandLoraRowwise", "TensorParallelRandLoraLinear"]
