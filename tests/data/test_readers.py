import json
import sys
import types

import pytest

from mossrlhf.data import DataError, formats, load_pairs, load_prompts, load_sft

SHORT = "\n\nHuman: Hi\n\nAssistant:"


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# --- formats -------------------------------------------------------------------------------


def test_hh_prompt_is_all_up_to_the_last_human_turn():
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Help me\n\nAssistant:"
    record = {"chosen": shared + " Gladly. \n", "rejected": shared + " No"}
    assert load_pairs([record]) == [
        {
            "prompt": [user("Hi"), assistant("Hello"), user("Help me")],
            "chosen": "Gladly.",
            "rejected": "No",
        }
    ]


def test_hh_dialogues_that_part_early_share_only_what_they_share():
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


def test_hh_dialogues_that_part_at_a_human_turn_share_up_to_the_one_before():
    record = {
        "chosen": f"{SHORT} Yes?\n\nHuman: A\n\nAssistant: a",
        "rejected": f"{SHORT} Yes?\n\nHuman: B\n\nAssistant: b",
    }
    (pair,) = load_pairs([record])
    assert pair["prompt"] == [user("Hi")]
    assert pair["chosen"] == "Yes?\n\nHuman: A\n\nAssistant: a"


def test_hh_consecutive_turns_of_one_speaker_are_one():
    record = {"chosen": f"{SHORT} One\n\nAssistant:  two", "rejected": f"{SHORT} Three"}
    assert load_pairs([record])[0]["chosen"] == "One\n\ntwo"


def test_hh_speaker_names_inside_a_line_are_text():
    record = {"chosen": f"{SHORT} Human: yes", "rejected": f"{SHORT} no"}
    assert load_pairs([record])[0]["chosen"] == "Human: yes"


def test_sharegpt():
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
def test_a_dialogue_is_split_before_its_last_turn(key):
    record = {key: [user("Hi"), assistant("Yes?"), user("Help"), assistant("Sure")]}
    prompt = [user("Hi"), assistant("Yes?"), user("Help")]
    assert load_sft([record]) == [{"prompt": prompt, "response": "Sure"}]
    assert load_prompts([record]) == [{"prompt": prompt}]
    assert load_prompts([{key: prompt}]) == [{"prompt": prompt}]


def test_alpaca():
    record = {"instruction": "Add.", "input": "1 1", "output": "2", "source": "hand"}
    expected = {"prompt": [user("Add.\n1 1")], "response": "2", "source": "hand"}
    assert load_sft([record]) == [expected]
    assert load_sft([{**record, "input": ""}])[0]["prompt"] == [user("Add.")]
    past = {**record, "system": "Be exact", "history": [["Hi", "Hello"]]}
    turns = [system("Be exact"), user("Hi"), assistant("Hello"), user("Add.\n1 1")]
    assert load_prompts([past]) == [{"prompt": turns, "source": "hand"}]


def test_standard_strings_are_left_as_they_are():
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
def test_pairs_of_messages(record):
    before = json.dumps(record)
    assert load_pairs([record]) == [{"prompt": [user("Hi")], "chosen": "A", "rejected": "B"}]
    assert json.dumps(record) == before


def test_hh_strings_beside_a_prompt_carry_it_themselves():
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
def test_a_system_column_opens_messages(record):
    kind = system("Be kind.")
    [read] = load_pairs([{"system": "Be kind.", **record}])
    assert read == {"prompt": [kind, user("hi")], "chosen": "hello", "rejected": "no"}
    [known] = load_prompts([{"system": "Another.", "prompt": [kind, user("hi")]}])
    assert known == {"prompt": [kind, user("hi")], "system": "Another."}
    [string] = load_prompts([{"system": "Be kind.", "prompt": "hi"}])
    assert string == {"prompt": "hi", "system": "Be kind."}
    with pytest.raises(DataError, match="system is 3"):
        load_pairs([{"system": 3, **record}])


def test_moss_prompts_end_with_the_human():
    assert load_prompts([["Hi", "Yes?", "Help"]]) == [
        {"prompt": [user("Hi"), assistant("Yes?"), user("Help")]}
    ]


def test_moss_prompts_that_open_with_the_assistant_warn_and_say_what_to_pass():
    dialogues = [["Hi", "Yes?"], ["Hi"], ["Hi", "Yes?", "Help", "Sure"]]
    with pytest.warns(UserWarning, match="2 of 3 dialogues .* format=moss_dialogues") as caught:
        records = load_prompts(dialogues)
    assert len(caught) == 1
    assert records[0]["prompt"] == [assistant("Hi"), user("Yes?")]


def test_moss_formats_asked_for_by_name_do_not_warn():
    dialogues = [["Hi", "Yes?"], ["Hi"]]
    records = load_prompts(dialogues, format=formats.moss_dialogues)
    assert records == [{"prompt": [user("Hi")]}, {"prompt": [user("Hi")]}]
    records = load_prompts(dialogues, format=formats.moss_prompts)
    assert records[0]["prompt"] == [assistant("Hi"), user("Yes?")]


def test_moss_sft_begins_with_the_human():
    records = load_sft([["Hi", "Yes?", "Help", "Sure"]])
    prompt = [user("Hi"), assistant("Yes?"), user("Help")]
    assert records == [{"prompt": prompt, "response": "Sure"}]


def test_documents_are_examples():
    assert load_sft([{"text": "Once.", "url": "u"}]) == [{"text": "Once.", "url": "u"}]


def test_a_function_is_a_format():
    assert load_prompts([{"q": "Hi"}], format=lambda record: {"prompt": record["q"]}) == [
        {"prompt": "Hi"}
    ]
    with pytest.raises(DataError, match=r"records\[1\].*KeyError\('q'\)"):
        load_prompts([{"q": "Hi"}, {}], format=lambda record: {"prompt": record["q"]})


# --- files ---------------------------------------------------------------------------------


def test_json_and_json_lines_read_alike(tmp_path):
    records = [{"prompt": "a"}, {"prompt": "b"}]
    array = tmp_path / "a.json"
    array.write_text(json.dumps(records, indent=1), encoding="utf-8")
    assert load_prompts(array) == load_prompts(str(array)) == records
    assert load_prompts(lines(tmp_path / "b.jsonl", *records)) == records
    assert load_prompts(lines(tmp_path / "c.json", *records)) == records
    assert len(load_prompts(lines(tmp_path / "d.jsonl", ["a"], ["b", "c", "d"]))) == 2


def test_byte_order_mark_windows_lines_and_unicode_line_separators(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n\r\n{"prompt": "c\x85d"}\r\n'.encode())
    assert load_prompts(path) == [{"prompt": "a\u2028b"}, {"prompt": "c\x85d"}]


HH = {"chosen": f"{SHORT} A", "rejected": f"{SHORT} B"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (HH | {"rejected": HH["chosen"]}, "identical"),
        (HH | {"chosen": f"{SHORT} "}, "chosen is ''"),
        (HH | {"chosen": None}, "chosen is None"),
        (HH | {"chosen": "Hi"}, "opens with"),
        (HH | {"chosen": f"Hi{SHORT} A"}, "opens with"),
        (HH | {"chosen": "\n\nHuman: Ho\n\nAssistant: A"}, "share no human turn"),
        ({"chosen": "\n\nAssistant: A", "rejected": "\n\nAssistant: B"}, "share no human turn"),
        ({"prompt": "Hi"}, "not in the format hh_strings"),
        ([1, 2], "not in the format hh_strings"),
    ],
)
def test_bad_pairs_say_where_and_why(tmp_path, bad, reason):
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
        ({"prompt": [user(" ")]}, "human turn is empty"),
        ({"prompt": [system("Be kind")]}, "ends with the system's turn, expected the user's"),
        ({"prompt": [user("Hi"), assistant("Yes?")]}, "ends with the assistant's turn"),
        ({"prompt": [{"role": "tool", "content": "1"}]}, "by 'tool'"),
        ({"prompt": [{"role": "user", "content": [1]}]}, "expected a string"),
        ({"prompt": ["Hi"]}, "expected a message"),
        ({"question": "Hi"}, "expected a prompt"),
    ],
)
def test_bad_prompts_say_where_and_why(tmp_path, bad, reason):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": "Hi"}, bad]), encoding="utf-8")
    with pytest.raises(DataError, match=rf"prompts\.json: record 1: .*{reason}"):
        load_prompts(path)


def test_a_dialogue_without_a_human_turn_is_named(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"conversations": [{"from": "gpt", "value": "Hi"}]})
    with pytest.raises(DataError, match=r"a\.jsonl:1: there is no user turn, so nothing to answer"):
        load_prompts(path)


def test_answers_of_several_turns_are_refused():
    turns = [user("Hi"), assistant("A"), user("Help"), assistant("a")]
    with pytest.raises(DataError, match="3 turns follow"):
        load_pairs([{"chosen": turns, "rejected": [user("Hi"), assistant("B")]}])


def test_empty_utterances_are_refused():
    with pytest.raises(DataError, match=r"records\[0\]: utterance 1 is ''"):
        load_prompts([["Hi", "", "Help"]])


def test_moss_sft_without_a_response_is_refused():
    with pytest.raises(DataError, match=r"records\[1\]: no response"):
        load_sft([["Hi", "Yes?"], ["Hi", "Yes?", "Help"]])


def test_records_without_the_answer_asked_for_are_refused():
    with pytest.raises(DataError, match="no chosen in a record of prompt, response"):
        load_pairs([{"prompt": "a", "response": "b"}])
    with pytest.raises(DataError, match="no prompt in a record of text"):
        load_prompts([{"text": "a"}])
    with pytest.raises(DataError, match=r"text is ''"):
        load_sft([{"text": ""}])


def test_where_all_are_bad_skipping_does_not_hide_it():
    with pytest.raises(DataError, match=r"records\[0\]"):
        load_pairs([{"prompt": "a"}], skip_bad=True)


def test_unknown_formats_are_refused():
    with pytest.raises(DataError, match=r"records\[0\]: got keys \['q'\], expected .*format="):
        load_prompts([{"q": "Hi"}])
    with pytest.raises(DataError, match=r"records\[0\]: got 3, expected"):
        load_prompts([3])


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.json", b"", "a.json: empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: empty"),
        ("a.json", b"[]", "a.json: empty"),
        ("a.json", b'[{"prompt": "a"},]', "a.json: malformed JSON"),
        ("a.json", b'{\n"prompt": "a"\n}', "a.json:1: malformed JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', "a.jsonl:3: malformed JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "a.jsonl:2: not UTF-8 .byte 0xe9"),
        ("a.json", b'[{"prompt": "\xe9"}]', "a.json: not UTF-8 .byte 0xe9 at offset 13"),
        ("a.json", '{"prompt": "a"}'.encode("utf-16"), "a.json:1: not UTF-8"),
    ],
)
def test_broken_files_say_where_and_why(tmp_path, name, data, reason):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=reason):
        load_prompts(path)


def test_broken_lines_can_be_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": \n{"prompt": "\xe9"}\n{"prompt": "a"}\n')
    with pytest.warns(UserWarning, match="skipped 2 of 3"):
        assert load_prompts(path, skip_bad=True) == [{"prompt": "a"}]


def test_missing_files_and_wrong_sources():
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.json"):
        load_prompts("nowhere.json")
    with pytest.raises(TypeError, match="splits"):
        load_prompts({"train": [{"prompt": "a"}]})


def test_hub_datasets_are_read_lazily(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [{"prompt": "a"}, {"prompt": ""}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"some/prompts\[test\]\[1\]"):
        load_prompts("some/prompts", split="test")
    assert asked == [("some/prompts", "test")]


def test_without_datasets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'some/prompts' is no file.*pip install"):
        load_prompts("some/prompts")


# --- real data -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "name", "count"),
    [
        (load_prompts, "hh-rlhf/harmless-base.jsonl", 1900),
        (load_prompts, "llama-factory/dpo_en_demo.json", 250),
        (load_prompts, "llama-factory/alpaca_zh_demo.json", 1000),
        (load_pairs, "llama-factory/dpo_en_demo.json", 250),
        (load_pairs, "llama-factory/dpo_zh_demo.json", 250),
        (load_sft, "llama-factory/dpo_zh_demo.json", 250),
        (load_sft, "llama-factory/alpaca_en_demo.json", 999),
        (load_sft, "llama-factory/alpaca_zh_demo.json", 1000),
        (load_sft, "llama-factory/c4_demo.jsonl", 300),
    ],
)
def test_real_files_are_read_whole(shared, load, name, count):
    assert len(load(shared / "data" / name)) == count


def test_real_hh_pairs_say_what_the_file_says(shared):
    path = shared / "data" / "hh-rlhf" / "harmless-base.jsonl"
    with pytest.warns(UserWarning, match=r"skipped 4 of 1900 .*jsonl:1069: chosen is ''"):
        pairs = load_pairs(path, skip_bad=True)
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    empty = {1069, 1094, 1379, 1720}
    raw = [record for number, record in enumerate(raw, start=1) if number not in empty]
    for pair, record in zip(pairs, raw, strict=True):
        roles = [turn["role"] for turn in pair["prompt"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        for side in ("chosen", "rejected"):
            said = " ".join([turn["content"] for turn in pair["prompt"]] + [pair[side]])
            whole = record[side].replace("\n\nHuman:", " ").replace("\n\nAssistant:", " ")
            assert said.split() == whole.split()


@pytest.mark.parametrize("name", ["ppo_train.json", "ppo_valid.json"])
def test_real_moss_dialogues_open_with_the_human(shared, name):
    path = shared / "data" / "moss-rlhf" / name
    with pytest.warns(UserWarning, match="20 of 31 dialogues open with the assistant"):
        assert len(load_prompts(path)) == 31
    records = load_prompts(path, format=formats.moss_dialogues)
    assert len(records) == 31
    assert all(record["prompt"][0]["role"] == "user" for record in records)
    with pytest.warns(UserWarning, match="skipped 11 of 31"):
        assert len(load_sft(path, skip_bad=True)) == 20
