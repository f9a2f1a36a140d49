"""RandLoRA on a base that bitsandbytes quantized to 4 bits; on the CPU as well.

    python examples/quantized_base.py --model HuggingFaceTB/SmolLM2-135M --text my.txt
    python examples/quantized_base.py --toy

The base keeps its 4 bits and its own layer computes x W; our kernels add the adapter's part.
"""

import tempfile
from contextlib import nullcontext

import bitsandbytes as bnb
import peft
import torch
from causal_lm import TARGETS, load_blocks, parse, parser, toy_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import randlora_ext.peft


def load_quantized(args):
    """The model in NF4. Quantizing happens while files are loaded, so a toy is saved first."""
    with tempfile.TemporaryDirectory() if args.toy else nullcontext(args.model) as source:
        if args.toy:
            toy_model().save_pretrained(source)
        return AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.float32 if args.toy else torch.bfloat16,
            ),
            device_map="cpu" if args.toy or not torch.cuda.is_available() else "auto",
        )


def main() -> None:
    args = parse(parser(__doc__.splitlines()[0]))
    blocks = load_blocks(args)
    base = peft.prepare_model_for_kbit_training(load_quantized(args))

    randlora_ext.peft.enable()
    config = randlora_ext.peft.RandLoraConfig(
        r=args.rank,
        randlora_alpha=20 * args.rank,
        basis="hadamard",
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config).train()
    blocks = blocks.to(model.device)
    few = [{"input_ids": rows, "labels": rows} for rows in blocks[:8].split(2)]
    randlora_ext.calibrate(model, few)  # to forget less
    quantized = sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules())
    print(f"{quantized} layers of 4 bits; {randlora_ext.peft.kernel_summary(model)}")

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=0)
    torch.manual_seed(0)
    for step in range(args.steps):
        batch = blocks[torch.randint(len(blocks), (args.batch_size,), device=blocks.device)]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, args.steps // 10) == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    model.save_pretrained(args.out)
    print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
