"""Fine-tuning with transformers' Trainer and PEFT, on the compiled kernels.

    python examples/finetune_trainer.py --model HuggingFaceTB/SmolLM2-135M --text my.txt
    python examples/finetune_trainer.py --toy

Two lines differ from a script for stock PEFT: `randlora_ext.peft.enable()`, and the callback, which
calibrates the adapter before the first step and keeps what the model forgets within a budget. PEFT
saves the adapter; `basis="hadamard"` keeps the file at lambda and gamma.
"""

import peft
import torch
from causal_lm import TARGETS, difference, load_blocks, load_model, parse, parser
from transformers import Trainer, TrainingArguments

import randlora_ext.peft


def main() -> None:
    args = parse(parser(__doc__.splitlines()[0]))
    base = load_model(args)
    blocks = load_blocks(args)

    randlora_ext.peft.enable()
    config = randlora_ext.peft.RandLoraConfig(
        r=args.rank,
        randlora_alpha=20 * args.rank,  # scaling = alpha / r = 20, PEFT's default ratio
        basis="hadamard",
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out / "checkpoints"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to=[],
            use_cpu=args.toy,
            seed=0,
        ),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
    )
    # In nats per token, on text that the base model writes.
    trainer.add_callback(randlora_ext.ForgettingBudget(trainer, max_rise=0.2))
    trainer.train()
    print(randlora_ext.peft.kernel_summary(model))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    model.save_pretrained(args.out)
    model.eval()
    with torch.no_grad():
        want = model(blocks[:1].to(model.device)).logits
        reloaded = peft.PeftModel.from_pretrained(load_model(args), args.out)
        got = reloaded.to(model.device).eval()(blocks[:1].to(model.device)).logits
    print(f"saved to {args.out}, reloaded: relative difference {difference(got, want):.1e}")


if __name__ == "__main__":
    main()
