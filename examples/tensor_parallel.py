"""Fine-tuning a model that is cut across processes: tensor parallelism with RandLoRA.

    torchrun --nproc-per-node 8 examples/tensor_parallel.py --model MODEL --text my.txt
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --toy

Every rank holds a part of each weight and generates its own part of the bases. The adapter is saved
as one file, which a model in one process, or in any other number of them, opens again.
"""

import os

import torch
import torch.distributed as dist
from causal_lm import TARGETS, load_blocks, load_model, parse, parser
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from randlora_ext import RandLoraLinear, apply_randlora, load_adapter, save_adapter
from randlora_ext.distributed import RandLoraColwise, RandLoraRowwise

STYLES = {name: RandLoraColwise for name in TARGETS} | {
    "o_proj": RandLoraRowwise,
    "down_proj": RandLoraRowwise,
}


def cut(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Attention by heads, the MLP by its inner features: one sum at the end of each."""
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

    options = {"r": args.rank, "randlora_alpha": 20 * args.rank, "basis": "hadamard"}
    model = apply_randlora(load_model(args), TARGETS, **options).to(device).train()
    cut(model, mesh)
    blocks = load_blocks(args).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights, bases = held(model)
    say(f"{world} ranks; each holds {weights:,} bytes of weights and {bases:,} of bases")

    optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=0)
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
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "randlora.safetensors"
    save_adapter(model, file)  # all ranks gather, the first one writes
    if rank == 0:
        print(f"{file}: {file.stat().st_size:,} bytes")
        whole = load_adapter(load_model(args).to(device), file).eval()
        with torch.no_grad():
            difference = (whole(blocks[:1]).logits - want).abs().max().item()
        print(f"in one process: largest difference {difference:.1e}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
