"""A dialogue world small enough for PPO in a minute, with a known true preference."""

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
# For both languages: <s>Human: … </s>Assistant: … </s>, with the speakers' names of `Language`.
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
"""Writes the responses of preference pairs: a reward model must see faults to learn them."""
PAD, UNKNOWN, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"


@dataclass(frozen=True)
class ToyWorld:
    """A templated dialogue world for measuring the over-optimization of a reward model.

    Users ask for help with everyday things, or for help to do harm. Demonstrations are of mixed
    quality, a noisy annotator compares careless responses in preference pairs, and the *true*
    preference, which no model sees, scores any text. A reward model learned from the pairs is right
    near the demonstrations, and may be wrong elsewhere.

    Args:
        lang: "en" or "zh".
        seed: all samples depend on it and on the seed of the call, and on nothing else.
        preference: the true preference.
        speaker: the writer of dialogues and demonstrations.
        drafter: the writer of the responses in preference pairs, who makes more mistakes.
        temperature: of the noisy annotator, P(a ≻ b) = σ((q(a) − q(b)) / temperature).

    Raises:
        ValueError: if there is no such language.
    """

    lang: str = "en"
    seed: int = 0
    preference: Preference = field(default_factory=Preference, kw_only=True)
    temperature: float = field(default=0.4, kw_only=True)
    speaker: Speaker = field(default_factory=Speaker, kw_only=True)
    drafter: Speaker = field(default_factory=lambda: CARELESS, kw_only=True)

    def __post_init__(self) -> None:
        if self.lang not in LANGUAGES:
            raise ValueError(f"lang: got {self.lang!r}, expected one of {sorted(LANGUAGES)}")

    @property
    def language(self) -> Language:
        """All texts of this world."""
        return LANGUAGES[self.lang]

    @property
    def max_response_tokens(self) -> int:
        """A limit on new tokens: the longest demonstration, and a little room."""
        return self.speaker.max_words + 5

    # ---- data -----------------------------------------------------------------------------------

    def prompts(self, n: int, *, split: str = "train", seed: int = 0) -> list[dict]:
        """Sample dialogues that end with the user's turn.

        Args:
            n: how many.
            split: "train" or "eval", which share no last question.
            seed: of these samples.

        Returns:
            records with `prompt` (a list of messages) and `topic`, a name in `language.topics`.

        Raises:
            ValueError: if `split` is neither.
        """
        if split not in ("train", "eval"):
            raise ValueError(f"split: got {split!r}, expected 'train' or 'eval'")
        rng = self._random(f"prompts/{split}", seed)
        return [self.speaker.dialogue(self.language, split == "eval", rng) for _ in range(n)]

    def sft_examples(self, n: int, *, seed: int = 0) -> list[dict]:
        """Sample demonstrations of mixed quality: records of `prompts` with a `response`.

        Args:
            n: how many.
            seed: of these samples.
        """
        rng = self._random("sft", seed)
        return [
            record | {"response": self.speaker.answer(self.language, record["topic"], rng)}
            for record in self.prompts(n, seed=seed)
        ]

    def pairs(self, n: int, *, split: str = "train", seed: int = 0) -> list[dict]:
        """Sample preference pairs: two careless responses each, compared by a noisy annotator.

        P(a ≻ b) = σ((q(a) − q(b)) / temperature), q being the true quality.

        Args:
            n: how many.
            split: "train" or "eval", as in `prompts`.
            seed: of these samples.

        Returns:
            records of `prompts` with `chosen` and `rejected` (texts) and `true_margin`, their
            difference in true quality: negative if the annotator was wrong.
        """
        rng = self._random("pairs", seed)
        return [self._pair(record, rng) for record in self.prompts(n, split=split, seed=seed)]

    def _pair(self, record: dict, rng: Random) -> dict:
        texts = [self.drafter.answer(self.language, record["topic"], rng) for _ in range(2)]
        margin = self.true_quality(record, texts[0]) - self.true_quality(record, texts[1])
        if rng.random() > 1 / (1 + math.exp(-margin / self.temperature)):
            texts, margin = texts[::-1], -margin
        return record | {"chosen": texts[0], "rejected": texts[1], "true_margin": margin}

    def _random(self, purpose: str, seed: int) -> Random:
        """A separate random stream for each purpose and seed."""
        return Random(f"{self.lang}/{self.seed}/{purpose}/{seed}")

    # ---- measuring ------------------------------------------------------------------------------

    def true_quality(self, record: dict, response: str, *, ended: bool = True) -> float:
        """Return the true quality of a response; `Preference` has the formula.

        Args:
            record: of `prompts`.
            response: its text.
            ended: whether it ended with an end-of-sequence token.
        """
        return self.preference.quality(self.language, record["topic"], response, ended=ended)

    def well_formed(self, response: str) -> bool:
        """Whether a response consists of whole sentences of the language."""
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
        """Return the true quality as a reward function does: for measuring, not for training.

        Args:
            prompts: unused, the topic is enough.
            completions: texts of the responses, without special tokens.
            completion_ids: token ids; a response has ended if its last one is end-of-sequence.
            topic: the records' column of that name.
            columns: other columns, unused.

        Returns:
            one quality per completion.
        """
        last = self.eos_token_id
        return [
            self.true_quality({"topic": name}, text, ended=len(ids) > 0 and ids[-1] == last)
            for name, text, ids in zip(topic, completions, completion_ids, strict=True)
        ]

    # ---- models ---------------------------------------------------------------------------------

    @cached_property
    def _token_ids(self) -> dict[str, int]:
        """The vocabulary: special tokens, names of the speakers, words."""
        language = self.language
        tokens = [PAD, UNKNOWN, BOS, EOS, language.human, language.assistant, *language.vocabulary]
        return {token: index for index, token in enumerate(tokens)}

    @property
    def eos_token_id(self) -> int:
        """The id of the token that ends a response."""
        return self._token_ids[EOS]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer with one token per word and a dialogue template."""
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
        """Return the configuration of a Llama with about 0.2 M parameters, for policy and reward.

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
