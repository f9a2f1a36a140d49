"""The warning when training of an adapter begins that nobody has calibrated, under PEFT."""

import copy
import warnings

import pytest
import torch
from compile_helpers import fresh_dynamo as fresh_dynamo
from compile_helpers import graphs
from torch import nn

from randlora_ext import calibrate

peft_helpers = pytest.importorskip("peft_helpers")
from peft_helpers import accelerated, config, peft, randomize  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:randlora_alpha")

TOKENS = torch.arange(6)[None]
TARGETS = ["one", "two"]


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 24)
        self.one, self.two = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, tokens):
        return self.two(torch.tanh(self.one(self.embedding(tokens))))


class WithEmbeddings(Words):
    """As transformers' models, which say what reads their inputs."""

    def get_input_embeddings(self):
        return self.embedding


class WithoutTokens(Words):
    """A vision model, which has embeddings for its positions."""

    def get_input_embeddings(self):
        return self.one


def adapted(base=Words, dtype=torch.bfloat16, basis="hadamard", targets=TARGETS):
    """In training mode, with a new adapter."""
    accelerated.enable()
    chosen = config(5, accelerated.RandLoraConfig, targets, basis=basis)
    return peft.get_peft_model(base().to(dtype), chosen).train()


def warnings_of(model, x=TOKENS, steps=3):
    """Of that many steps those about calibration."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(steps):
            y = model(x)
            y = getattr(y, "logits", y)
            if y.requires_grad:
                y.float().square().sum().backward()
    return [warning for warning in seen if "without calibration" in str(warning.message)]


def told(model, x=TOKENS):
    return len(warnings_of(model, x))


@pytest.mark.parametrize("base", [Words, WithEmbeddings])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_once(base, dtype):
    """In 16 bits PEFT casts lambda after the adapter was made, which makes a new parameter."""
    model = adapted(base, dtype)
    (warning,) = warnings_of(model)
    assert str(warning.message).startswith("RandLoRA adapter 'default' is trained without calib")
    assert warning.filename == __file__
    assert told(model) == 0


def test_it_says_how_it_is_silenced():
    (warning,) = warnings_of(adapted())
    silencing = str(warning.message).rpartition("silence this: ")[2]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        exec(silencing, {"warnings": warnings})
        adapted()(TOKENS).float().sum().backward()
    assert not [w for w in seen if "calibration" in str(w.message)]


def test_it_is_blamed_on_the_line_that_calls_a_model_of_transformers():
    language_models = pytest.importorskip("language_models")
    model = adapted(language_models.llama, targets=["q_proj", "down_proj"])
    (warning,) = warnings_of(model)
    assert warning.filename == __file__


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "float": lambda model: model.float(),
    "requires_grad": lambda model: model.requires_grad_(True),
    "copy": copy.deepcopy,
    "new parameters": lambda model: renewed(model),
}


def renewed(model):
    """As PEFT's main branch casts adapters: by assignment."""
    for layer in peft_helpers.layers(model):
        for diagonals in (layer.randlora_lambda, layer.randlora_gamma):
            diagonals["default"] = nn.Parameter(diagonals["default"].detach().clone())
    return model


@pytest.mark.parametrize("way", CASTS)
def test_whatever_becomes_of_the_parameters(way):
    model = CASTS[way](adapted())
    assert told(model) == 1 and told(model) == 0


def test_of_a_copy_and_of_the_original():
    model = adapted()
    copied = copy.deepcopy(model)
    assert told(copied) == 1 and told(model) == 1
    assert told(copy.deepcopy(model)) == 0


def test_not_of_a_calibrated_adapter():
    model = adapted()
    calibrate(model, [TOKENS])
    assert told(model) == 0


def test_not_of_a_trained_adapter():
    assert told(randomize(adapted())) == 0


def test_not_of_one_that_is_loaded_to_train_on(tmp_path):
    randomize(adapted()).save_pretrained(tmp_path)
    base = Words().bfloat16()
    assert told(peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()) == 0


@pytest.mark.parametrize("basis", ["independent", "peft"])
def test_not_of_other_bases(basis):
    assert told(adapted(basis=basis)) == 0


def test_not_of_a_later_adapter_of_that_name_on_other_bases():
    model = adapted()
    model.delete_adapter("default")
    chosen = config(5, accelerated.RandLoraConfig, TARGETS, basis="independent")
    model.add_adapter("default", chosen)
    model.set_adapter("default")
    assert told(model) == 0


def test_not_of_models_without_embeddings():
    model = adapted(lambda: nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24)), targets=["0", "1"])
    assert told(model, torch.ones(2, 24, dtype=torch.bfloat16)) == 0


def test_not_of_models_whose_embeddings_are_not_of_tokens():
    assert told(adapted(WithoutTokens)) == 0


def test_not_before_the_first_step_of_training():
    model = adapted()
    with torch.no_grad():
        assert told(model) == 0
    assert told(model.eval()) == 0
    model.train()
    with model.disable_adapter():
        assert told(model) == 0
    model.base_model.disable_adapter_layers()  # which also takes requires_grad
    assert told(model) == 0
    model.base_model.enable_adapter_layers()
    model.set_adapter("default", inference_mode=True)
    assert told(model) == 0
    model.set_adapter("default")
    assert told(model) == 1


@pytest.fixture
def beside_a_trained_one():
    """With a new adapter "two", which is not active."""
    model = randomize(adapted())
    chosen = config(5, accelerated.RandLoraConfig, TARGETS, basis="hadamard")
    model.add_adapter("two", chosen)
    return model


def test_of_an_adapter_that_is_activated_later(beside_a_trained_one):
    model = beside_a_trained_one
    assert told(model) == 0
    model.set_adapter("two")
    (warning,) = warnings_of(model)
    assert "adapter 'two'" in str(warning.message)


def test_of_an_adapter_in_other_layers(beside_a_trained_one):
    chosen = config(5, accelerated.RandLoraConfig, ["two"], basis="hadamard")
    beside_a_trained_one.add_adapter("three", chosen)
    beside_a_trained_one.set_adapter("three")
    assert told(beside_a_trained_one) == 1


def test_of_experts():
    experts = pytest.importorskip("peft_experts")
    model = experts.moe()
    for layer in peft_helpers.layers(model):
        nn.init.zeros_(layer.randlora_lambda["default"])
    tokens = torch.arange(1, 9)[None]
    assert told(model.train(), tokens) == 1


def test_not_where_there_are_no_numbers():
    model = adapted().to("meta")
    assert told(model, TOKENS.to("meta")) == 0


def test_inside_vmap_it_looks_when_there_are_numbers():
    model = adapted(dtype=torch.float32)
    trained = {
        n: torch.stack([p.detach()] * 2) for n, p in model.named_parameters() if p.requires_grad
    }

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (TOKENS,)).square().mean()

    gradients = torch.func.vmap(torch.func.grad(loss))(trained)
    assert all(gradients[name].shape == trained[name].shape for name in trained)
    assert told(model) == 1


def test_compiled_code_does_not_look(fresh_dynamo):
    model = adapted()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert told(compiled) == 0
    assert graphs() == 1
    assert told(model) == 1  # what is not compiled looks
    assert told(compiled) == 0
    assert graphs() <= 2  # at most once again, because the flag is another
