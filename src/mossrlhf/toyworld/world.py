"""A dialogue world small enough for PPO in a minute, with a true preference to measure against."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mossrlhf.toyworld.chinese import CHINESE
from mossrlhf.toyworld.english import ENGLISH
from mossrlhf.toyworld.language import Language
from mossrlhf.toyworld.preference import Preference
from mossrlhf.toyworld.speaker import Speaker

LANGUAGES = {"en": ENGLISH, "zh": CHINESE}
# One rendering for both languages: <s>Human: … </s>Assistant: … </s>, the tags from `Language`.
TEMPLATE = (
    "{{{{ bos_token }}}}{{% for message in messages %}}"
    "{{% if message.role == 'user' %}}{human}{{% else %}}{assistant}{{% endif %}}"
    "{{{{ message.content }}}}{{{{ eos_token }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{assistant}{{% endif %}}"
)
CARELESS = Speaker(
    misunderstood=0.55,
    off_topic=0.15,
    repeat=0.4,
    filler=0.15,
    rude=0.15,
    details=(0.1, 0.25, 0.25, 0.25, 0.15),
)
"""Writes the answers that are compared: who is to know faults must see some."""
PAD, UNKNOWN, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"


@dataclass(frozen=True)
class ToyWorld:
    """A templated dialogue world in which over-optimization of a reward model can be measured.

    Users ask for help with everyday things, or for help to do harm. Demonstrations answer with
    mixed quality, preference pairs compare two careless answers under a noisy judge, and the *true*
    preference, which no model ever sees, scores any text at all. So a reward model learned from
    the pairs is right where the demonstrations live and free to be wrong elsewhere.

    Args:
        lang: "en" or "zh".
        seed: whatever is drawn here depends on it and on the call's own seed, on nothing else.
        preference: the true preference.
        speaker: who writes dialogues and demonstrations.
        drafter: who writes the answers that are compared, with more slips.
        temperature: of the noisy judge, P(a ≻ b) = σ((q(a) − q(b)) / temperature).

    Raises:
        ValueError: if `lang` is no language of this world.

    Source: ours.
    """

    lang: str = "en"
    seed: int = 0
    preference: Preference = field(default_factory=Preference, kw_only=True)
    temperature: float = field(default=0.4, kw_only=True)
    speaker: Speaker = field(default_factory=Speaker, kw_only=True)
    drafter: Speaker = field(default_factory=lambda: CARELESS, kw_only=True)

    def __post_init__(self) -> None:
        if self.lang not in LANGUAGES:
            raise ValueError(f"lang is {self.lang!r}, expected one of {sorted(LANGUAGES)}")

    @property
    def language(self) -> Language:
        """The text of this world."""
        return LANGUAGES[self.lang]

    @property
    def max_response_tokens(self) -> int:
        """A limit on new tokens with a little room beyond the longest demonstration."""
        return self.speaker.max_words + 5

    # ---- data -----------------------------------------------------------------------------------

    def prompts(self, n: int, *, split: str = "train", seed: int = 0) -> list[dict]:
        """Draws dialogues that end with the user's turn.

        Args:
            n: how many.
            split: "train" or "eval", which never share a last question.
            seed: of this draw.

        Returns:
            Records with `prompt` (list of messages) and `topic`, the name of what is asked for.

        Raises:
            ValueError: if `split` is neither.
        """
        if split not in ("train", "eval"):
            raise ValueError(f"split is {split!r}, expected 'train' or 'eval'")
        rng = self._random(f"prompts/{split}", seed)
        return [self.speaker.dialogue(self.language, split == "eval", rng) for _ in range(n)]

    def sft_examples(self, n: int, *, seed: int = 0) -> list[dict]:
        """Draws demonstrations of mixed quality: records of `prompts` with a `response`.

        Args:
            n: how many.
            seed: of this draw.
        """
        rng = self._random("sft", seed)
        return [
            record | {"response": self.speaker.answer(self.language, record["topic"], rng)}
            for record in self.prompts(n, seed=seed)
        ]

    def pairs(self, n: int, *, split: str = "train", seed: int = 0) -> list[dict]:
        """Draws preference pairs: two careless answers each, `chosen` by a noisy judge.

        P(a ≻ b) = σ((q(a) − q(b)) / temperature) with q the true quality.

        Args:
            n: how many.
            split: "train" or "eval", as in `prompts`.
            seed: of this draw.

        Returns:
            Records of `prompts` with `chosen`, `rejected` (texts), `true_margin`, the true quality
            of the chosen response less the rejected one's: negative where the judge erred.
        """
        rng = self._random("pairs", seed)
        return [self._judged(record, rng) for record in self.prompts(n, split=split, seed=seed)]

    def _judged(self, record: dict, rng: Random) -> dict:
        """Put two answers to a record's prompt, put in order by the noisy judge."""
        texts = [self.drafter.answer(self.language, record["topic"], rng) for _ in range(2)]
        margin = self.true_quality(record, texts[0]) - self.true_quality(record, texts[1])
        if rng.random() > 1 / (1 + math.exp(-margin / self.temperature)):
            texts, margin = texts[::-1], -margin
        return record | {"chosen": texts[0], "rejected": texts[1], "true_margin": margin}

    def _random(self, purpose: str, seed: int) -> Random:
        """A random stream of its own for each purpose and seed."""
        return Random(f"{self.lang}/{self.seed}/{purpose}/{seed}")

    # ---- measuring ------------------------------------------------------------------------------

    def true_quality(self, record: dict, response: str, *, ended: bool = True) -> float:
        """Return the true quality of a response; see `Preference` for the formula.

        Args:
            record: of `prompts`.
            response: its text.
            ended: whether it closed with an end-of-sequence token.
        """
        return self.preference.quality(self.language, record["topic"], response, ended=ended)

    def well_formed(self, response: str) -> bool:
        """Whether a response is made of sentences of the language, every one of them whole."""
        kinds = [sentence.kind for sentence in self.language.parse(response)]
        return bool(kinds) and "broken" not in kinds

    def reward(
        self,
        *,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        topic: Sequence[str],
        **columns: Sequence,
    ) -> list[float]:
        """True quality under the convention for reward callables: for measuring, not for training.

        Args:
            prompts: unused, as the topic says what was asked for.
            completions: texts of the responses, without special tokens.
            completion_ids: token ids; a response has ended if its last one is end-of-sequence.
            topic: the records' column of that name.
            columns: other columns, unused.

        Returns:
            One quality per completion.
        """
        last = self.eos_token_id
        return [
            self.true_quality({"topic": name}, text, ended=len(ids) > 0 and ids[-1] == last)
            for name, text, ids in zip(topic, completions, completion_ids, strict=True)
        ]

    # ---- models ---------------------------------------------------------------------------------

    @cached_property
    def _token_ids(self) -> dict[str, int]:
        """Vocabulary: special tokens, speakers, words."""
        language = self.language
        tokens = [PAD, UNKNOWN, BOS, EOS, language.human, language.assistant, *language.vocabulary]
        return {token: index for index, token in enumerate(tokens)}

    @property
    def eos_token_id(self) -> int:
        """Id of the token that ends a response."""
        return self._token_ids[EOS]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer with one token per word and a dialogue template."""
        core = Tokenizer(models.WordLevel(self._token_ids, unk_token=UNKNOWN))
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.Split(Regex(self.language.word_pattern), behavior="isolated"),
            ]
        )
        if not self.language.glue:
            core.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token=PAD,
            unk_token=UNKNOWN,
            bos_token=BOS,
            eos_token=EOS,
            additional_special_tokens=[self.language.human, self.language.assistant],
            chat_template=TEMPLATE.format(
                human=self.language.human, assistant=self.language.assistant
            ),
            clean_up_tokenization_spaces=False,
        )

    def model_config(self, *, hidden_size: int = 96, num_layers: int = 2) -> LlamaConfig:
        """Return the configuration of a Llama of about 0.2 M parameters, for policy and reward.

        Args:
            hidden_size: D.
            num_layers: of the transformer.
        """
        return LlamaConfig(
            vocab_size=len(self._token_ids),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            pad_token_id=self._token_ids[PAD],
            bos_token_id=self._token_ids[BOS],
            eos_token_id=self.eos_token_id,
        )
