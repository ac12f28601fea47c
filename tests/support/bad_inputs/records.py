"""Records that cannot be read, or are of no use."""

from bad_inputs.room import Room
from mossrlhf.data import load_pairs, load_prompts, load_sft, stream_prompts

room = Room("Records")
row = room.row
HI = {"role": "user", "content": "Hi"}


def exhausted():
    records = iter([{"prompt": "a"}])
    list(records)
    return records


row(
    "one bad line of three, with `skip_bad=True`",
    "warning: skipped 1 of 3 records; the first: …a.jsonl:2: ",
    lambda shop: load_prompts(
        shop.file("a.jsonl", '{"prompt": "a"}\n{"prompt": \n{"prompt": "c"}\n'), skip_bad=True
    ),
)
row(
    "the same by `stream_prompts`",
    "warning: skipped 1 of 3 records; the first: …a.jsonl:2: ",
    lambda shop: stream_prompts(
        shop.file("a.jsonl", '{"prompt": "a"}\n{"prompt": \n{"prompt": "c"}\n'), skip_bad=True
    ),
)
row(
    "nothing but bad records, with `skip_bad=True`",
    "DataError: …a.jsonl:1: the prompt is empty",
    lambda shop: load_prompts(shop.file("a.jsonl", [{"prompt": ""}] * 2), skip_bad=True),
)
row(
    "a dict of splits, or one record, for records",
    "TypeError: source: got a dict with keys ['prompt'], expected a path, a hub name or records; "
    "pick one of its splits, or wrap a record in a list",
    lambda shop: load_prompts({"prompt": "a"}),
)
row(
    "a generator that is used up",
    "DataError: records: empty, expected at least one record",
    lambda shop: load_prompts(exhausted()),
)
row(
    "numbers for records",
    "DataError: records[0]: got 1, expected ",
    lambda shop: load_prompts([1, 2]),
)
row(
    "texts for records",
    "DataError: records[0]: got 'Hi', expected prompt, chosen and rejected, conversations",
    lambda shop: load_prompts(["Hi"]),
)
row(
    "records of no known format",
    "DataError: records[0]: got keys ['answer', 'question'], expected prompt, chosen and rejected, "
    "…for another format pass format=",
    lambda shop: load_prompts([{"question": "a", "answer": "b"}]),
)
row(
    "records of two formats, mixed",
    "DataError: records[1]: got keys ['instruction'], expected a prompt; skip_bad=True skips such "
    "records",
    lambda shop: load_prompts([{"prompt": "a"}, {"instruction": "b"}]),
)
row(
    "an empty prompt",
    "DataError: records[0]: the prompt is empty",
    lambda shop: load_prompts([{"prompt": " "}]),
)
row(
    "a prompt that is a number",
    "DataError: records[0]: got 5, expected a list of messages",
    lambda shop: load_prompts([{"prompt": 5}]),
)
row(
    "a prompt of token ids",
    "DataError: records[0]: turn 0 is 5, expected a message with role, content",
    lambda shop: load_prompts([{"prompt": [5, 6]}]),
)
row(
    "a message without a role",
    "DataError: records[0]: turn 0 is by None, expected one of system, human, user, gpt, assistant",
    lambda shop: load_prompts([{"prompt": [{"content": "Hi"}]}]),
)
row(
    "a message by an unknown role",
    "DataError: records[0]: turn 0 is by 'bot', expected one of system, human, user, gpt",
    lambda shop: load_prompts([{"messages": [{"role": "bot", "content": "Hi"}]}]),
)
row(
    "a message whose content is a list of parts",
    "DataError: records[0]: turn 0 has content [{'type': 'text', …expected a string",
    lambda shop: load_prompts(
        [{"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}]
    ),
)
row(
    "a dialogue without a user turn",
    "DataError: records[0]: the prompt ends with a turn of the system, expected the user",
    lambda shop: load_prompts([{"prompt": [{"role": "system", "content": "Be kind"}]}]),
)
row(
    "a list of utterances with an empty one",
    "DataError: records[0]: utterance 1 is '', expected a non-empty string",
    lambda shop: load_prompts([["Hi", "", "Yes"]]),
)
row(
    "a pair without the rejected response",
    "DataError: records[0]: rejected is missing, expected a response: a string, or messages",
    lambda shop: load_pairs([{"prompt": "a", "chosen": "b"}]),
)
row(
    "a pair whose response is null",
    "DataError: …a.jsonl:1: chosen is None, expected a response: a string, or messages",
    lambda shop: load_pairs(
        shop.file("a.jsonl", [{"prompt": "a", "chosen": None, "rejected": "c"}])
    ),
)
row(
    "a pair of equal responses",
    "DataError: records[0]: chosen and rejected are identical, expected a preference",
    lambda shop: load_pairs([{"prompt": "a", "chosen": "b", "rejected": "b\n"}]),
)
row(
    "a pair of dialogues that share no user turn",
    "DataError: records[0]: chosen and rejected share no user turn, expected one prompt for both",
    lambda shop: load_pairs([{"chosen": [HI], "rejected": [{"role": "user", "content": "Yo"}]}]),
)
row(
    "an HH-RLHF string that opens with no speaker",
    "DataError: records[0]: got 'Hi', expected a dialogue that opens with '\\n\\nHuman:'",
    lambda shop: load_pairs([{"chosen": "Hi", "rejected": "Yo"}]),
)
row(
    "an SFT example without a response",
    "DataError: records[0]: got keys ['prompt'], expected response",
    lambda shop: load_sft([{"prompt": "a"}]),
)
row(
    "a document whose text is null",
    "DataError: records[0]: text is None, expected a string",
    lambda shop: load_sft([{"text": None}]),
)
row(
    "a `format=` that returns no dict",
    "DataError: records[0]: …is not in the format <lambda>: …",
    lambda shop: load_prompts([{"q": "a"}], format=lambda record: None),
)
row(
    "a `format=` that raises",
    "DataError: records[0]: {'q': 'a'} is not in the format <lambda>: KeyError('question')",
    lambda shop: load_prompts([{"q": "a"}], format=lambda record: {"prompt": record["question"]}),
)
row(
    "the name of a format for `format=`",
    "TypeError: format: got 'alpaca', expected a function from a record to a dict, such as "
    "mossrlhf.data.formats.alpaca",
    lambda shop: load_prompts([{"instruction": "a"}], format="alpaca"),
)
