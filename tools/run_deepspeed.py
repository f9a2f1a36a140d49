"""DeepSpeed ZeRO-3 itself on two CPU processes: trains like one process, merges what it gathers.

    pip install deepspeed && python tools/run_deepspeed.py

Not part of the suite, as DeepSpeed is large and compiles an extension when it first starts.
"""

import os

import pytest
import torch
from torch import nn
from torch.distributed.run import main as launch

WORLD, STEPS = 2, 3
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    # Every parameter is partitioned, the smallest too.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # by default 1.0, which one process would have to use, too
}


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))


def plain(model: nn.Module) -> nn.Module:
    from randlora_ext import apply_randlora

    return apply_randlora(model, ["0", "2"], r=5, randlora_alpha=10, basis="independent")


def in_peft(model: nn.Module) -> nn.Module:
    import peft

    import randlora_ext.peft

    randlora_ext.peft.enable()
    options = {"r": 5, "randlora_alpha": 10, "target_modules": ["0", "2"]}
    return peft.get_peft_model(model, randlora_ext.peft.RandLoraConfig(basis="hadamard", **options))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def compare(adapt, built_partitioned: bool, rank: int) -> None:
    import deepspeed

    batches = torch.randn(STEPS, 8, 24, generator=torch.Generator().manual_seed(1))
    reference = adapt(base())
    for parameter in reference.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    # As transformers does for a large model: its weights are never whole, on any rank.
    with deepspeed.zero.Init(config_dict_or_path=CONFIG, enabled=built_partitioned):
        model = base()
    model = adapt(model)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([ours], 0, enabled=hasattr(ours, "ds_id")):
            ours.data.copy_(theirs.data)
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG, optimizer=adam(model))
    assert all(p.numel() == 0 for p in model.parameters()), "nothing is partitioned"
    optimizer = adam(reference)
    for x in batches:
        optimizer.zero_grad()
        reference(x).square().mean().backward()
        optimizer.step()
        engine.backward(engine(x.chunk(WORLD)[rank]).square().mean())
        engine.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([ours]):
            torch.testing.assert_close(ours.data, theirs.data, rtol=1e-5, atol=1e-6)

    layer = next(m for m in model.modules() if hasattr(m, "randlora_lambda"))
    if adapt is plain:
        with pytest.raises(RuntimeError, match="GatheredParameters"):
            layer.merge()
    want = reference(batches[0])
    for act, merged in (layer.merge, True), (layer.unmerge, False):
        with deepspeed.zero.GatheredParameters(list(layer.parameters()), modifier_rank=0):
            act()
        assert layer.merged == merged
        torch.testing.assert_close(engine(batches[0]), want, rtol=1e-4, atol=1e-4)
    if rank == 0:
        built = "built partitioned (zero.Init)" if built_partitioned else "partitioned afterwards"
        print(f"ok: {adapt.__name__}, {built}", flush=True)


def main() -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if "RANK" not in os.environ:
        launch(["--standalone", "--nproc-per-node", str(WORLD), __file__])
        return
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    for built_partitioned in (False, True):
        for adapt in (plain, in_peft):
            compare(adapt, built_partitioned, int(os.environ["RANK"]))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
