"""DDP, FSDP2, tensor parallelism and their checkpoints on 2 and 4 gloo processes of the CPU.

The checks are in the modules named in distributed_ranks.py; each test here reports one of them.
"""

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from distributed_ranks import checks, run


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The result of each check by number of processes; 4 processes read the checkpoints of 2."""
    folder, done = tmp_path_factory.mktemp("distributed"), {}

    def outcome(world: int) -> dict[str, str]:
        for earlier in (2, 4):
            if earlier <= world and earlier not in done:
                done[earlier] = run(earlier, folder)
        return done[world]

    return outcome


@pytest.mark.parametrize("name", checks(2))
def test_two_processes(outcomes, name):
    verdict = outcomes(2)[name]
    assert verdict == "ok", verdict


@pytest.mark.parametrize("name", checks(4))
def test_four_processes(outcomes, name):
    verdict = outcomes(4)[name]
    assert verdict == "ok", verdict
