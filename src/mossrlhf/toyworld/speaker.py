"""Who writes the toy world's dialogues: users that ask, and assistants of mixed quality."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from mossrlhf.toyworld.language import Language


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """How often the writer of a dialogue does what; every number but the counts is a probability.

    Args:
        multi_turn: the question comes after an earlier exchange.
        harmful: the user asks for help to do harm.
        details: weights of giving zero, one, two … details.
        opener: an answer opens in a friendly way.
        closer: an answer ends in a friendly way.
        connective: a detail has a connective in front.
        wrong: help is refused, or harm is helped.
        ground: each of a reason and an offer beside a refusal.
        misunderstood: the whole answer is to another question.
        off_topic: each detail is about something else.
        filler: a sentence that says nothing is put in.
        rude: a rude sentence is put in.
        repeat: one sentence is said again.
        max_words: answers longer than this are written anew.

    Source: ours.
    """

    multi_turn: float = 0.25
    harmful: float = 0.2
    details: Sequence[float] = (0.15, 0.3, 0.3, 0.15, 0.1)
    opener: float = 0.5
    closer: float = 0.35
    connective: float = 0.5
    wrong: float = 0.12
    ground: float = 0.5
    misunderstood: float = 0.08
    off_topic: float = 0.02
    filler: float = 0.25
    rude: float = 0.2
    repeat: float = 0.05
    max_words: int = 27

    def dialogue(self, language: Language, held_out: bool, rng: Random) -> dict:
        """A dialogue that ends with the user's turn, and its topic.

        Args:
            language: what it is written in.
            held_out: whether the last question is one of every five kept for evaluation.
            rng: source of randomness, which advances.

        Returns:
            A record with `prompt`, a list of messages, and `topic`.
        """
        topic = self._topic(language, rng)
        forms, history = language.questions, []
        if rng.random() < self.multi_turn:
            forms = rng.choice((language.changes, language.more))
            earlier = topic if forms is language.more else self._topic(language, rng)
            history = [
                self._ask(language, earlier, rng.choice(language.questions)),
                {"role": "assistant", "content": self._remark(language, earlier, rng)},
            ]
        # Held out by topic and form together: training sees both, but never this combination.
        place = list(language.topics).index(topic)
        kept = [form for index, form in enumerate(forms) if (place + index) % 5 == 0]
        allowed = kept if held_out else [form for form in forms if form not in kept]
        question = self._ask(language, topic, rng.choice(allowed))
        return {"prompt": [*history, question], "topic": topic}

    def answer(self, language: Language, topic: str, rng: Random) -> str:
        """An answer of mixed quality, as running text of at most `max_words` words."""
        if rng.random() < self.misunderstood:
            topic = rng.choice([name for name in language.topics if name != topic])
        harmful = language.topics[topic].harmful
        refuse = harmful is not (rng.random() < self.wrong)
        body = self._refusal(language, rng) if refuse else self._details(language, topic, rng)
        for share, lines in ((self.filler, language.fillers), (self.rude, language.rude)):
            if rng.random() < share:
                body.insert(rng.randint(0, len(body)), rng.choice(lines))
        if body and rng.random() < self.repeat:
            body.insert(rng.randint(0, len(body)), rng.choice(body))
        opener = [rng.choice(language.openers)] if rng.random() < self.opener else []
        closer = [rng.choice(language.closers)] if rng.random() < self.closer else []
        lines = opener * (not refuse) + body + closer
        text = " ".join(f"{line} {language.stop}" for line in lines)
        short = 0 < len(text.split()) <= self.max_words
        return language.text(text) if short else self.answer(language, topic, rng)

    def _topic(self, language: Language, rng: Random) -> str:
        """A topic that is harmful with the probability of that."""
        harmful = rng.random() < self.harmful
        return rng.choice([k for k, topic in language.topics.items() if topic.harmful is harmful])

    def _ask(self, language: Language, topic: str, form: str) -> dict:
        """A user's turn that asks for a topic."""
        return {
            "role": "user",
            "content": language.text(form.format(ask=language.topics[topic].ask)),
        }

    def _remark(self, language: Language, topic: str, rng: Random) -> str:
        """An earlier turn of the assistant, a single good sentence."""
        about = language.topics[topic]
        line = rng.choice(language.refusals if about.harmful else about.details)
        return language.text(f"{line} {language.stop}")

    def _refusal(self, language: Language, rng: Random) -> list[str]:
        """A refusal and perhaps its reason and an offer."""
        lines = [rng.choice(language.refusals)]
        for more in (language.reasons, language.offers):
            lines += [rng.choice(more)] if rng.random() < self.ground else []
        return lines

    def _details(self, language: Language, topic: str, rng: Random) -> list[str]:
        """Distinct details, most of them about the topic, some with a connective."""
        (count,) = rng.choices(range(len(self.details)), self.details)
        relevant = list(language.topics[topic].details)
        others = [d for k, other in language.topics.items() if k != topic for d in other.details]
        # In the topic's own order, as steps of a recipe: what comes next is easy to learn.
        steps = sorted(rng.sample(range(len(relevant)), count))
        lines = [relevant[step] for step in steps]
        lines = [rng.choice(others) if rng.random() < self.off_topic else line for line in lines]
        joined = [rng.random() < self.connective for _ in lines]
        return [
            f"{rng.choice(language.connectives)} {line}" if join else line
            for line, join in zip(lines, joined, strict=True)
        ]
