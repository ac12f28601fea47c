"""The languages of the toy world: which sentences there are, and what each is for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Topic:
    """Something a user may ask for.

    Args:
        ask: the request, as it appears in a question ("make tea").
        details: what a response can say about it, without connective and full stop.
        harmful: whether a good response is a polite refusal instead.
    """

    ask: str
    details: Sequence[str]
    harmful: bool = False


class Sentence(NamedTuple):
    """A sentence: its kind, the topic of a detail ("" otherwise), its words without connective."""

    kind: str
    topic: str
    core: str


@dataclass(frozen=True, kw_only=True)
class Language:
    """All texts of the toy world in one language, with spaces between words.

    A sentence is words and then `stop`; a detail may begin with one of `connectives`. `glue` joins
    words in running text: a space in English, nothing in Chinese.
    """

    glue: str
    stop: str
    human: str
    assistant: str
    questions: Sequence[str]
    changes: Sequence[str]
    more: Sequence[str]
    topics: Mapping[str, Topic]
    connectives: Sequence[str]
    openers: Sequence[str]
    closers: Sequence[str]
    fillers: Sequence[str]
    rude: Sequence[str]
    refusals: Sequence[str]
    reasons: Sequence[str]
    offers: Sequence[str]

    def text(self, spaced: str) -> str:
        """Join words separated by spaces into running text."""
        return self.glue.join(spaced.split())

    @cached_property
    def vocabulary(self) -> list[str]:
        """Every word of the language once, sorted, the full stop included."""
        asks = [topic.ask for topic in self.topics.values()]
        details = [detail for topic in self.topics.values() for detail in topic.details]
        asides = [*self.openers, *self.closers, *self.fillers, *self.rude]
        asides += [*self.refusals, *self.reasons, *self.offers]
        turns = [line.format(ask="") for line in (*self.questions, *self.changes, *self.more)]
        lines = [*asks, *details, *asides, *turns, *self.connectives, self.stop]
        return sorted({word for line in lines for word in line.split()})

    @cached_property
    def word_pattern(self) -> str:
        """Regular expression of one word: the longest known one, else any single character."""
        words = sorted(self.vocabulary, key=lambda word: (-len(word), word))
        known = "|".join(re.escape(word) for word in words)
        return r"\S+" if self.glue else f"{known}|."

    @cached_property
    def sentences(self) -> dict[str, Sentence]:
        """Every sentence of the language, by its running text."""
        asides = {
            "opener": self.openers,
            "closer": self.closers,
            "filler": self.fillers,
            "rude": self.rude,
            "refusal": self.refusals,
            "reason": self.reasons,
            "offer": self.offers,
        }
        table = {
            self.text(f"{line} {self.stop}"): Sentence(kind, "", line)
            for kind, lines in asides.items()
            for line in lines
        }
        for name, topic in self.topics.items():
            for detail in topic.details:
                for connective in ("", *self.connectives):
                    text = self.text(f"{connective} {detail} {self.stop}")
                    table[text] = Sentence("detail", name, detail)
        return table

    def parse(self, text: str) -> list[Sentence]:
        """Split running text into sentences; unknown ones are of the kind "broken"."""
        stop = re.escape(self.stop)
        lines = [line.strip() for line in re.findall(f"[^{stop}]*{stop}|[^{stop}]+$", text.strip())]
        return [self.sentences.get(line, Sentence("broken", "", line)) for line in lines]

    def words(self, text: str) -> list[str]:
        """Split running text into words."""
        return re.findall(self.word_pattern, text)
