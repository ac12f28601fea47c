"""Reward models in the released layout, against the formula of the released code."""

import pytest
import released
import torch
from safetensors.torch import load_file, save_file

from mossrlhf import RewardModel
from mossrlhf.models import load_classifier

HEAD = torch.randn(1, 16, generator=torch.Generator().manual_seed(5))


def formula(model, ids):
    """The head on the last hidden state of the last token, one sequence at a time."""
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
def test_scores_are_those_of_the_formula(tmp_path, layout, side):
    model = released.llama()
    released.write(tmp_path / "moss", model, HEAD, **layout)
    loaded = RewardModel.from_pretrained(tmp_path / "moss")
    rows = [[5, 6, 7, 8], [9, 3], [11, 12, 13]]
    ids = torch.zeros(3, 4, dtype=torch.long)
    mask = torch.zeros(3, 4, dtype=torch.long)
    for row, words in enumerate(rows):
        place = slice(4 - len(words), 4) if side == "left" else slice(len(words))
        ids[row, place], mask[row, place] = torch.tensor(words), 1
    with torch.no_grad():
        scores = loaded(ids, mask)
    assert scores.tolist() == pytest.approx([formula(model, row) for row in rows], abs=1e-5)


def test_it_is_exported_in_the_layout_of_transformers(tmp_path):
    from transformers import AutoModelForSequenceClassification

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
def test_a_lost_weight_is_named(tmp_path, missing):
    released.write(tmp_path / "moss", released.llama(), HEAD)
    path = tmp_path / "moss" / "model.safetensors"
    state = load_file(path)
    state.pop(missing)
    save_file(state, path)
    with pytest.raises(ValueError, match=f"reward_head.weight, but not .*{missing}"):
        load_classifier(tmp_path / "moss")


def test_a_head_of_another_width_is_named(tmp_path):
    released.write(tmp_path / "moss", released.llama(), torch.zeros(1, 7))
    with pytest.raises(ValueError, match=r"reward_head.weight, but not .*score.weight"):
        load_classifier(tmp_path / "moss")


def test_keywords_get_to_the_model(tmp_path):
    released.write(tmp_path / "moss", released.llama(), HEAD)
    options = dict(attn_implementation="eager", revision="main", local_files_only=True)
    assert load_classifier(tmp_path / "moss", **options).config._attn_implementation == "eager"
