"""Models, tokenizers and vocabularies that are none, or do not fit together."""

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from bad_inputs.room import Room
from bad_inputs.shop import WORLD
from mossrlhf import RewardModel
from mossrlhf.rewards import ModelReward

room = Room("Models, tokenizers, vocabularies")
row = room.row


def classifier(labels=1):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = BertConfig(vocab_size=185, num_labels=labels, **sizes)
    return AutoModelForSequenceClassification.from_config(config)


row(
    "a module that is no language model",
    "TypeError: model: got Linear, expected a causal language model, or the folder or hub name",
    lambda shop: shop.trainer(model=torch.nn.Linear(2, 2)),
)
row(
    "a number for a model",
    "TypeError: model: got int, expected a causal language model",
    lambda shop: shop.trainer(model=3),
)
row(
    "a folder that is not there",
    "OSError: model: …gone' cannot be loaded (",
    lambda shop: shop.trainer(model=shop.folder / "gone"),
)
row(
    "a folder without a model in it",
    "ValueError: model: …empty' cannot be loaded (…); expected a folder or hub name with all files "
    "that save_pretrained wrote",
    lambda shop: shop.trainer(model=shop.file("empty/readme.txt", "").parent),
)
row(
    "a reward model for a policy",
    "TypeError: model: got RewardModel, expected a causal language model",
    lambda shop: shop.trainer(model=shop.reward_model()),
)
row(
    "a classifier for a policy",
    "TypeError: model: got BertForSequenceClassification, expected a causal language model",
    lambda shop: shop.trainer(model=classifier()),
)


@row(
    "an encoder-decoder for a policy",
    "TypeError: model: got T5ForConditionalGeneration, expected a causal language model",
)
def encoder_decoder(shop):
    sizes = dict(vocab_size=185, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return shop.trainer(model=T5ForConditionalGeneration(T5Config(**sizes)))


row(
    "a policy whose parameters are frozen",
    "ValueError: model: none of its parameters requires a gradient, so there is nothing to train",
    lambda shop: shop.trainer(model=shop.policy().requires_grad_(False)),
)


@row(
    "a policy with a weight that is NaN",
    "ValueError: model: its parameter 'model.norm.weight' is not finite",
)
def broken(shop):
    model = shop.policy()
    model.model.norm.weight.data[3] = float("nan")
    return shop.trainer(model=model)


@row(
    "a folder whose weights are cut off",
    "ValueError: model: …policy' cannot be loaded (SafetensorError: …); expected a folder or hub "
    "name with all files that save_pretrained wrote",
)
def cut_off(shop):
    folder = shop.folder / "policy"
    shop.policy().save_pretrained(folder)
    WORLD.tokenizer().save_pretrained(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return shop.trainer(model=folder, processing_class=None)


row(
    "no tokenizer, and a model without a name",
    "ValueError: processing_class: got None, and the model has no name_or_path to load one from",
    lambda shop: shop.trainer(processing_class=None),
)
row(
    "the name of a tokenizer",
    "TypeError: processing_class: got 'gpt2', expected a tokenizer: AutoTokenizer.from_pretrained(",
    lambda shop: shop.trainer(processing_class="gpt2"),
)
row(
    "a tokenizer with more tokens than the model embeds",
    "ValueError: processing_class: the tokenizer has 185 tokens, the model embeds 100 of them; "
    "call "
    "model.resize_token_embeddings(len(tokenizer))",
    lambda shop: shop.trainer(model=shop.policy(vocab_size=100)),
)


@row(
    "a tokenizer without an end token",
    "ValueError: processing_class: has no eos token, so no response can end; set "
    "tokenizer.eos_token or GenerationConfig(eos_token_id=)",
)
def endless(shop):
    tokenizer = WORLD.tokenizer()
    tokenizer.eos_token = None
    return shop.trainer(processing_class=tokenizer)


@row(
    "a tokenizer whose padding token is its end token",
    "taken: masks are made of lengths, never of padding",
)
def padding_that_ends(shop):
    tokenizer = WORLD.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return shop.stepped(processing_class=tokenizer)


row(
    "an end token beyond the vocabulary",
    "ValueError: generation_config: eos_token_id = 9999, but the model's 185 tokens end at 184",
    lambda shop: shop.trainer(
        generation_config=GenerationConfig(max_new_tokens=4, eos_token_id=9999)
    ),
)
row(
    "a reference of another vocabulary",
    "ValueError: ref_model: its vocabulary has 50 tokens, the policy's 185; it must read",
    lambda shop: shop.trainer(ref_model=shop.policy(vocab_size=50)),
)
row(
    "`ref_model=False`",
    "TypeError: ref_model: got False, expected a causal language model",
    lambda shop: shop.trainer(ref_model=False),
)
row(
    "a critic of another vocabulary",
    "ValueError: critic: its vocabulary has 50 tokens, the policy's 185",
    lambda shop: shop.trainer(critic=shop.reward_model(vocab_size=50)),
)
row(
    "a language model for a critic",
    "ValueError: critic: got LlamaForCausalLM, a critic needs a value at every token",
    lambda shop: shop.trainer(critic=shop.policy()),
)
row(
    "a number for a critic",
    "ValueError: critic: got int, a critic needs a value at every token",
    lambda shop: shop.trainer(critic=3),
)
row(
    "a BERT classifier for a critic",
    "ValueError: critic: got BertForSequenceClassification, which scores sequences as a whole",
    lambda shop: shop.trainer(critic=classifier()),
)
row(
    "a language model for a reward",
    "ValueError: reward: got LlamaForCausalLM, expected a RewardModel, a transformers sequence",
    lambda shop: shop.trainer(reward=shop.policy()),
)
row(
    "a classifier of three labels for a reward",
    "ValueError: reward: BertForSequenceClassification has 3 labels, expected 1; write a function "
    "that selects the reward",
    lambda shop: shop.trainer(reward=classifier(3)),
)
row(
    "a reward model of another vocabulary, without its tokenizer",
    "ValueError: reward: its model has 50 tokens, the policy's tokenizer 185; pass "
    "ModelReward(model=, tokenizer=)",
    lambda shop: shop.trainer(reward=shop.reward_model(vocab_size=50)),
)
row(
    "a function in a `ModelReward`",
    "ValueError: reward: got function, expected a RewardModel",
    lambda shop: ModelReward(model=lambda ids: ids),
)


@row(
    "a folder of a language model for a reward model",
    "ValueError: path: …holds no sequence classifier with one label (missing or of another shape: "
    "['score.weight']); to start a reward model from a language model, use "
    "RewardModel.from_language_model(path)",
)
def language_model_as_reward(shop):
    shop.policy().save_pretrained(shop.folder / "policy")
    return RewardModel.from_pretrained(shop.folder / "policy")


for part in ("critic", "reward", "ref_model"):
    row(
        f"`{part}=` a folder that is not there",
        f"OSError: {part}: …gone' cannot be loaded (…); expected a folder or hub name with all "
        "files that save_pretrained wrote",
        lambda shop, part=part: shop.trainer(**{part: str(shop.folder / "gone")}),
    )
row(
    "one callback, not a list of them",
    "TypeError: callbacks: got <…, expected a list of transformers.TrainerCallback objects",
    lambda shop: shop.trainer(callbacks=TrainerCallback()),
)
row(
    "a function for a callback",
    "TypeError: callbacks: got <function …>, expected a list of transformers.TrainerCallback objec",
    lambda shop: shop.trainer(callbacks=[lambda state: None]),
)
row(
    "an argument of another library",
    "TypeError: Trainer has no option 'reward_funcs'; here that is Trainer(reward=)",
    lambda shop: shop.trainer(reward_funcs=[]),
)
