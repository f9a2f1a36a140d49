"""DDP, FSDP2, tensor parallelism and their checkpoints on 2 and 4 gloo processes of the CPU.

The checks are in the modules named in distributed_ranks.py. One test runs them all, so that
pytest's workers do not each start the processes.
"""

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from distributed_ranks import run


def test_all_checks(tmp_path):
    results = run(tmp_path)
    failed = {name: verdict for name, verdict in results.items() if verdict != "ok"}
    assert len(results) > 20 and not failed, "\n\n".join(f"{k}: {v}" for k, v in failed.items())
