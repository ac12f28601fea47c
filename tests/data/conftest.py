"""Tokenizers small enough to train in a test, one per habit that matters to prompts."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["Human: Hi there, how are you? Assistant: Sure. 你好，请问 <eos> " * 3]


def train(pre_tokenizer, decoder, **special):
    """A BPE tokenizer over `CORPUS`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", *special.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


@pytest.fixture
def tokenizer():
    """Byte-level BPE, as in GPT-2: eos, but neither bos nor pad."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return train(pre_tokenizer, decoders.ByteLevel(), eos_token="</s>")


@pytest.fixture
def llama_tokenizer():
    """SentencePiece-like, as in Llama: a lone text opens with a space; bos is put before it."""
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = train(metaspace, decoders.Metaspace(), bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer
