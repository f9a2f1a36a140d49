"""Fine-tuning a model that is cut across processes: tensor parallelism with RandLoRA.

    torchrun --nproc-per-node 8 examples/tensor_parallel.py --model MODEL --text my.txt
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --toy

Every rank holds a part of each weight and generates its own part of the bases. The adapter is saved
as one file, which a model in one process, or in any other number of them, opens again.
"""

import json
import os

import torch
import torch.distributed as dist
from causal_lm import TARGETS, load_blocks, load_model, parse, parser
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from randlora_ext import RandLoraLinear, apply_randlora
from randlora_ext.distributed import RandLoraColwise, RandLoraRowwise

STYLES = {name: RandLoraColwise for name in TARGETS} | {
    "o_proj": RandLoraRowwise,
    "down_proj": RandLoraRowwise,
}


def options_of(args) -> dict:
    return {"r": args.rank, "randlora_alpha": 20 * args.rank, "density": args.density,
            "projection_prng_key": 0}  # fmt: skip


def adapted(args) -> nn.Module:
    return apply_randlora(load_model(args), TARGETS, **options_of(args))


def cut(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Attention by heads, the MLP by its inner features: one sum at the end of either."""
    plan = {
        name: STYLES[name.rpartition(".")[2]]()
        for name, module in model.named_modules()
        if isinstance(module, RandLoraLinear)
    }
    return parallelize_module(model, mesh, plan)


def held(model: nn.Module) -> tuple[int, int]:
    """Bytes of this rank's weights of adapted layers, and of its bases, which layers share."""
    layers = [module for module in model.modules() if isinstance(module, RandLoraLinear)]
    weights = [layer.weight.to_local() for layer in layers]
    device = weights[0].device
    bases = {layer.bases["default"] for layer in layers}
    return sum(w.nbytes for w in weights), sum(basis.packed_bytes(device) for basis in bases)


def main() -> None:
    args = parse(parser(__doc__.splitlines()[0]))
    on_gpus = torch.cuda.is_available() and not args.toy
    device = torch.device("cuda" if on_gpus else "cpu")
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
    rank, world = mesh.get_local_rank(), mesh.size()

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    model = cut(adapted(args).to(device).train(), mesh)
    blocks = load_blocks(args).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights, bases = held(model)
    say(f"{world} ranks; each holds {weights:,} bytes of weights and {bases:,} of bases")

    optimizer = torch.optim.AdamW(trained, args.lr)
    choice = torch.Generator().manual_seed(0)  # all ranks see the same batches
    for step in range(args.steps):
        batch = blocks[torch.randint(len(blocks), (args.batch_size,), generator=choice)]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, args.steps // 10) == 0 or step == args.steps - 1:
            say(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        want = model(blocks[:1]).logits
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)  # all ranks gather, rank 0 keeps
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / "randlora.safetensors"
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        about = {"randlora": json.dumps(options_of(args))}  # what python -m randlora_ext reads
        save_file(state, file, metadata=about)
        print(f"{file}: {file.stat().st_size:,} bytes")
        whole = adapted(args).to(device).eval()
        whole.load_state_dict(load_file(file), strict=False)
        with torch.no_grad():
            difference = (whole(blocks[:1]).logits - want).abs().max().item()
        print(f"in one process: largest difference {difference:.1e}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
