"""Fine-tuning with torch alone: layers replaced in a loop, a state dict to save, merged weights.

    python examples/plain_pytorch.py --model HuggingFaceTB/SmolLM2-135M --text my.txt
    python examples/plain_pytorch.py --toy

transformers only provides the model here; any `nn.Module` with linear layers will do.
"""

import torch
from causal_lm import TARGETS, difference, load_blocks, load_model, parse, parser

from randlora_ext import RandLoraLinear, calibrate


def add_adapters(model: torch.nn.Module, rank: int) -> None:
    """An adapter on every layer whose name ends in one of TARGETS; all else is frozen."""
    model.requires_grad_(False)
    for name, layer in [*model.named_modules()]:
        if name.rpartition(".")[2] in TARGETS:
            model.set_submodule(name, RandLoraLinear(layer, r=rank, basis="hadamard"))


def merge_adapters(model: torch.nn.Module) -> None:
    """Adds each dW to its weight, and puts the plain layers back."""
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, RandLoraLinear):
            layer.merge()
            model.set_submodule(name, layer.base_layer)


def main() -> None:
    args = parse(parser(__doc__.splitlines()[0]))
    device = torch.device("cuda" if torch.cuda.is_available() and not args.toy else "cpu")
    model = load_model(args).to(device).train()
    add_adapters(model, args.rank)
    blocks = load_blocks(args).to(device)
    few = [{"input_ids": rows, "labels": rows} for rows in blocks[:8].split(2)]
    calibrate(model, few)  # to forget less
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in trained):,} parameters are trained")

    optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=0)
    torch.manual_seed(0)
    for step in range(args.steps):
        batch = blocks[torch.randint(len(blocks), (args.batch_size,), device=device)]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, args.steps // 10) == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "adapter.pt"
    adapter = {name: t for name, t in model.state_dict().items() if ".randlora_" in name}
    torch.save(adapter, file)
    print(f"{file}: {file.stat().st_size:,} bytes")

    fresh = load_model(args).to(device)
    add_adapters(fresh, args.rank)
    fresh.load_state_dict(torch.load(file), strict=False)  # the base model's tensors are not there
    with torch.no_grad():
        want = model.eval()(blocks[:1]).logits
        got = fresh.eval()(blocks[:1]).logits
        print(f"reloaded: relative difference {difference(got, want):.1e}")
        merge_adapters(fresh)
        got = fresh(blocks[:1]).logits
        print(f"merged: relative difference {difference(got, want):.1e}")


if __name__ == "__main__":
    main()
