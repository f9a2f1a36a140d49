"""Fine-tuning with torch alone: `apply_randlora`, a loop, lambda and gamma saved, merged weights.

    python examples/plain_pytorch.py --model HuggingFaceTB/SmolLM2-135M --text my.txt
    python examples/plain_pytorch.py --toy

transformers only provides the model here; any `nn.Module` with linear layers will do.
"""

import torch
from causal_lm import TARGETS, load_blocks, load_model, parse, parser

from randlora_ext import apply_randlora, calibrate, load_adapter, merge_and_unload, save_adapter

SCALING = 20


def main() -> None:
    args = parse(parser(__doc__.splitlines()[0]))
    device = torch.device("cuda" if torch.cuda.is_available() and not args.toy else "cpu")
    options = {"r": args.rank, "randlora_alpha": SCALING * args.rank, "basis": "hadamard"}
    model = apply_randlora(load_model(args), TARGETS, **options).to(device).train()
    blocks = load_blocks(args).to(device)
    calibrate(model, blocks[:8].split(2))  # to forget less
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

    save_adapter(model, args.out)
    print(f"{args.out}: {sum(file.stat().st_size for file in args.out.iterdir()):,} bytes")

    model.eval()
    with torch.no_grad():
        want = model(blocks[:1]).logits
        fresh = load_adapter(load_model(args).to(device), args.out).eval()
        difference = (fresh(blocks[:1]).logits - want).abs().max().item()
        print(f"reloaded: largest difference {difference:.1e}")
        merge_and_unload(fresh)
        difference = (fresh(blocks[:1]).logits - want).abs().max().item()
        print(f"merged: largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
