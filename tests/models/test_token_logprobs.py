"""Which path a model's tokens are scored by, and that all give the same numbers and gradients."""

from types import SimpleNamespace

import peft
import pytest
import torch
from families import FAMILIES, tiny
from rollouts import recorded_rollout
from small_models import LANGUAGE_MODELS, padded, small_batch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mossrlhf import ToyWorld
from mossrlhf.functional import token_stats
from mossrlhf.kernels import chunked_head as head_module
from mossrlhf.loading.policy import checkpoint_activations
from mossrlhf.models import (
    IGNORED_LABEL,
    announce,
    backbone,
    full_logits,
    language_model_loss,
    policy_loss,
    policy_stats,
    token_path,
)
from mossrlhf.models.backbone import accepts
from mossrlhf.models.token_logprobs import hidden_states
from mossrlhf.types import LossOutput

WORLD = ToyWorld(lang="en", seed=0)

# peft 0.21 asks transformers 5.23 for a property that has another name now.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def batch():
    return recorded_rollout(WORLD)


@pytest.fixture
def small():
    return small_batch()


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Chunks of sixteen tokens, so that a batch is several of them, the last one short."""
    monkeypatch.setattr(head_module, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(head_module, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(head_module, "MIN_CHUNK_ROWS", 16)


@pytest.fixture(autouse=True)
def same_states(monkeypatch):
    """All paths start from the same hidden states, without packing."""
    monkeypatch.setattr(backbone, "can_pack", lambda model: False)


def weights(count):
    return torch.linspace(-1, 1, count)


def loss_of(stats, rows, total):
    """Return a sum over tokens that uses every statistic."""
    given = weights(total)[rows].to(stats.logprob)
    return LossOutput((given * stats.logprob + stats.entropy**2 * given.abs()).sum())


def loss_and_gradient(model, batch, score):
    """Return a loss and all gradients of a model's parameters, flat."""
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
    with full_logits():
        return four_units(model, batch)


def require_equal(model, batch, bound=3e-6):
    """Compare both paths by hidden states with full logits; gradients in relative L2."""
    loss, gradient = loss_and_gradient(model, batch, by_logits)
    assert gradient.norm() > 1e-3
    for path in (four_units, three_units):
        ours, theirs = loss_and_gradient(model, batch, path)
        torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
        assert (theirs - gradient).norm() <= bound * gradient.norm(), path.__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scored_by_hidden_states(family, batch):
    model = tiny(family, WORLD.tokenizer())
    path = token_path(model)
    assert path.by_hidden, path.reason
    assert "by its weight" in path.reason
    require_equal(model, batch)


def test_caps_and_factors_are_read_from_the_config():
    capped = tiny("gemma2", WORLD.tokenizer(), final_logit_softcapping=5.0)
    assert token_path(capped).softcap == 5.0
    assert token_path(tiny("granite", WORLD.tokenizer())).scale == 0.5


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_get_both_gradients(tied, batch):
    model = tiny("llama", WORLD.tokenizer(), tie_word_embeddings=tied).double()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    require_equal(model, batch, 1e-12)


def test_checkpointed_activations_give_the_same_gradients(batch):
    model = tiny("llama", WORLD.tokenizer()).double().train()
    checkpoint_activations(model)
    require_equal(model, batch, 1e-12)


def with_bias(head):
    biased = nn.Linear(head.in_features, head.out_features, dtype=head.weight.dtype)
    nn.init.normal_(biased.bias)
    return biased


def test_a_head_with_a_bias_is_applied_by_its_weight(batch):
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
def test_adapted_models_are_scored_by_hidden_states(options, how, batch):
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
        with full_logits():
            theirs = policy_stats(model, batch)
    torch.testing.assert_close(ours.logprob, theirs.logprob)


class Shifted(nn.Module):
    """A model that changes its logits, without a word in its configuration."""

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


def test_a_model_that_changes_its_logits_is_scored_by_full_logits(batch):
    model = Shifted(tiny("llama", WORLD.tokenizer()))
    path = token_path(model)
    assert not path.by_hidden
    assert "its logits are not its head's: the two differ by up to" in path.reason
    require_equal(model, batch)


def test_a_model_whose_backbone_fails_is_scored_by_full_logits():
    model = tiny("llama", WORLD.tokenizer())
    model.model.forward = None
    path = token_path(Shifted(model))
    assert not path.by_hidden
    assert path.reason.startswith("computing its hidden states alone raises TypeError")


@pytest.mark.parametrize("change", ["softcap", "patch", "hook", "global hook", "subclass"])
def test_changes_to_head_or_config_after_the_probe_are_noticed(change, batch):
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
    """A weight that changes multiplication, as quantized ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        done = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * done if function is nn.functional.linear else done


def test_adapters_beyond_layers_are_scored_by_full_logits(batch):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    lora.alora_invocation_tokens = [5, 6]
    model = peft.get_peft_model(tiny("llama", WORLD.tokenizer()), lora)
    path = token_path(model)
    assert not path.by_hidden
    assert path.reason == "adapters of kind aLoRA act outside of its layers, too"
    prompts = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    prompted = peft.get_peft_model(tiny("llama", WORLD.tokenizer()), prompts)
    assert "PROMPT_TUNING" in token_path(prompted).reason


def test_probing_restores_the_modes_of_layers():
    model = tiny("llama", WORLD.tokenizer()).train()
    model.model.layers[0].eval()
    token_path(model)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


def test_models_are_probed_once_and_left_unchanged():
    model = tiny("llama", WORLD.tokenizer()).train()
    asked = []
    model.register_forward_hook(lambda *_: asked.append(1))
    assert token_path(model) is token_path(model)
    assert asked == [1]
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_language_model_loss_is_that_of_full_logits(batch):
    model = tiny("granite", WORLD.tokenizer()).double()
    labels = batch.input_ids.masked_fill(~batch.attention_mask, IGNORED_LABEL)
    labels[:, :3] = IGNORED_LABEL
    mask = batch.attention_mask.long()
    data = {"input_ids": batch.input_ids, "attention_mask": mask, "labels": labels}

    def whole(model, data):
        with full_logits():
            return language_model_loss(model, data)[0]

    loss, gradient = loss_and_gradient(model, data, whole)
    for fused in (False, True):
        ours, count = language_model_loss(model, data, fused)
        assert count.item() == (labels[:, 1:] != IGNORED_LABEL).sum()
        path = lambda m, d, f=fused: language_model_loss(m, d, f)[0]  # noqa: E731
        _, theirs = loss_and_gradient(model, data, path)
        torch.testing.assert_close(ours, loss)
        assert (theirs - gradient).norm() <= 1e-12 * gradient.norm()


def test_autocast_does_not_round_logits(batch):
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
    """Records the size of the largest tensor that is made, of any but the ignored shapes."""

    def __init__(self, ignored):
        super().__init__()
        self.ignored, self.seen = ignored, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple) else (made,):
            if isinstance(x, torch.Tensor) and x.shape not in self.ignored:
                self.seen = max(self.seen, x.numel())
        return made


@pytest.mark.parametrize("way", [three_units, four_units])
def test_full_logits_are_never_computed(way, batch):
    model = tiny("llama", WORLD.tokenizer())
    vocabulary, tokens = len(WORLD.tokenizer()), int(batch.mask.sum())
    with Largest({p.shape for p in model.parameters()} | {model.lm_head.weight.T.shape}) as ours:
        way(model, batch).backward()
    with Largest(set()) as theirs:
        by_logits(model, batch).backward()
    assert ours.seen < tokens * vocabulary <= theirs.seen


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_policy_stats_match_full_logits_row_by_row(small, family, temperature):
    """The oracle runs every sequence alone, without padding, over its full logits."""
    model = LANGUAGE_MODELS[family]().eval()
    got = policy_stats(model, small, temperature, entropy=True)
    logprobs, entropies = [], []
    for b, prompt in enumerate(small.prompt_lengths.tolist()):
        ids = torch.tensor(small.prompts()[b] + small.completions()[b])
        logits = model(ids[None]).logits[0].double() / temperature
        for t in small.mask[b].nonzero().flatten().tolist():
            logp = logits[prompt + t - 1].log_softmax(-1)
            logprobs.append(logp[ids[prompt + t]])
            entropies.append(-(logp.exp() * logp).sum())
    exact = {"atol": 1e-5, "rtol": 0, "check_dtype": False}
    torch.testing.assert_close(got.logprob, torch.stack(logprobs), **exact)
    torch.testing.assert_close(got.entropy, torch.stack(entropies), **exact)


def test_the_head_is_not_applied_to_prompts(small):
    """Neither from hidden states nor with `logits_to_keep`."""
    model = LANGUAGE_MODELS["llama"]().eval()
    widths = []

    class Full(nn.Module):
        """The same model without `logits_to_keep`."""

        def forward(self, input_ids, attention_mask, use_cache):
            return model(input_ids, attention_mask, use_cache=use_cache)

    assert token_path(model).by_hidden
    # With a hook, the head is applied as a module.
    model.lm_head.register_forward_hook(lambda *call: widths.append(call[1][0].shape[-2]))
    short = small.select(torch.tensor([0]))
    hidden, full = policy_stats(model, short), policy_stats(Full(), short)
    with full_logits():
        kept = policy_stats(model, short)
    # Two response tokens; all five positions; the tokens and the place before them.
    assert widths == [2, 5, 3]
    for got in (hidden, kept):
        torch.testing.assert_close(got.logprob, full.logprob, rtol=0, atol=1e-6)
    assert accepts(model, "logits_to_keep")
    assert not accepts(Full(), "logits_to_keep")


# peft 0.21 asks transformers 5.23 for a property that has another name now.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_accepts_unwraps_adapters():
    adapted = peft.get_peft_model(LANGUAGE_MODELS["llama"](), peft.LoraConfig(r=2))
    assert accepts(adapted, "logits_to_keep")


def test_bf16_models_are_scored_in_float32(small):
    """As if the head alone were in float32."""
    model = LANGUAGE_MODELS["llama"]().bfloat16().eval()
    got = policy_stats(model, small, entropy=True)
    hidden = model.model(small.input_ids, small.attention_mask.long()).last_hidden_state
    rows, at = small.mask.nonzero()[:, 0], small.state_index[small.mask]
    logits = hidden[rows, at].float() @ model.lm_head.weight.float().T
    expected = token_stats(logits, small.response_ids[small.mask])
    assert got.logprob.dtype == got.entropy.dtype == torch.float32
    torch.testing.assert_close(vars(got), vars(expected))
    with full_logits():
        rounded = policy_stats(model, small, entropy=True)
    assert rounded.logprob.dtype == torch.float32
    assert (rounded.logprob - expected.logprob).abs().max() > 1e-4


def test_language_model_loss_is_transformers_own():
    model = LANGUAGE_MODELS["llama"]().eval()
    ids, mask = padded([[1, 2, 3, 4], [5, 6]], "right")
    labels = ids.masked_fill(~mask, -100)
    labels[0, :2] = -100  # a prompt
    loss, count = language_model_loss(
        model, {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    )
    mean = model(ids, mask.long(), labels=labels).loss  # transformers' own
    assert count.item() == 3
    torch.testing.assert_close(loss / count, mean)


def test_a_trainer_warns_once_of_full_logits(make, world):
    model = tiny("llama", world.tokenizer())
    original = type(model).forward

    class Louder(type(model)):
        def forward(self, *args, **kwargs):
            output = original(self, *args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    model.__class__ = Louder
    with pytest.warns(UserWarning, match="scored by full logits.*the two differ") as warned:
        trainer = make(model=model)
    named = [str(w.message).split(":")[0] for w in warned if "full logits" in str(w.message)]
    assert named == ["model", "ref_model"]
    assert "full logits" in str(trainer)
    trainer.train()


def test_a_trainer_shows_how_it_scores(make):
    shown = str(make())
    assert "scoring:    its logits are its head's, which is applied by its weight" in shown
