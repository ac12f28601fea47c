"""Value heads, and reward models that match transformers' classifiers on disk and in numbers."""

import json
import warnings

import pytest
import released
import torch
from families import tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import CLASSIFIERS, LANGUAGE_MODELS, LLAMA, PAD, V, padded, small_batch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GranitePreTrainedModel,
    LlamaConfig,
)

from mossrlhf import ToyWorld
from mossrlhf.models import RewardModel, ValueHead, load_classifier
from mossrlhf.models.backbone import is_causal
from mossrlhf.models.reward_model import classifier_class

families = pytest.mark.parametrize("family", ["llama", "gpt2"])


@pytest.fixture
def batch():
    return small_batch()


class TestValueHead:
    def test_starts_at_zero(self):
        assert ValueHead(4, bias=True)(torch.randn(2, 3, 4)).tolist() == [[0] * 3] * 2
        assert ValueHead(4, zero=False)(torch.randn(2, 3, 4)).abs().min() > 0

    @pytest.mark.parametrize("bias", [False, True])
    def test_computes_a_dot_product_in_float32(self, bias):
        head = ValueHead(4, bias=bias, zero=False)
        hidden = torch.randn(2, 3, 4).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = head(hidden)
        expected = hidden.double().numpy() @ head.weight.detach().double().numpy()[0]
        expected += head.bias.item() if bias else 0.0
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), torch.from_numpy(expected), rtol=0, atol=1e-6)

    def test_bf16_weights_give_float32_values(self):
        assert ValueHead(4).bfloat16()(torch.randn(1, 2, 4).bfloat16()).dtype == torch.float32


class TestRewardModel:
    ROWS = ([1, 2, 3], [4, 5, 6, 7, 8], [9])

    @families
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("more", [0, 3])
    def test_padding_changes_no_number(self, family, side, more):
        classifier = CLASSIFIERS[family](num_labels=1).eval()
        head = ValueHead(16)
        head.weight = classifier.score.weight
        model = RewardModel(classifier.base_model, head)
        alone = [model(*padded([row], "right")).item() for row in self.ROWS]
        ids, mask = padded(self.ROWS, side, more)
        torch.testing.assert_close(model(ids, mask), torch.tensor(alone), atol=1e-5, rtol=0)
        torch.testing.assert_close(model(ids, mask.long()), model(ids, mask))
        values = model.token_values(ids, mask)
        tokens = torch.cat([model.token_values(*padded([r], "right"))[0] for r in self.ROWS])
        torch.testing.assert_close(values[mask], tokens, atol=1e-5, rtol=0)
        assert values.dtype == torch.float32

    def test_scoring_uses_no_cache(self, batch):
        model = RewardModel.from_language_model(LANGUAGE_MODELS["llama"]())
        is_causal(model.backbone)  # probed beforehand
        caches = []
        model.backbone.register_forward_hook(lambda *call: caches.append(call[2].past_key_values))
        model(batch.input_ids, batch.attention_mask)
        assert caches == [None]

    @families
    def test_loads_what_transformers_saves(self, family, tmp_path):
        theirs = CLASSIFIERS[family](num_labels=1).eval()
        theirs.save_pretrained(tmp_path)
        ours = RewardModel.from_pretrained(tmp_path).eval()
        ids, mask = padded(self.ROWS, "right")
        torch.testing.assert_close(
            ours(ids, mask), theirs(ids, attention_mask=mask.long()).logits[:, 0]
        )
        assert ours.state_dict().keys() == theirs.state_dict().keys()

    @families
    def test_transformers_loads_what_it_saves(self, family, tmp_path):
        ours = RewardModel.from_language_model(LANGUAGE_MODELS[family]()).eval()
        nn.init.normal_(ours.score.weight)
        ours.save_pretrained(tmp_path)
        theirs, info = AutoModelForSequenceClassification.from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert type(theirs) is type(CLASSIFIERS[family]())
        ids, mask = padded(self.ROWS, "right")
        scores = theirs.eval()(ids, attention_mask=mask.long()).logits[:, 0]
        torch.testing.assert_close(scores, ours(ids, mask))
        again = RewardModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(ids, mask), ours(ids, mask), rtol=0, atol=0)

    def test_a_family_without_a_classifier_gets_one(self, tmp_path):
        """Transformers has none for Granite; it would load no checkpoint of one either."""
        policy = tiny("granite", ToyWorld().tokenizer())
        kind = classifier_class(policy.config)
        assert kind.__name__ == "GraniteForSequenceClassification"
        assert kind.__mro__[2] is GranitePreTrainedModel
        ours = RewardModel.from_language_model(policy).eval()
        nn.init.normal_(ours.score.weight)
        ours.save_pretrained(tmp_path)
        again = RewardModel.from_pretrained(tmp_path).eval()
        ids, mask = padded(self.ROWS, "right")
        torch.testing.assert_close(again(ids, mask), ours(ids, mask), rtol=0, atol=0)

    def test_an_adapter_alone_is_merged_into_its_base(self, tmp_path):
        RewardModel.from_language_model(LANGUAGE_MODELS["llama"]()).save_pretrained(
            tmp_path / "base"
        )
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        options = dict(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
        theirs = get_peft_model(base, LoraConfig(**options)).eval()
        theirs.save_pretrained(tmp_path / "adapter")
        ours = RewardModel.from_pretrained(tmp_path / "adapter").eval()
        ids, mask = padded(self.ROWS, "right")
        scores = theirs(ids, attention_mask=mask.long()).logits[:, 0]
        torch.testing.assert_close(ours(ids, mask), scores)

    @pytest.mark.parametrize("ends", [PAD, [5, PAD]])
    def test_saving_warns_of_a_padding_token_that_ends_responses(self, ends, tmp_path):
        """Transformers would read the score of the token before the end."""
        ours = RewardModel.from_language_model(LANGUAGE_MODELS["llama"]()).eval()
        nn.init.normal_(ours.score.weight)
        ours.config.eos_token_id = ends
        with pytest.warns(UserWarning, match=rf"pad_token_id is {PAD}.*one token early.*Set"):
            ours.save_pretrained(tmp_path)
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        finished, unfinished = torch.tensor([[1, 2, 3, PAD]]), torch.tensor([[1, 2, 3]])
        ones = torch.ones(1, 4)
        assert theirs(finished).logits.item() == pytest.approx(
            ours(unfinished, ones[:, :3]).item(), abs=1e-4
        )
        assert abs(theirs(finished).logits.item() - ours(finished, ones).item()) > 1e-3

    @pytest.mark.parametrize(("pad", "ends"), [(PAD, 5), (PAD, None), (0, [5, PAD])])
    def test_saving_does_not_warn_of_other_padding_tokens(self, pad, ends, tmp_path):
        ours = RewardModel.from_language_model(LANGUAGE_MODELS["llama"]())
        ours.config.pad_token_id, ours.config.eos_token_id = pad, ends
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours.save_pretrained(tmp_path)
        assert not [str(w.message) for w in caught if "pad_token_id" in str(w.message)]

    def test_saving_warns_without_a_padding_token(self, tmp_path):
        """Transformers would take one sequence at a time."""
        ours = RewardModel.from_language_model(LANGUAGE_MODELS["llama"]()).eval()
        ours.config.pad_token_id = None
        with pytest.warns(UserWarning, match="pad_token_id is None, .* one sequence at a time"):
            ours.save_pretrained(tmp_path)
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        with pytest.raises(ValueError, match="batch sizes > 1"):
            theirs(torch.tensor([[1, 2], [3, 4]]))

    def test_the_dtype_is_saved(self, tmp_path):
        model = RewardModel.from_language_model(LANGUAGE_MODELS["llama"]()).bfloat16()
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
        assert RewardModel.from_pretrained(tmp_path).score.weight.dtype == torch.float32
        half = RewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}

    @families
    def test_from_language_model_copies_the_backbone_under_a_zero_head(self, family, batch):
        language_model = LANGUAGE_MODELS[family]()
        before = {k: v.clone() for k, v in language_model.state_dict().items()}
        model = RewardModel.from_language_model(language_model)
        copied = {k: v.clone() for k, v in model.backbone.state_dict().items()}
        torch.testing.assert_close(copied, dict(language_model.base_model.state_dict()))
        assert model(batch.input_ids, batch.attention_mask).tolist() == [0, 0]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        model.config.pad_token_id = 1
        torch.testing.assert_close(dict(language_model.state_dict()), before)
        assert language_model.config.pad_token_id == PAD

    def test_from_language_model_loads_in_float32(self, tmp_path):
        LANGUAGE_MODELS["llama"]().bfloat16().save_pretrained(tmp_path)
        assert RewardModel.from_language_model(tmp_path).backbone.dtype == torch.float32
        kept = RewardModel.from_language_model(tmp_path, dtype=torch.bfloat16)
        assert kept.backbone.dtype == torch.bfloat16

    def test_from_language_model_loads_a_folder(self, tmp_path):
        language_model = LANGUAGE_MODELS["llama"]()
        language_model.save_pretrained(tmp_path)
        model = RewardModel.from_language_model(tmp_path)
        torch.testing.assert_close(
            dict(model.backbone.state_dict()), dict(language_model.base_model.state_dict())
        )

    def test_a_language_model_without_a_head_is_refused(self, tmp_path):
        LANGUAGE_MODELS["llama"]().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"missing.*score.*from_language_model"):
            RewardModel.from_pretrained(tmp_path)

    def test_a_head_of_another_name_is_refused(self, tmp_path):
        config = BertConfig(
            vocab_size=V, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=8, num_labels=1,
        )  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"BertForSeq.*not called 'score'.* pass reward=path"):
            RewardModel.from_pretrained(tmp_path)

    def test_several_labels_are_refused(self, tmp_path):
        CLASSIFIERS["llama"](num_labels=3).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="no sequence classifier with one label"):
            RewardModel.from_pretrained(tmp_path)

    def test_saving_a_bias_that_the_family_lacks_is_refused(self, tmp_path):
        backbone = LANGUAGE_MODELS["llama"]().base_model
        with pytest.raises(ValueError, match=r"score\.bias"):
            RewardModel(backbone, ValueHead(16, bias=True)).save_pretrained(tmp_path)

    def test_saving_an_unknown_family_is_refused(self, tmp_path):
        class Unknown(LlamaConfig):
            model_type = "unknown"

        model = RewardModel(LANGUAGE_MODELS["llama"]().base_model)
        model.config = Unknown(**LLAMA)
        with pytest.raises(ValueError, match="no model for Unknown"):
            model.save_pretrained(tmp_path)

    def test_device_is_the_head_s(self):
        assert RewardModel.from_language_model(LANGUAGE_MODELS["gpt2"]()).device.type == "cpu"


HEAD = torch.randn(1, 16, generator=torch.Generator().manual_seed(5))


def formula(model, ids):
    """Apply the head to the last token's hidden state, one sequence at a time."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    return (HEAD @ hidden).item()


@pytest.mark.parametrize(
    "layout",
    [
        dict(),
        dict(shards=3),
        dict(pickled=True, frequencies=True),
        dict(pickled=True, shards=2, frequencies=True),
    ],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_released_models_score_by_their_formula(tmp_path, layout, side):
    model = released.llama()
    released.write(tmp_path / "moss", model, HEAD, **layout)
    loaded = RewardModel.from_pretrained(tmp_path / "moss")
    rows = [[5, 6, 7, 8], [9, 3], [11, 12, 13]]
    ids = torch.zeros(3, 4, dtype=torch.long)
    mask = torch.zeros(3, 4, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(4 - len(tokens), 4) if side == "left" else slice(len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    with torch.no_grad():
        scores = loaded(ids, mask)
    assert scores.tolist() == pytest.approx([formula(model, row) for row in rows], abs=1e-5)


def test_released_models_are_saved_in_transformers_layout(tmp_path):
    released.write(tmp_path / "moss", released.llama(), HEAD)
    loaded = RewardModel.from_pretrained(tmp_path / "moss", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.backbone.rotary_emb.inv_freq.dtype == torch.float32
    loaded.float().save_pretrained(tmp_path / "out")
    classifier = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = classifier(ids).logits[:, 0]
        torch.testing.assert_close(loaded(ids, torch.ones_like(ids)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_released_models_report_a_missing_weight(tmp_path, missing):
    released.write(tmp_path / "moss", released.llama(), HEAD)
    path = tmp_path / "moss" / "model.safetensors"
    state = load_file(path)
    state.pop(missing)
    save_file(state, path)
    with pytest.raises(ValueError, match=f"reward_head.weight, but not .*{missing}"):
        load_classifier(tmp_path / "moss")


def test_released_models_report_a_head_of_another_width(tmp_path):
    released.write(tmp_path / "moss", released.llama(), torch.zeros(1, 7))
    with pytest.raises(ValueError, match=r"reward_head.weight, but not .*score.weight"):
        load_classifier(tmp_path / "moss")


def test_released_models_get_the_keywords(tmp_path):
    released.write(tmp_path / "moss", released.llama(), HEAD)
    options = dict(attn_implementation="eager", revision="main", local_files_only=True)
    assert load_classifier(tmp_path / "moss", **options).config._attn_implementation == "eager"
