"""randlora_ext.peft in transformers models with random weights, and in its Trainer."""

import copy

import peft
import pytest
import torch
from cli_helpers import llama as tiny_llama
from peft_helpers import (
    accelerated,
    adapted,
    config,
    layers,
    opened,
    pair,
    randomize,
    relative,
    runs_on_kernels,
    t5,
)
from torch import nn

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*(checkpointing|use_reentrant|pin_memory)")
VOCAB = 50


# Dropout is drawn in other amounts by fused and unfused code, so there is none.
def gpt2():
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 32}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **drops, **ends))
    return model, {"targets": ["c_attn", "c_fc"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}


def llama():
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    return tiny_llama(vocab_size=VOCAB).train(), {"targets": targets, "task_type": "CAUSAL_LM"}


def batch():
    tokens = torch.randint(1, VOCAB, (3, 10), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


def models(make, seed=0):
    torch.manual_seed(seed)
    base, chosen = make()
    return pair(base, lambda: config(8, sparse=True, **chosen), seed)


def loss_and_gradients(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return output.loss, output.logits, gradients


@pytest.mark.parametrize("make", [gpt2, llama, t5])
def test_forward_gradients_and_merging_are_those_of_stock(make):
    stock, ours = models(make)
    assert runs_on_kernels(ours)
    inputs = batch()
    (loss, logits, gradients), (loss0, logits0, gradients0) = (
        loss_and_gradients(model, inputs) for model in (ours, stock)
    )
    assert abs(loss - loss0) < 1e-5
    torch.testing.assert_close(logits, logits0, rtol=1e-4, atol=1e-5)
    assert gradients and gradients.keys() == gradients0.keys()
    for name, gradient in gradients.items():
        assert relative(gradient, gradients0[name]) < 1e-4, name

    merged = [dict(m.eval().merge_and_unload().named_parameters()) for m in (ours, stock)]
    assert merged[0].keys() == merged[1].keys()
    assert all(relative(merged[0][name], merged[1][name]) < 1e-5 for name in merged[1])


@pytest.mark.parametrize("make, reentrant", [(gpt2, True), (llama, False), (t5, False)])
def test_gradient_checkpointing(make, reentrant):
    _, model = models(make)
    model.train()
    wanted_loss, _, wanted = loss_and_gradients(model, batch())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    layers(model)[0].register_forward_hook(lambda *_: calls.append(1))
    loss, _, gradients = loss_and_gradients(model, batch())
    assert len(calls) >= 2  # computed again for backward
    assert relative(loss, wanted_loss) < 1e-6
    assert gradients.keys() == wanted.keys()
    assert all(relative(gradients[name], wanted[name]) < 1e-5 for name in wanted)


def test_trainer(tmp_path):
    examples = [{"input_ids": row, "labels": row} for row in batch()["input_ids"]] * 2
    losses, resumed = [], []
    for i, model in enumerate(models(llama)):
        model.enable_input_require_grads()  # transformers 4 checkpoints reentrantly
        folder = tmp_path / str(i)
        steps = {"max_steps": 3, "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-2}
        about = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 1}
        batches = {"per_device_train_batch_size": 2, "gradient_checkpointing": True}
        arguments = transformers.TrainingArguments(str(folder), **steps, **about, **batches)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=examples)
        # ours also from the checkpoint of stock: adapter, optimizer and scheduler
        for found, start in ((losses, None), (resumed, str(tmp_path / "0" / "checkpoint-2"))):
            trainer.train(resume_from_checkpoint=start)
            found.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert resumed[1][-1] == pytest.approx(resumed[0][-1], rel=1e-4)
    # a checkpoint is an adapter
    assert runs_on_kernels(opened(folder / "checkpoint-2", lambda: llama()[0]))


def test_multihead_attention():
    """torch reads the weights of its projections, fused or not, and never calls them."""
    base = nn.ModuleDict({"attn": nn.MultiheadAttention(32, 4)})
    for fused in ("attn", "in_proj", "in_proj_weight"):
        message = r"matches no linear layer of ModuleDict; .* called \['attn.out_proj'\]"
        with pytest.raises(ValueError, match=message):
            adapted(base, [fused], sparse=True)
    x = torch.randn(2, 5, 32)
    before = base["attn"](x, x, x)[0]
    message = "module 'attn.out_proj' would not be adapted: nn.MultiheadAttention reads"
    with pytest.warns(UserWarning, match=message):
        adapted(base, ["out_proj"], sparse=True)
    after = base["attn"](x, x, x)[0]
    assert torch.equal(after, before) and not after.requires_grad


def test_zamba2_whose_attention_layers_share_a_weight():
    sizes = dict(hidden_size=32, intermediate_size=48, vocab_size=64, num_attention_heads=4)
    mamba = dict(mamba_d_state=8, n_mamba_heads=4, mamba_headdim=16, mamba_ngroups=1, chunk_size=8)
    settings = transformers.Zamba2Config(
        layers_block_type=["mamba", "hybrid"] * 2, num_hidden_layers=4, num_mem_blocks=1,
        **sizes, **mamba,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(settings).eval()
    x = torch.arange(8)[None]
    untuned = base(x).logits
    accelerated.enable()
    chosen = accelerated.RandLoraConfig(
        r=4, randlora_alpha=4, basis="hadamard", target_modules=["in_proj", "q_proj"]
    )
    model = randomize(peft.get_peft_model(base, chosen)).eval()
    want, before = model(x).logits, copy.deepcopy(model.state_dict())
    q_proj = r"layer 'model.layers.{}.shared_transformer.self_attn.q_proj'"
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match=f"{q_proj.format(1)} and {q_proj.format(3)} share"):
            merge()
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x).logits, untuned)
    assert torch.equal(model(x).logits, want) and not torch.allclose(want, untuned, rtol=1e-3)
