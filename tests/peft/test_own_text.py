"""`own_text`: that the base model writes it, from its own distribution and nothing else."""

import numpy as np
import peft
import pytest
import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from randlora_ext.own_text import own_text

TOKENS = 11


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def distribution(model, *tokens: int) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens])).logits[0, -1].double().softmax(-1)


def test_tokens_are_drawn_from_the_full_distribution(model):
    model.generation_config.update(do_sample=True, temperature=0.1, repetition_penalty=5.0)
    count = 4000
    rows = [batch["input_ids"][0] for batch in own_text(model, rows=count, tokens=2)]
    assert all(row[0] == 1 for row in rows)
    first = torch.bincount(torch.stack([row[1] for row in rows]), minlength=TOKENS)
    wanted = distribution(model, 1)
    common = int(wanted.argmax())
    seconds = torch.stack([row[2] for row in rows if row[1] == common])
    for counts, expected in (
        (first, wanted),
        (torch.bincount(seconds, minlength=TOKENS), distribution(model, 1, common)),
    ):
        total = counts.sum()
        spread = (expected * (1 - expected) * total).sqrt()
        assert ((counts - expected * total).abs() < 4.5 * spread + 1).all()


def test_a_row_ends_with_the_token_that_ends_a_text(model):
    lengths = set()
    for batch in own_text(model, rows=200, tokens=5):
        row = batch["input_ids"][0].tolist()
        lengths.add(len(row))
        assert 2 not in row[1:-1] and (row[-1] == 2 or len(row) == 6)
    assert len(lengths) > 1


def test_answers_are_those_to_each_prompt_alone(model):
    """Beside a longer prompt as without one: the model does not see the padding."""
    prompts = [np.array([3, 4]), torch.tensor([5, 6, 7, 8, 9])]
    count = 2000
    batches = own_text(model, tokens=1, prompts=prompts * count)
    for prompt, own in zip(([3, 4], [5, 6, 7, 8, 9]), (batches[::2], batches[1::2]), strict=True):
        assert all(b["input_ids"][0, :-1].tolist() == prompt for b in own)
        assert all(b["labels"][0, :-1].eq(-100).all() for b in own)
        counts = torch.bincount(torch.cat([b["labels"][0, -1:] for b in own]), minlength=TOKENS)
        expected = distribution(model, *prompt)
        spread = (expected * (1 - expected) * count).sqrt()
        assert ((counts - expected * count).abs() < 4.5 * spread + 1).all()


def test_the_base_of_a_peft_model_writes(model):
    alone = own_text(model)
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config).train()
    frozen = next(p for name, p in tuned.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    modes = [module.training for module in tuned.modules()]
    trains = [p.requires_grad for p in tuned.parameters()]
    texts = [[b["input_ids"].tolist() for b in batches] for batches in (alone, own_text(tuned))]
    assert texts[0] == texts[1]
    assert [module.training for module in tuned.modules()] == modes
    assert [p.requires_grad for p in tuned.parameters()] == trains


def test_random_states_and_the_generation_config_stay(model):
    state, config = torch.get_rng_state(), model.generation_config
    first, again, other = (own_text(model, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state) and model.generation_config is config
    ids = [[batch["input_ids"].tolist() for batch in text] for text in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]


def test_a_generation_config_of_the_peft_model_does_not_act(model):
    """PEFT's generate copies it into the base."""
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    alone, own = own_text(tuned), model.generation_config
    config = GenerationConfig(bos_token_id=1, eos_token_id=2, repetition_penalty=5.0, num_beams=2)
    tuned.generation_config = config
    for batch, other in zip(alone, own_text(tuned), strict=True):
        assert torch.equal(batch["input_ids"], other["input_ids"])
    assert tuned.generation_config is config and model.generation_config is own


def test_a_row_has_no_more_tokens_than_the_model_has_positions():
    torch.manual_seed(0)
    config = GPT2Config(
        n_positions=6, n_embd=16, n_layer=1, n_head=2, vocab_size=40, bos_token_id=1, eos_token_id=2
    )
    model = GPT2LMHeadModel(config)
    assert max(batch["input_ids"].shape[1] for batch in own_text(model)) == 6
    text = own_text(model, prompts=[[5, 6, 7]] * 8)
    assert max(batch["input_ids"].shape[1] for batch in text) == 6
    with pytest.raises(
        ValueError, match="room for an answer in the model's 6 positions, got one of 6"
    ):
        own_text(model, prompts=[[3], [5] * 6])


def test_a_long_prompt_that_shortens_other_answers_is_warned_of():
    torch.manual_seed(0)
    config = GPT2Config(
        n_positions=6, n_embd=16, n_layer=1, n_head=2, vocab_size=40, eos_token_id=None
    )
    model = GPT2LMHeadModel(config)
    told = "at most 2 tokens, not 5, since the longest prompt takes 4 of the model's 6 positions"
    with pytest.warns(UserWarning, match=told):
        text = own_text(model, tokens=5, prompts=[[3], [5] * 4])
    assert [batch["input_ids"].shape[1] for batch in text] == [3, 6]


def test_a_model_without_a_first_token_needs_prompts(model):
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = None
    with pytest.raises(ValueError, match="neither bos_token_id nor eos_token_id"):
        own_text(model)
    assert own_text(model, tokens=3, prompts=[[4]])[0]["input_ids"].shape == (1, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows": 0}, ValueError, "must be positive, got 0"),
        ({"tokens": 0}, ValueError, "must be positive"),
        ({"prompts": []}, ValueError, "at least one token"),
        ({"prompts": [[1], []]}, ValueError, "at least one token"),
        ({"prompts": "hello"}, TypeError, "'hello'"),
        ({"prompts": ["hello"]}, TypeError, "'hello'"),
        ({"prompts": [[True]]}, TypeError, "got one with .True"),
        ({"prompts": [[-1]]}, ValueError, "must hold tokens in .*, got -1"),
        ({"seed": -1}, ValueError, "seed must be a Python integer in"),
        ({"prompts": torch.tensor([[0, 3], [4, 5]])}, TypeError, "without padding"),
        ({"prompts": np.array([[0, 3], [4, 5]])}, TypeError, "without padding"),
    ],
)
def test_arguments_that_are_refused(model, arguments, error, message):
    with pytest.raises(error, match=message):
        own_text(model, **arguments)


def test_a_first_token_outside_of_the_vocabulary_begins_no_text(model):
    """Small models keep the tokens of a larger one's configuration."""
    model.generation_config.bos_token_id = model.config.bos_token_id = 50256
    assert all(batch["input_ids"][0, 0] == 2 for batch in own_text(model, rows=3))
    model.generation_config.eos_token_id = model.config.eos_token_id = 50256
    with pytest.raises(ValueError, match="eos_token_id in its vocabulary; give prompts"):
        own_text(model)


def test_models_that_cannot_write_are_named():
    with pytest.raises(TypeError, match="got Linear"):
        own_text(torch.nn.Linear(2, 2))
