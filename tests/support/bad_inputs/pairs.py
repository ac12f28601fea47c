"""What reward models cannot be trained on, and language models not by `SFTTrainer`."""

import torch
from transformers import TrainingArguments

from bad_inputs.room import Room
from bad_inputs.shop import WORLD
from mossrlhf import RewardTrainer, SFTTrainer
from mossrlhf.data import PairCollator, SFTCollator, TokenBatches
from mossrlhf.reward_modeling.pairs import RankingLoss
from mossrlhf.reward_modeling.scoring import score_responses

room = Room("Reward-model and supervised training")
row = room.row
PAIR = {"prompt": "help", "chosen": "me", "rejected": "you"}


def trainer(shop, data=(PAIR,), model=None, **parts):
    arguments = TrainingArguments(output_dir=str(shop.fresh), use_cpu=True, report_to="none")
    model = shop.reward_model() if model is None else model
    given = dict(args=arguments, processing_class=WORLD.tokenizer(), train_dataset=data)
    return RewardTrainer(model, **{**given, **parts})


row(
    "a record without a pair",
    "ValueError: train_dataset[0]: records: chosen and rejected missing among ['prompt']; read "
    "them with load_sft (SFTCollator) or load_pairs (PairCollator)",
    lambda shop: trainer(shop, [{"prompt": "help"}]),
)
row(
    "responses that are messages",
    "ValueError: train_dataset[0]: records: chosen is a list (…), expected a string, the text "
    "alone without the prompt; read them with …load_pairs (PairCollator)…",
    lambda shop: trainer(shop, [{**PAIR, "chosen": [{"role": "assistant", "content": "me"}]}]),
)
row(
    "no pairs",
    "ValueError: train_dataset: it is empty, expected at least one record",
    lambda shop: trainer(shop, []),
)
row(
    "the path of a file",
    "TypeError: train_dataset: got str, …read the file: mossrlhf.data.load_pairs('pairs.jsonl')",
    lambda shop: trainer(shop, "pairs.jsonl"),
)
row(
    "a margin that is a text",
    "ValueError: train_dataset[0]: margin_column: a record's 'margin' is 'much', a str, expected "
    "a number",
    lambda shop: trainer(shop, [{**PAIR, "margin": "much"}], margin_column="margin"),
)
row(
    "records without the margin that is asked for",
    "ValueError: train_dataset[0]: margin_column: a record has no 'margin' (or None, or NaN)",
    lambda shop: trainer(shop, margin_column="margin"),
)
row(
    "a smoothing of a half",
    "ValueError: RankingLoss(label_smoothing=): got 0.5, expected a number in [0, 0.5)",
    lambda shop: RankingLoss(label_smoothing=0.5),
)
row(
    "a language model in place of a reward model",
    "TypeError: model: got a LlamaForCausalLM, expected a RewardModel; make one of a language "
    "model "
    "with RewardModel.from_language_model(model)",
    lambda shop: trainer(shop, model=shop.policy()),
)
row(
    "a tokenizer with more tokens than the model",
    "ValueError: processing_class: it has 185 tokens, the model's vocabulary only 100",
    lambda shop: trainer(shop, model=shop.reward_model(vocab_size=100)),
)
row(
    "a language-model term without an output head",
    "ValueError: lm_head: got None, but RankingLoss(lm_coef=1.0) needs an output head",
    lambda shop: trainer(shop, loss=RankingLoss(lm_coef=1.0)),
)


@row(
    "a reward model whose scores are not finite",
    "FloatingPointError: step 0: rewards or log-probabilities of 1 pairs are not finite; the step "
    "was not taken",
)
def diverged(shop):
    model = shop.reward_model()
    torch.nn.init.constant_(model.score.weight, float("nan"))
    return trainer(shop, model=model, data=[PAIR]).train()


row(
    "fewer responses than prompts",
    "ValueError: prompts, responses: got 2 and 1, expected one response to each prompt",
    lambda shop: score_responses(shop.reward_model(), WORLD.tokenizer(), ["help", "me"], ["you"]),
)


def sft(shop, data, **parts):
    """A trainer of supervised fine-tuning."""
    arguments = TrainingArguments(output_dir=str(shop.fresh), use_cpu=True, report_to="none")
    return SFTTrainer(shop.policy(), arguments, data, WORLD.tokenizer(), **parts)


row(
    "a text among pairs",
    "TypeError: records: one is of type str ('help'), expected a dict; read them with load_sft",
    lambda shop: PairCollator(WORLD.tokenizer())([PAIR, "help"]),
)
row(
    "texts for `SFTTrainer`",
    "TypeError: train_dataset: record 0 is of type str, expected a dict",
    lambda shop: sft(shop, ["help"]),
)
row(
    "the path of a file for `SFTTrainer`",
    "TypeError: train_dataset: got str, …read the file: mossrlhf.data.load_sft('sft.jsonl')",
    lambda shop: sft(shop, "sft.jsonl"),
)
row(
    "a dict of splits for `SFTTrainer`",
    "TypeError: train_dataset: got dict, …pick one of its parts, of ['train']: dataset['train']",
    lambda shop: sft(shop, {"train": [{"text": "help"}]}),
)
row(
    "no examples for `SFTTrainer`",
    "ValueError: train_dataset: it is empty, expected at least one record",
    lambda shop: sft(shop, []),
)
row(
    "an answer that is a number",
    "ValueError: records: response is a int (3), expected a string",
    lambda shop: SFTCollator(WORLD.tokenizer())([{"prompt": "help", "response": 3}]),
)
row(
    "no room for a prompt and a response",
    "ValueError: PairCollator(max_length=): got 1, expected a number in [2, inf]",
    lambda shop: PairCollator(WORLD.tokenizer(), max_length=1),
)
row(
    "a token budget of 0",
    "ValueError: TokenBatches(max_tokens=): got 0, expected a number in [1, inf]",
    lambda shop: TokenBatches(max_tokens=0),
)
