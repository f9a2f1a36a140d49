"""DeepSpeed ZeRO-3 itself on two CPU processes: trains like one process, merges what it gathers.

    pip install deepspeed && python tools/run_deepspeed.py

Not part of the suite, as DeepSpeed is large and compiles an extension when it first starts.
"""

import os

import torch
from torch import Tensor, nn
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
    config = randlora_ext.peft.RandLoraConfig(
        r=5, randlora_alpha=10, basis="hadamard", target_modules=["0", "2"]
    )
    return peft.get_peft_model(model, config)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(trained(model), lr=1e-2)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 24, generator=generator) for _ in range(STEPS)]


def compare(title: str, adapt, build_partitioned: bool, rank: int) -> None:
    import deepspeed

    reference = adapt(base())
    torch.manual_seed(2)
    values = [torch.randn_like(p) * 0.3 for p in trained(reference)]
    weights = [p.detach().clone() for p in reference.parameters() if not p.requires_grad]
    for parameter, value in zip(trained(reference), values, strict=True):
        parameter.data.copy_(value)
    optimizer = adam(reference)
    for x in batches():
        optimizer.zero_grad()
        reference(x).square().mean().backward()
        optimizer.step()

    # As transformers does for a large model: its weights are never whole, on any rank.
    with deepspeed.zero.Init(config_dict_or_path=CONFIG, enabled=build_partitioned):
        model = base()
    model = adapt(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    with deepspeed.zero.GatheredParameters(frozen, modifier_rank=0, enabled=build_partitioned):
        for parameter, value in zip(frozen, weights, strict=True):
            parameter.data.copy_(value)
    for parameter, value in zip(trained(model), values, strict=True):
        parameter.data.copy_(value)
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG, optimizer=adam(model))
    assert all(p.numel() == 0 for p in model.parameters()), "nothing is partitioned"
    for x in batches():
        engine.backward(engine(x.chunk(WORLD)[rank]).square().mean())
        engine.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([ours]):
            torch.testing.assert_close(ours.data, theirs.data, rtol=1e-5, atol=1e-6)

    layer = next(m for m in model.modules() if hasattr(m, "randlora_lambda"))
    want = reference(batches()[0])
    if adapt is plain:
        try:
            layer.merge()
        except RuntimeError as error:
            assert "GatheredParameters" in str(error)
        else:
            raise AssertionError("merged into a weight that is not here")
    with deepspeed.zero.GatheredParameters(list(layer.parameters()), modifier_rank=0):
        layer.merge()
    assert layer.merged
    torch.testing.assert_close(engine(batches()[0]), want, rtol=1e-4, atol=1e-4)
    with deepspeed.zero.GatheredParameters(list(layer.parameters()), modifier_rank=0):
        layer.unmerge()
    torch.testing.assert_close(engine(batches()[0]), want, rtol=1e-4, atol=1e-4)
    if rank == 0:
        print(f"ok: {title}", flush=True)


def main() -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if "RANK" not in os.environ:
        launch(["--standalone", "--nproc-per-node", str(WORLD), __file__])
        return
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    for partitioned in (False, True):
        built = "built partitioned (zero.Init)" if partitioned else "partitioned afterwards"
        compare(f"RandLoraLinear, {built}", plain, partitioned, int(os.environ["RANK"]))
        compare(f"PEFT on our kernels, {built}", in_peft, partitioned, int(os.environ["RANK"]))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
