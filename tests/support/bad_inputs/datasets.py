"""What is no dataset for a trainer."""

import pandas as pd
import torch
from datasets import Dataset, DatasetDict

from bad_inputs.room import Room
from mossrlhf import PPOMaxLoss

room = Room("Datasets of a trainer")
row = room.row
HELP = {"prompt": "help"}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([HELP])


def dataset(given, gets, data, name="train_dataset"):
    """A row on a dataset that is refused before any model is loaded."""
    row(given, gets, lambda shop: shop.trainer(model="no/such/model", **{name: data}))


dataset("an empty list", "ValueError: train_dataset: it is empty, expected at least one", [])
dataset(
    "a list of texts",
    "TypeError: train_dataset: record 0 is of type str, expected a dict; write [{'prompt': text} "
    "for text in texts]",
    ["help"],
)
dataset(
    "a text among records",
    "TypeError: train_dataset: record 1 is of type str, expected a dict",
    [HELP, "me"],
)
dataset(
    "the path of a file",
    "TypeError: train_dataset: got str, expected a sequence of records (dicts); read the file: "
    "mossrlhf.data.load_prompts('prompts.jsonl')",
    "prompts.jsonl",
)
dataset(
    "a dict of splits",
    "TypeError: train_dataset: got DatasetDict, expected a sequence of records (dicts); pick one "
    "of its parts, of ['train']: dataset['train']",
    DatasetDict(train=Dataset.from_list([HELP])),
)
dataset(
    "a data frame",
    "TypeError: train_dataset: got DataFrame, …write frame.to_dict('records')",
    pd.DataFrame([HELP]),
)
dataset(
    "a generator",
    "TypeError: train_dataset: got generator, …it has no length and no index, so read it first: "
    "list(dataset)",
    (record for record in [HELP]),
)
dataset(
    "an iterable dataset",
    "TypeError: train_dataset: got Stream, …it has no length and no index",
    Stream(),
)
dataset(
    "None",
    "TypeError: train_dataset: got NoneType, expected a sequence of records",
    None,
)
dataset(
    "records without a prompt",
    "ValueError: train_dataset: record 0 has the columns ['text'], expected one called 'prompt'",
    [{"text": "help"}],
)
dataset(
    "one record without a prompt, far down",
    "ValueError: train_dataset: record 500 has the columns ['text'], expected one called 'prompt'",
    [*[HELP] * 500, {"text": "help"}],
)
dataset(
    "a column that rewards get from the trainer",
    "ValueError: train_dataset: record 0 has a column called 'completions', but prompts, "
    "completions, completion_ids are what reward functions get from the trainer",
    [{**HELP, "completions": "a"}],
)
dataset(
    "a prompt that is None",
    "ValueError: train_dataset: record 0 has the prompt None, expected a string, or a list of",
    [{"prompt": None}],
)
dataset(
    "a prompt of token ids",
    "ValueError: train_dataset: record 0 has the message 5, expected {'role': 'user', 'content'",
    [{"prompt": [5, 6]}],
)
dataset(
    "a message without a role",
    "ValueError: train_dataset: record 0 has the message {'content': 'a'}, expected {'role': 'u",
    [{"prompt": [{"content": "a"}]}],
)
dataset(
    "a role of another format",
    "ValueError: train_dataset: record 0 has a message of 'human', which chat templates do not "
    "know; write 'role': 'user'",
    [{"prompt": [{"role": "human", "content": "a"}]}],
)
dataset(
    "a prompt that ends with a response",
    "ValueError: train_dataset: record 0 ends with the assistant's 'b', expected a user turn last",
    [{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
)
dataset(
    "an `eval_dataset` of texts",
    "TypeError: eval_dataset: record 0 is of type str, expected a dict",
    ["help"],
    "eval_dataset",
)
row(
    "messages, where the tokenizer has no chat template",
    "ValueError: train_dataset: tokenizer: has no chat_template, which messages need; call "
    "set_dialogue_template(tokenizer, 'en') or 'zh', or pass strings as prompts",
    lambda shop: plain(shop, train_dataset=[{"prompt": [{"role": "user", "content": "help"}]}]),
)


def plain(shop, **parts):
    """A trainer whose tokenizer has no chat template."""
    from bad_inputs.shop import WORLD

    tokenizer = WORLD.tokenizer()
    tokenizer.chat_template = None
    return shop.trainer(processing_class=tokenizer, **parts).collect()


row(
    "a prompt longer than the model's context",
    "ValueError: train_dataset: 1 of its longest prompts do not fit; that of record 0 takes 300 "
    "tokens with nothing left to drop, expected at most 252",
    lambda shop: shop.trainer(train_dataset=[{"prompt": "help " * 300}]),
)
row(
    "a prompt that has no tokens",
    "ValueError: records: the prompt '  ' has no tokens, expected at least one",
    lambda shop: shop.trainer(train_dataset=[{"prompt": "  "}]).collect(),
)
row(
    "pre-training data without a coefficient for it",
    "ValueError: ptx_dataset: got one, but PPOMaxLoss(ptx_coef=None) ignores it",
    lambda shop: shop.trainer(ptx_dataset=[{"text": "help"}]),
)
row(
    "a coefficient without pre-training data",
    "ValueError: PPOMaxLoss(ptx_coef=0.1): there is no pre-training data; pass Trainer(ptx_datas",
    lambda shop: shop.trainer(loss=PPOMaxLoss(ptx_coef=0.1)),
)
row(
    "pre-training data of another format",
    "ValueError: records: text missing among ['words']; read them with load_sft",
    lambda shop: shop.trainer(loss=PPOMaxLoss(ptx_coef=0.1), ptx_dataset=[{"words": "help"}]),
)
row(
    "`evaluate` without anything to evaluate on",
    "ValueError: eval_dataset: there is none, or fewer records than processes",
    lambda shop: shop.trainer().evaluate(),
)
row(
    "`evaluate` on texts",
    "TypeError: eval_dataset: record 0 is of type str, expected a dict",
    lambda shop: shop.trainer().evaluate(["help"]),
)
