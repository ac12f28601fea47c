"""The writer of the toy world's dialogues: requests, and responses of mixed quality."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from mossrlhf.toyworld.language import Language


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """Probabilities of what a writer of dialogues does; `details` are weights of counts.

    Args:
        multi_turn: the request comes after an earlier exchange.
        harmful: the user asks for help to do harm.
        details: weights of giving zero, one, two … details.
        opener: a response begins with a friendly sentence.
        closer: a response ends with a friendly sentence.
        connective: a detail begins with a connective.
        wrong: a harmless request is refused, or a harmful one is not.
        ground: a reason, or an offer, comes with a refusal.
        misunderstood: the whole response is to another request.
        off_topic: a detail is about another topic.
        filler: an empty sentence is inserted.
        rude: a rude sentence is inserted.
        repeat: one sentence is repeated.
        max_words: longer responses are written again.
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
        """Write a dialogue that ends with the user's turn.

        Args:
            language: of the dialogue.
            held_out: whether the last question is one of every five kept for evaluation.
            rng: source of randomness, which advances.

        Returns:
            a record with `prompt`, a list of messages, and `topic`.
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
        # Held out by topic and form: training sees each of both, but not this combination.
        place = list(language.topics).index(topic)
        kept = [form for index, form in enumerate(forms) if (place + index) % 5 == 0]
        allowed = kept if held_out else [form for form in forms if form not in kept]
        question = self._ask(language, topic, rng.choice(allowed))
        return {"prompt": [*history, question], "topic": topic}

    def answer(self, language: Language, topic: str, rng: Random) -> str:
        """Write a response of mixed quality: running text of at most `max_words` words."""
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
        harmful = rng.random() < self.harmful
        return rng.choice([k for k, topic in language.topics.items() if topic.harmful is harmful])

    def _ask(self, language: Language, topic: str, form: str) -> dict:
        return {
            "role": "user",
            "content": language.text(form.format(ask=language.topics[topic].ask)),
        }

    def _remark(self, language: Language, topic: str, rng: Random) -> str:
        """An earlier turn of the assistant: a single good sentence."""
        about = language.topics[topic]
        line = rng.choice(language.refusals if about.harmful else about.details)
        return language.text(f"{line} {language.stop}")

    def _refusal(self, language: Language, rng: Random) -> list[str]:
        lines = [rng.choice(language.refusals)]
        for more in (language.reasons, language.offers):
            lines += [rng.choice(more)] if rng.random() < self.ground else []
        return lines

    def _details(self, language: Language, topic: str, rng: Random) -> list[str]:
        """Distinct details, most of them about the topic, some with a connective."""
        (count,) = rng.choices(range(len(self.details)), self.details)
        relevant = list(language.topics[topic].details)
        others = [d for k, other in language.topics.items() if k != topic for d in other.details]
        # In the order of the topic, as the steps of a recipe: what comes next is easy to learn.
        steps = sorted(rng.sample(range(len(relevant)), count))
        lines = [relevant[step] for step in steps]
        lines = [rng.choice(others) if rng.random() < self.off_topic else line for line in lines]
        joined = [rng.random() < self.connective for _ in lines]
        return [
            f"{rng.choice(language.connectives)} {line}" if join else line
            for line, join in zip(lines, joined, strict=True)
        ]
