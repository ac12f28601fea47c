import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from mossrlhf.data import (
    dialogue_template,
    encode_prompt,
    encode_response,
    encode_text,
    load_pairs,
    set_dialogue_template,
)

DIALOGUE = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Hi there "},
    {"role": "user", "content": "how are you?"},
]
SYSTEM = {"role": "system", "content": "Be kind"}


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("language", "prompt", "answer"),
    [
        (
            "en",
            "Be kind</s>Human: Hi</s>Assistant: Hi there</s>Human: how are you?</s>Assistant:",
            " Sure.</s>",
        ),
        (
            "zh",
            "Be kind</s><|Human|>Hi</s><|MOSS|>Hi there</s><|Human|>how are you?</s><|MOSS|>",
            "Sure.</s>",
        ),
    ],
)
def test_templates_render_prompt_and_response(tokenizer, language, prompt, answer):
    set_dialogue_template(tokenizer, language)
    messages = [SYSTEM, *DIALOGUE]
    assert tokenizer.decode(encode_prompt(tokenizer, messages)) == prompt
    assert tokenizer.decode(encode_response(tokenizer, messages, "Sure.")) == answer
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "Sure."}], tokenize=False
    )
    assert whole == prompt + answer


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", ["tokenizer", "llama_tokenizer"])
def test_prompt_and_response_tokenize_as_the_whole_dialogue_does(request, kind, language):
    tokenizer = request.getfixturevalue(kind)
    set_dialogue_template(tokenizer, language)
    response = "Sure. 你好 there\nHi"
    ids = encode_prompt(tokenizer, DIALOGUE) + encode_response(tokenizer, DIALOGUE, response)
    turns = [*DIALOGUE, {"role": "assistant", "content": response}]
    assert ids == ids_of(tokenizer, tokenizer.apply_chat_template(turns, tokenize=False))
    assert ids.count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None)


def test_dialogue_starts_with_bos(llama_tokenizer):
    set_dialogue_template(llama_tokenizer, "en")
    assert encode_prompt(llama_tokenizer, DIALOGUE)[0] == llama_tokenizer.bos_token_id


def test_chinese_speakers_are_special_tokens_after_reloading(tokenizer, tmp_path):
    size = len(tokenizer)
    assert set_dialogue_template(tokenizer, "zh") == 2
    assert len(tokenizer) == size + 2
    assert set_dialogue_template(tokenizer, "zh") == 0
    tokenizer.save_pretrained(tmp_path)
    for same in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = encode_prompt(same, [{"role": "user", "content": "Hi"}])
        assert [same.decode([i]) for i in (ids[0], ids[-1])] == ["<|Human|>", "<|MOSS|>"]
        assert same.decode(ids, skip_special_tokens=True) == "Hi"


def test_english_adds_no_tokens(tokenizer):
    assert set_dialogue_template(tokenizer, "en") == 0


@pytest.mark.parametrize(
    ("language", "hint"), [("eng", "'en'"), ("EN", "'en'"), ("Chinese", "'zh'"), ("zh_CN", "'zh'")]
)
def test_unknown_languages_get_a_suggestion(language, hint):
    with pytest.raises(ValueError, match=f"got '{language}', expected .*did you mean {hint}"):
        dialogue_template(language)


def test_unrelated_languages_get_no_suggestion():
    with pytest.raises(ValueError, match=r"expected 'en' or 'zh'$"):
        dialogue_template("klingon")


def test_missing_chat_template_or_eos_is_refused(tokenizer):
    for encode in (encode_prompt, lambda *args: encode_response(*args, "Sure.")):
        with pytest.raises(ValueError, match=r"chat_template.*set_dialogue_template"):
            encode(tokenizer, DIALOGUE)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        set_dialogue_template(tokenizer, "en")
    assert tokenizer.chat_template is None
    for encode in (encode_text, lambda *args: encode_response(*args, "Sure.")):
        with pytest.raises(ValueError, match="no eos_token"):
            encode(tokenizer, "Hi")


# --- length --------------------------------------------------------------------------------


def test_long_dialogues_lose_their_oldest_exchanges(tokenizer):
    set_dialogue_template(tokenizer, "en")
    messages = [SYSTEM, *DIALOGUE]
    steps = [messages, [SYSTEM, *DIALOGUE[2:]], DIALOGUE[2:]]
    whole, short, shortest = (encode_prompt(tokenizer, step) for step in steps)
    assert len(whole) > len(short) > len(shortest)
    for limit, expected in [
        (len(whole), whole),
        (len(whole) - 1, short),
        (len(short), short),
        (len(short) - 1, shortest),
        (len(shortest), shortest),
    ]:
        assert encode_prompt(tokenizer, messages, max_length=limit) == expected
    assert messages == [SYSTEM, *DIALOGUE]


def test_the_last_user_turn_is_never_dropped(tokenizer):
    set_dialogue_template(tokenizer, "en")
    size = len(encode_prompt(tokenizer, DIALOGUE[2:]))
    with pytest.raises(ValueError, match=rf"last user turn alone takes {size} .*={size - 1}"):
        encode_prompt(tokenizer, DIALOGUE, max_length=size - 1)
    with pytest.raises(ValueError, match=r"a string takes \d+ tokens"):
        encode_prompt(tokenizer, "Hi there, how are you?", max_length=2)


# --- strings -------------------------------------------------------------------------------


def test_string_prompts_are_tokenized_unchanged(tokenizer):
    ids = encode_prompt(tokenizer, "Human: Hi\n") + encode_response(tokenizer, "Human: Hi\n", " A")
    assert tokenizer.decode(ids) == "Human: Hi\n A</s>"
    assert encode_prompt(tokenizer, "Human: Hi\n") == ids_of(tokenizer, "Human: Hi\n")


def test_response_tokens_do_not_merge_into_the_prompt(tokenizer):
    prompt, response = "Hi th", "ere"
    assert len(ids_of(tokenizer, "Hi there")) < len(ids_of(tokenizer, prompt)) + 1
    assert encode_prompt(tokenizer, prompt) == ids_of(tokenizer, prompt)
    expected = [*ids_of(tokenizer, response), tokenizer.eos_token_id]
    assert encode_response(tokenizer, prompt, response) == expected


def test_string_prompts_get_no_bos_unless_the_tokenizer_adds_it(tokenizer):
    tokenizer.bos_token = "<unk>"
    assert encode_prompt(tokenizer, "Hi there") == ids_of(tokenizer, "Hi there")


def test_string_prompts_start_with_one_bos_without_eos(llama_tokenizer):
    bos, eos = llama_tokenizer.bos_token_id, llama_tokenizer.eos_token_id
    plain = ids_of(llama_tokenizer, "Hi there")
    assert encode_prompt(llama_tokenizer, "Hi there") == [bos, *plain]
    assert encode_prompt(llama_tokenizer, "<s>Hi there").count(bos) == 1
    llama_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    assert encode_prompt(llama_tokenizer, "Hi there") == [bos, *plain]
    assert encode_text(llama_tokenizer, "Hi there") == [bos, *plain, eos]


# --- responses -----------------------------------------------------------------------------


@pytest.mark.parametrize("response", ["Sure.", "Sure.</s>", "Sure.</s></s>", "Sure.</s>Human: Hi"])
@pytest.mark.parametrize("prompt", ["Human: Hi\n", DIALOGUE])
def test_response_ends_with_one_eos(tokenizer, prompt, response):
    set_dialogue_template(tokenizer, "en")
    assert encode_response(tokenizer, prompt, response) == encode_response(
        tokenizer, prompt, "Sure."
    )
    ids = encode_response(tokenizer, prompt, response)
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1


def test_response_excludes_what_the_template_writes_after_eos(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    ids = encode_response(tokenizer, DIALOGUE, "Sure.")
    assert tokenizer.decode(ids) == "Sure.</s>"


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    )
    with pytest.raises(ValueError, match="unknown where the response begins"):
        encode_response(tokenizer, DIALOGUE, "Sure.")


def test_real_pairs_decode_to_the_rendered_text(shared, tokenizer):
    set_dialogue_template(tokenizer, "zh")
    for pair in load_pairs(shared / "data" / "llama-factory" / "dpo_zh_demo.json")[:40]:
        turns = [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]
        ids = encode_prompt(tokenizer, pair["prompt"])
        ids += encode_response(tokenizer, pair["prompt"], pair["chosen"])
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(turns, tokenize=False)
