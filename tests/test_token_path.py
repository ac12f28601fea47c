"""Which way a model's tokens are scored, and that all ways give the same numbers and gradients."""

from types import SimpleNamespace

import peft
import pytest
import torch
from families import FAMILIES, tiny
from rollouts import recorded_rollout
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mossrlhf import ToyWorld
from mossrlhf.kernels import chunked_head as head_module
from mossrlhf.models import (
    IGNORED_LABEL,
    ActorCritic,
    announce,
    language_model_loss,
    packing,
    policy_loss,
    policy_stats,
    token_path,
    whole_logits,
)
from mossrlhf.models.token_path import hidden_states
from mossrlhf.roles import checkpoint_activations
from mossrlhf.types import LossOutput

WORLD = ToyWorld(lang="en", seed=0)

# peft 0.21 asks transformers 5.23 for a property that has another name now.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def batch():
    return recorded_rollout(WORLD)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Chunks of sixteen tokens, so that a batch is several of them, the last one short."""
    monkeypatch.setattr(head_module, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(head_module, "MIN_CHUNK_ROWS", 16)


@pytest.fixture(autouse=True)
def same_states(monkeypatch):
    """Both ways from the same hidden states; those read end to end are `test_packing`'s."""
    monkeypatch.setattr(packing, "packs", lambda backbone: False)


def weights(count):
    return torch.linspace(-1, 1, count)


def loss_of(stats, rows, total):
    """A sum over tokens that asks for everything there is."""
    given = weights(total)[rows].to(stats.logprob)
    return LossOutput((given * stats.logprob + stats.entropy**2 * given.abs()).sum())


def learned(model, batch, score):
    """A loss and all gradients of a model's parameters."""
    model.zero_grad()
    loss = score(model, batch)
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return loss.detach(), torch.cat([g.flatten() for g in found]).double()


def four_units(model, batch):
    stats = policy_stats(model, batch, 0.7, entropy=True)
    return loss_of(stats, slice(None), len(stats.logprob)).loss


def three_units(model, batch):
    total = int(batch.mask.sum())
    return policy_loss(model, batch, lambda s, r: loss_of(s, r, total), 0.7, entropy=True).loss


def by_logits(model, batch):
    with whole_logits():
        return four_units(model, batch)


def require_equal(model, batch, bound=3e-6):
    """Hold both ways by hidden states to the one by whole logits; gradients in relative L2."""
    loss, gradient = learned(model, batch, by_logits)
    assert gradient.norm() > 1e-3
    for way in (four_units, three_units):
        ours, theirs = learned(model, batch, way)
        torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
        assert (theirs - gradient).norm() <= bound * gradient.norm(), way.__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_by_hidden_states(family, batch):
    model = tiny(family, WORLD.tokenizer())
    path = token_path(model)
    assert path.by_hidden, path.reason
    assert "by its weight" in path.reason
    require_equal(model, batch)


def test_caps_and_factors_are_found():
    capped = tiny("gemma2", WORLD.tokenizer(), final_logit_softcapping=5.0)
    assert token_path(capped).softcap == 5.0
    assert token_path(tiny("granite", WORLD.tokenizer())).scale == 0.5


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_get_both_gradients(tied, batch):
    model = tiny("llama", WORLD.tokenizer(), tie_word_embeddings=tied).double()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    require_equal(model, batch, 1e-12)


def test_recomputed_activations(batch):
    model = tiny("llama", WORLD.tokenizer()).double().train()
    checkpoint_activations(model)
    require_equal(model, batch, 1e-12)


def with_bias(head):
    biased = nn.Linear(head.in_features, head.out_features, dtype=head.weight.dtype)
    nn.init.normal_(biased.bias)
    return biased


def test_a_head_with_a_bias(batch):
    model = tiny("llama", WORLD.tokenizer()).double()
    model.set_output_embeddings(with_bias(model.lm_head))
    assert token_path(model).by_hidden
    require_equal(model, batch, 1e-12)


@pytest.mark.parametrize(
    ("options", "how"),
    [
        (dict(target_modules=["q_proj"]), "by its weight"),
        (dict(target_modules=["q_proj", "lm_head"]), "as a module"),
        (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), "as a module"),
    ],
    ids=["around", "on the head", "beside a trained head"],
)
def test_adapters(options, how, batch):
    model = peft.get_peft_model(
        tiny("llama", WORLD.tokenizer()).double(),
        peft.LoraConfig(r=2, init_lora_weights=False, **options),
    )
    assert how in token_path(model).reason
    require_equal(model, batch, 1e-12)
    with model.disable_adapter():
        require_equal_scores(model, batch)


def require_equal_scores(model, batch):
    with torch.no_grad():
        ours = policy_stats(model, batch)
        with whole_logits():
            theirs = policy_stats(model, batch)
    torch.testing.assert_close(ours.logprob, theirs.logprob)


class Shifted(nn.Module):
    """A model that does to its logits what no configuration tells."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.base_model = model, model.config, model.base_model

    def get_output_embeddings(self):
        return self.model.lm_head

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, **inputs):
        logits = self.model(**inputs).logits
        return SimpleNamespace(logits=logits + 0.01 * logits.abs().max() * (logits > 0))


def test_a_model_that_changes_its_logits_is_scored_by_them(batch):
    model = Shifted(tiny("llama", WORLD.tokenizer()))
    path = token_path(model)
    assert not path.by_hidden
    assert "its logits are not its head's: the two differ by up to" in path.reason
    require_equal(model, batch)


def test_a_model_whose_backbone_is_of_no_use():
    model = tiny("llama", WORLD.tokenizer())
    model.model.forward = None
    path = token_path(Shifted(model))
    assert not path.by_hidden
    assert path.reason.startswith("asked by its hidden states, it raises TypeError")


@pytest.mark.parametrize("change", ["softcap", "patch", "hook", "global hook", "subclass"])
def test_what_is_more_than_a_weight_is_not_taken_for_one(change, batch):
    """Whatever is done to a head or a configuration after it was asked about."""
    model = tiny("gemma2", WORLD.tokenizer(), final_logit_softcapping=None)
    assert "by its weight" in token_path(model).reason
    head, handle, forward = model.lm_head, None, model.lm_head.forward
    if change == "softcap":
        model.config.final_logit_softcapping = 2.0
    elif change == "patch":
        head.forward = lambda x: 2 * forward(x)
    elif change == "hook":
        head.register_forward_hook(lambda module, given, z: 2 * z)
    elif change == "global hook":
        twice = lambda module, given, z: 2 * z if module is head else None  # noqa: E731
        handle = nn.modules.module.register_module_forward_hook(twice)
    else:
        head.weight = nn.Parameter(head.weight.detach().as_subclass(Doubling))
    announce(model, "model")
    try:
        require_equal_scores(model, batch)
    finally:
        if handle is not None:
            handle.remove()


class Doubling(torch.Tensor):
    """A weight that multiplies in a way of its own, as quantized ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        done = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * done if function is nn.functional.linear else done


def test_adapters_that_act_beside_layers_go_by_logits(batch):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    lora.alora_invocation_tokens = [5, 6]
    model = peft.get_peft_model(tiny("llama", WORLD.tokenizer()), lora)
    path = token_path(model)
    assert not path.by_hidden
    assert path.reason == "adapters of kind aLoRA do more than its layers tell"
    prompts = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    prompted = peft.get_peft_model(tiny("llama", WORLD.tokenizer()), prompts)
    assert "PROMPT_TUNING" in token_path(prompted).reason


def test_modes_of_layers_are_left_as_they_were():
    model = tiny("llama", WORLD.tokenizer()).train()
    model.model.layers[0].eval()
    token_path(model)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


def test_models_are_asked_once_and_left_as_they_were():
    model = tiny("llama", WORLD.tokenizer()).train()
    asked = []
    model.register_forward_hook(lambda *_: asked.append(1))
    assert token_path(model) is token_path(model)
    assert asked == [1]
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_language_model_loss(batch):
    model = tiny("granite", WORLD.tokenizer()).double()
    labels = batch.input_ids.masked_fill(~batch.attention_mask, IGNORED_LABEL)
    labels[:, :3] = IGNORED_LABEL
    mask = batch.attention_mask.long()
    data = {"input_ids": batch.input_ids, "attention_mask": mask, "labels": labels}

    def whole(model, data):
        with whole_logits():
            return language_model_loss(model, data)[0]

    loss, gradient = learned(model, data, whole)
    for fused in (False, True):
        ours, count = language_model_loss(model, data, fused)
        assert count.item() == (labels[:, 1:] != IGNORED_LABEL).sum()
        _, theirs = learned(model, data, lambda m, d, f=fused: language_model_loss(m, d, f)[0])
        torch.testing.assert_close(ours, loss)
        assert (theirs - gradient).norm() <= 1e-12 * gradient.norm()


def test_autocast_scores_as_exactly_as_float32(batch):
    """The head's product is rounded to bfloat16 neither at its inputs nor at its logits."""
    model = tiny("llama", WORLD.tokenizer())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = hidden_states(model, batch.input_ids, batch.attention_mask)
        got = policy_stats(model, batch, entropy=True).logprob
    rows, columns = batch.mask.nonzero(as_tuple=True)
    logits = (
        hidden[rows, batch.state_index[rows, columns]].double() @ model.lm_head.weight.T.double()
    )
    expected = logits.log_softmax(-1).gather(1, batch.response_ids[batch.mask][:, None])[:, 0]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, parameters' gradients left out."""

    def __init__(self, but):
        super().__init__()
        self.but, self.seen = but, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple) else (made,):
            if isinstance(x, torch.Tensor) and x.shape not in self.but:
                self.seen = max(self.seen, x.numel())
        return made


@pytest.mark.parametrize("way", [three_units, four_units])
def test_whole_logits_never_exist(way, batch):
    model = tiny("llama", WORLD.tokenizer())
    vocabulary, tokens = len(WORLD.tokenizer()), int(batch.mask.sum())
    with Largest({p.shape for p in model.parameters()} | {model.lm_head.weight.T.shape}) as ours:
        way(model, batch).backward()
    with Largest(set()) as theirs:
        by_logits(model, batch).backward()
    assert ours.seen < tokens * vocabulary <= theirs.seen


def test_roles_know_which_way(batch):
    model = ActorCritic(tiny("llama", WORLD.tokenizer()), temperature=0.7)
    pieces = []

    def loss_fn(stats, rows=None):
        pieces.append(rows)
        return LossOutput(stats.logprob.sum())

    model("policy", batch, loss_fn, fused=True)
    assert len(pieces) > 1
    assert all(isinstance(rows, slice) for rows in pieces)
    model("policy", batch, loss_fn)
    assert pieces[-1] is None
