"""One of two processes of test_peft_memory.py: trains with accelerate, writes what it saw."""

import json
import os
import sys
from pathlib import Path

import peft
import torch
from accelerate import Accelerator
from torch import nn

import randlora_ext.peft

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from peft_helpers import randomize  # noqa: E402  (needs the line above)

SIZES, R = (40, 56), 8


def make():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(*SIZES), nn.Tanh(), nn.Linear(*reversed(SIZES)))
    config = peft.RandLoraConfig(r=R, target_modules=["0", "2"], sparse=True, randlora_alpha=8)
    return randomize(peft.get_peft_model(base, config))


def data(steps=3, rows=8):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(rows, SIZES[0], generator=generator) for _ in range(steps)]


def train(model, optimizer, batches, backward):
    losses = []
    for x in batches:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.set_num_threads(1)
    randlora_ext.peft.enable()
    sent = []  # numbers of elements of every tensor that DistributedDataParallel sends
    broadcast = torch.distributed._broadcast_coalesced

    def spy(group, tensors, *args, **kwargs):
        sent.extend(tensor.numel() for tensor in tensors)
        return broadcast(group, tensors, *args, **kwargs)

    torch.distributed._broadcast_coalesced = spy
    accelerator = Accelerator(cpu=True)
    model = make()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = [x.chunk(world)[rank] for x in data()]
    train(model, optimizer, mine, accelerator.backward)
    plain = accelerator.unwrap_model(model)
    result = {
        "wrapped": type(model).__name__,
        "sent": sent,
        "own": [p.numel() for p in plain.parameters()],
        "parameters": {n: p.tolist() for n, p in plain.named_parameters() if p.requires_grad},
    }
    Path(sys.argv[1]).write_text(json.dumps(result))
    accelerator.wait_for_everyone()
    os._exit(0)  # taking the gloo group down at exit hangs now and then


if __name__ == "__main__":
    main()
