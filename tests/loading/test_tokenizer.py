"""The policy's tokenizer, and the room its context leaves for prompts."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
)

from mossrlhf import TrainerConfig
from mossrlhf.loading.tokenizer import load_tokenizer, prompt_budget, require_vocabulary

LORA = dict(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])


def test_load_tokenizer_of_an_adapter_alone_takes_that_of_its_base_model(policy, world, tmp_path):
    policy().save_pretrained(tmp_path / "base")
    world.tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(tmp_path / "adapter").get_vocab() == world.tokenizer().get_vocab()


def test_require_vocabulary_refuses_more_tokens_than_the_model_embeds(policy, world):
    tokenizer = world.tokenizer()
    require_vocabulary(policy(), tokenizer)
    model = policy(vocab_size=len(tokenizer) - 1)
    for small in (model, get_peft_model(model, LoraConfig(**LORA))):
        with pytest.raises(ValueError, match=r"processing_class: .*resize_token_embeddings"):
            require_vocabulary(small, tokenizer)


@pytest.mark.parametrize("special", [dict(eos_token_id=[3, 1000]), dict(pad_token_id=-1)])
def test_require_vocabulary_refuses_special_tokens_beyond_the_vocabulary(policy, world, special):
    with pytest.raises(ValueError, match=r"generation_config: (eos|pad)_token_id = (1000|-1), but"):
        require_vocabulary(policy(), world.tokenizer(), GenerationConfig(**special))


@pytest.mark.parametrize(("wanted", "expected"), [(None, 24), (10, 10), (24, 24)])
def test_prompt_budget_leaves_room_for_the_response(policy, wanted, expected):
    model = policy(max_position_embeddings=32)
    assert prompt_budget(model, TrainerConfig(max_prompt_length=wanted), 8) == expected


@pytest.mark.parametrize(("wanted", "response"), [(25, 8), (None, 32)])
def test_prompt_budget_refuses_more_than_the_context(policy, wanted, response):
    model, args = policy(max_position_embeddings=32), TrainerConfig(max_prompt_length=wanted)
    with pytest.raises(ValueError, match="not fit into the model's context of 32"):
        prompt_budget(model, args, response)


def test_prompt_budget_without_a_bound_is_the_configured_one():
    model = BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2))
    assert prompt_budget(model, TrainerConfig(max_prompt_length=None), 8) is None
    assert prompt_budget(model, TrainerConfig(max_prompt_length=7), 8) == 7
