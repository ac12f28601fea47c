"""Formats: what each raw record becomes, and which records are refused."""

import json

import pytest

from mossrlhf.data import (
    DataError,
    formats,
    load_pairs,
    load_prompts,
    load_sft,
    stream_pairs,
)

SHORT = "\n\nHuman: Hi\n\nAssistant:"
SKIP = "; skip_bad=True skips such records"


def refused(load, source):
    with pytest.raises(DataError) as error:
        load(source)
    return str(error.value)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_hh_prompt_is_all_up_to_the_last_user_turn():
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Help me\n\nAssistant:"
    record = {"chosen": shared + " Gladly. \n", "rejected": shared + " No"}
    assert load_pairs([record]) == [
        {
            "prompt": [user("Hi"), assistant("Hello"), user("Help me")],
            "chosen": "Gladly.",
            "rejected": "No",
        }
    ]


def test_hh_prompt_ends_where_the_dialogues_differ():
    record = {
        "chosen": f"{SHORT} Yes?\n\nHuman: Help\n\nAssistant: Sure",
        "rejected": f"{SHORT} What",
    }
    assert load_pairs([record]) == [
        {
            "prompt": [user("Hi")],
            "chosen": "Yes?\n\nHuman: Help\n\nAssistant: Sure",
            "rejected": "What",
        }
    ]


def test_hh_prompt_ends_before_a_differing_user_turn():
    record = {
        "chosen": f"{SHORT} Yes?\n\nHuman: A\n\nAssistant: a",
        "rejected": f"{SHORT} Yes?\n\nHuman: B\n\nAssistant: b",
    }
    (pair,) = load_pairs([record])
    assert pair["prompt"] == [user("Hi")]
    assert pair["chosen"] == "Yes?\n\nHuman: A\n\nAssistant: a"


def test_hh_joins_consecutive_turns_of_a_speaker():
    record = {"chosen": f"{SHORT} One\n\nAssistant:  two", "rejected": f"{SHORT} Three"}
    assert load_pairs([record])[0]["chosen"] == "One\n\ntwo"


def test_hh_speaker_names_inside_a_line_are_text():
    record = {"chosen": f"{SHORT} Human: yes", "rejected": f"{SHORT} no"}
    assert load_pairs([record])[0]["chosen"] == "Human: yes"


def test_sharegpt_pairs():
    record = {
        "conversations": [
            {"from": "system", "value": "Be kind"},
            {"from": "human", "value": "Hi"},
        ],
        "chosen": {"from": "gpt", "value": "Hello"},
        "rejected": {"from": "gpt", "value": "Go"},
        "id": 7,
    }
    prompt = [system("Be kind"), user("Hi")]
    pair = {"prompt": prompt, "chosen": "Hello", "rejected": "Go", "id": 7}
    assert load_pairs([record]) == [pair]
    assert load_prompts([record]) == [{"prompt": prompt, "id": 7}]
    assert load_sft([record])[0]["response"] == "Hello"
    record["conversations"] = record["conversations"][1:]
    assert load_pairs([{**record, "system": "Be kind"}]) == [pair]


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_sharegpt_splits_off_the_last_assistant_turn(key):
    record = {key: [user("Hi"), assistant("Yes?"), user("Help"), assistant("Sure")]}
    prompt = [user("Hi"), assistant("Yes?"), user("Help")]
    assert load_sft([record]) == [{"prompt": prompt, "response": "Sure"}]
    assert load_prompts([record]) == [{"prompt": prompt}]
    assert load_prompts([{key: prompt}]) == [{"prompt": prompt}]


def test_alpaca_joins_instruction_and_input():
    record = {"instruction": "Add.", "input": "1 1", "output": "2", "source": "hand"}
    expected = {"prompt": [user("Add.\n1 1")], "response": "2", "source": "hand"}
    assert load_sft([record]) == [expected]
    assert load_sft([{**record, "input": ""}])[0]["prompt"] == [user("Add.")]
    past = {**record, "system": "Be exact", "history": [["Hi", "Hello"]]}
    turns = [system("Be exact"), user("Hi"), assistant("Hello"), user("Add.\n1 1")]
    assert load_prompts([past]) == [{"prompt": turns, "source": "hand"}]


def test_standard_keeps_strings_unchanged():
    pair = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "level": 1}
    assert load_pairs([pair]) == [pair]
    assert load_prompts([pair]) == [{"prompt": "2 + 2 =", "level": 1}]
    with pytest.raises(DataError, match="identical"):
        load_pairs([{**pair, "rejected": "4 "}])
    assert load_sft([{"prompt": "1 +", "completion": " 1"}]) == [
        {"prompt": "1 +", "response": " 1"}
    ]
    assert load_sft([{"prompt": "1 +", "response": " 1"}])[0]["response"] == " 1"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [user("Hi")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
        {"prompt": "Hi", "chosen": [assistant("A")], "rejected": [assistant("B")]},
        {"prompt": [user("Hi")], "chosen": "A", "rejected": "B"},
        {"chosen": [user("Hi"), assistant("A")], "rejected": [user("Hi"), assistant("B")]},
        {
            "prompt": "Hi",
            "chosen": [user("Hi"), assistant("A")],
            "rejected": [user("Hi"), assistant("B")],
        },
        {"chosen": ["Hi", "A"], "rejected": ["Hi", "B"]},
    ],
)
def test_pairs_of_messages_become_prompt_and_texts(record):
    before = json.dumps(record)
    assert load_pairs([record]) == [{"prompt": [user("Hi")], "chosen": "A", "rejected": "B"}]
    assert json.dumps(record) == before


def test_hh_strings_override_the_prompt_column():
    prompt = "\n\nHuman: hi\n\nAssistant:"
    record = {"chosen": f"{prompt} hello", "rejected": f"{prompt} go away"}
    expected = {"prompt": [user("hi")], "chosen": "hello", "rejected": "go away"}
    for given in (record, {"prompt": prompt, **record}, {"prompt": [user("hi")], **record}):
        assert load_pairs([given]) == [expected]
    [alone] = load_pairs([{"prompt": prompt, "chosen": " hello", "rejected": " go away"}])
    assert alone["prompt"] == prompt


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [user("hi")], "chosen": "hello", "rejected": "no"},
        {"chosen": [user("hi"), assistant("hello")], "rejected": [user("hi"), assistant("no")]},
    ],
)
def test_system_column_becomes_the_first_message(record):
    kind = system("Be kind.")
    [read] = load_pairs([{"system": "Be kind.", **record}])
    assert read == {"prompt": [kind, user("hi")], "chosen": "hello", "rejected": "no"}
    [known] = load_prompts([{"system": "Another.", "prompt": [kind, user("hi")]}])
    assert known == {"prompt": [kind, user("hi")], "system": "Another."}
    [string] = load_prompts([{"system": "Be kind.", "prompt": "hi"}])
    assert string == {"prompt": "hi", "system": "Be kind."}
    with pytest.raises(DataError, match="system is 3"):
        load_pairs([{"system": 3, **record}])


def test_moss_prompts_end_with_the_user():
    assert load_prompts([["Hi", "Yes?", "Help"]]) == [
        {"prompt": [user("Hi"), assistant("Yes?"), user("Help")]}
    ]


def test_moss_prompts_that_start_with_the_assistant_warn():
    dialogues = [["Hi", "Yes?"], ["Hi"], ["Hi", "Yes?", "Help", "Sure"]]
    with pytest.warns(
        UserWarning, match="2 of 3 dialogues start .* format=moss_dialogues"
    ) as caught:
        records = load_prompts(dialogues)
    assert len(caught) == 1
    assert records[0]["prompt"] == [assistant("Hi"), user("Yes?")]


def test_moss_formats_passed_explicitly_do_not_warn():
    dialogues = [["Hi", "Yes?"], ["Hi"]]
    records = load_prompts(dialogues, format=formats.moss_dialogues)
    assert records == [{"prompt": [user("Hi")]}, {"prompt": [user("Hi")]}]
    records = load_prompts(dialogues, format=formats.moss_prompts)
    assert records[0]["prompt"] == [assistant("Hi"), user("Yes?")]


def test_moss_sft_begins_with_the_user():
    records = load_sft([["Hi", "Yes?", "Help", "Sure"]])
    prompt = [user("Hi"), assistant("Yes?"), user("Help")]
    assert records == [{"prompt": prompt, "response": "Sure"}]


def test_plain_text_is_an_example():
    assert load_sft([{"text": "Once.", "url": "u"}]) == [{"text": "Once.", "url": "u"}]


def test_any_function_is_a_format():
    assert load_prompts([{"q": "Hi"}], format=lambda record: {"prompt": record["q"]}) == [
        {"prompt": "Hi"}
    ]
    with pytest.raises(DataError, match=r"records\[1\].*KeyError\('q'\)"):
        load_prompts([{"q": "Hi"}, {}], format=lambda record: {"prompt": record["q"]})


HH = {"chosen": f"{SHORT} A", "rejected": f"{SHORT} B"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (HH | {"rejected": HH["chosen"]}, "identical"),
        (HH | {"chosen": f"{SHORT} "}, "chosen is ''"),
        (HH | {"chosen": None}, "chosen is None"),
        (HH | {"chosen": "Hi"}, "opens with"),
        (HH | {"chosen": f"Hi{SHORT} A"}, "opens with"),
        (HH | {"chosen": "\n\nHuman: Ho\n\nAssistant: A"}, "share no user turn"),
        ({"chosen": "\n\nAssistant: A", "rejected": "\n\nAssistant: B"}, "share no user turn"),
        ({"prompt": "Hi"}, "not in the format hh_strings"),
        ([1, 2], "not in the format hh_strings"),
    ],
)
def test_bad_pairs_name_line_and_reason(tmp_path, bad, reason):
    path = lines(tmp_path / "pairs.jsonl", HH, bad, HH)
    if not isinstance(bad, dict) or "rejected" not in bad:
        reason = f"{reason}|chosen is None"
    with pytest.raises(DataError, match=rf"pairs\.jsonl:2: .*({reason}).*skip_bad=True"):
        load_pairs(path)
    with pytest.warns(UserWarning, match=r"skipped 1 of 3 records; the first: .*jsonl:2: "):
        assert len(load_pairs(path, skip_bad=True)) == 2


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": []}, "expected a list of messages"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": [user(" ")]}, "user turn is empty"),
        ({"prompt": [system("Be kind")]}, "ends with a turn of the system, expected the user"),
        ({"prompt": [user("Hi"), assistant("Yes?")]}, "ends with a turn of the assistant"),
        ({"prompt": [{"role": "tool", "content": "1"}]}, "by 'tool'"),
        ({"prompt": [{"role": "user", "content": [1]}]}, "expected a string"),
        ({"prompt": ["Hi"]}, "expected a message"),
        ({"question": "Hi"}, "expected a prompt"),
    ],
)
def test_bad_prompts_name_record_and_reason(tmp_path, bad, reason):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": "Hi"}, bad]), encoding="utf-8")
    with pytest.raises(DataError, match=rf"prompts\.json: record 1: .*{reason}"):
        load_prompts(path)


def test_dialogues_without_a_user_turn_are_refused(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"conversations": [{"from": "gpt", "value": "Hi"}]})
    with pytest.raises(
        DataError,
        match=r"a\.jsonl:1: the prompt has no user turn, so there is nothing to respond to",
    ):
        load_prompts(path)


def test_responses_of_several_turns_are_refused():
    turns = [user("Hi"), assistant("A"), user("Help"), assistant("a")]
    with pytest.raises(DataError, match="3 turns follow"):
        load_pairs([{"chosen": turns, "rejected": [user("Hi"), assistant("B")]}])


def test_empty_utterances_are_refused():
    with pytest.raises(DataError, match=r"records\[0\]: utterance 1 is ''"):
        load_prompts([["Hi", "", "Help"]])


def test_moss_sft_without_a_response_is_refused():
    with pytest.raises(DataError, match=r"records\[1\]: got keys \['prompt'\], expected response"):
        load_sft([["Hi", "Yes?"], ["Hi", "Yes?", "Help"]])


def test_records_without_the_requested_response_are_refused():
    with pytest.raises(DataError, match=r"got keys \['prompt', 'response'\], expected chosen"):
        load_pairs([{"prompt": "a", "response": "b"}])
    with pytest.raises(DataError, match=r"got keys \['text'\], expected a prompt"):
        load_prompts([{"text": "a"}])
    with pytest.raises(DataError, match=r"text is ''"):
        load_sft([{"text": ""}])


def test_unknown_formats_are_refused():
    with pytest.raises(DataError, match=r"records\[0\]: got keys \['q'\], expected .*format="):
        load_prompts([{"q": "Hi"}])
    with pytest.raises(DataError, match=r"records\[0\]: got 3, expected"):
        load_prompts([3])


@pytest.mark.parametrize("load", [load_pairs, stream_pairs])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"chosen": "", "rejected": ""}, "chosen is '', expected a non-empty string"),
        ({"chosen": "b", "rejected": " "}, "rejected is ' ', expected a non-empty string"),
        ({"chosen": "b", "rejected": "b\n"},
         "chosen and rejected are identical, expected a preference"),
        ({"chosen": "b"}, "rejected is missing, expected a response: a string, or messages"),
        ({"rejected": "b"}, "chosen is missing, expected a response: a string, or messages"),
        ({"chosen": "b", "rejected": None},
         "rejected is None, expected a response: a string, or messages"),
        ({"chosen": None, "rejected": None},
         "chosen is None, expected a response: a string, or messages"),
        ({}, "got keys ['prompt'], expected chosen"),
        ({"chosen": "b", "rejected": "c", "prompt": None},
         "got 'b', expected a dialogue that opens with '\\n\\nHuman:'"),
    ],
)  # fmt: skip
def test_incomplete_pairs_are_refused(tmp_path, load, bad, reason):
    path = tmp_path / "a.jsonl"
    if "prompt" in bad:
        reason = "got keys ['chosen', 'prompt', 'rejected'], expected a prompt that is not null"
    path.write_text(json.dumps({"prompt": "a", **bad}))
    assert refused(load, path) == f"{path}:1: {reason}{SKIP}"


def test_missing_responses_are_refused():
    assert refused(load_sft, [{"prompt": "a", "response": None}]) == (
        f"records[0]: response is None, expected a non-empty string{SKIP}"
    )
    assert (
        refused(load_sft, [{"prompt": "a"}])
        == f"records[0]: got keys ['prompt'], expected response{SKIP}"
    )
    assert refused(load_pairs, [{"chosen": SHORT + " A", "rejected": None}]) == (
        f"records[0]: rejected is None, expected a string{SKIP}"
    )


def test_pathological_records_in_memory_raise_data_error():
    deep = {"prompt": "a"}
    for _ in range(10**4):
        deep = [deep]
    within = ["Hi"]
    within.append(within)
    for bad in (deep, within, {1: 2, "a": 3}, {"prompt": 10**5000}, {"prompt": [{"role": []}]}):
        for load in (load_prompts, load_pairs, load_sft):
            assert refused(load, [bad]).startswith("records[0]: ")
    assert refused(load_prompts, [{"prompt": 10**5000}]).startswith("records[0]: a dict is not in")
