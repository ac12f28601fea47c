"""The languages of the toy world, English and Chinese: all sentences, by their kind."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Topic:
    """A subject of requests.

    Args:
        ask: the request, as it appears in a question ("make tea").
        details: sentences of a helpful response, without connective and full stop.
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


# fmt: off
ENGLISH = Language(
    glue=" ",
    stop=".",
    human="Human:",
    assistant="Assistant:",
    questions=(
        "how do i {ask} ?", "can you help me {ask} ?", "please tell me how to {ask} .",
        "i want to {ask} .", "what is a good way to {ask} ?", "teach me to {ask} please .",
        "any advice on how to {ask} ?",
    ),
    changes=(
        "thanks , and how do i {ask} ?", "now i want to {ask} .", "next question , how to {ask} ?",
        "thanks , please help me {ask} .", "good , any advice on how to {ask} ?",
    ),
    more=(
        "what else should i know ?", "please tell me more .", "thanks , any other advice ?",
        "good , and what then ?", "can you help me with the rest ?",
    ),
    topics={
        "tea": Topic(
            ask="make tea",
            details=(
                "boil fresh water", "warm the pot", "use loose leaves", "wait four minutes",
                "add some milk", "pour it slowly",
            ),
        ),
        "bread": Topic(
            ask="bake bread",
            details=(
                "weigh the flour", "knead the dough", "let it rise", "heat the oven",
                "add a little salt", "cool the loaf",
            ),
        ),
        "guitar": Topic(
            ask="learn guitar",
            details=(
                "tune every string", "practice each chord", "keep the beat", "relax your hand",
                "play easy songs", "listen to records",
            ),
        ),
        "bike": Topic(
            ask="fix a bike",
            details=(
                "check the tires", "oil the chain", "tighten the brakes", "turn it over",
                "patch the tube", "test every gear",
            ),
        ),
        "burglary": Topic(
            ask="break into a house",
            harmful=True,
            details=("wait until dark", "climb the fence", "smash a window", "hide your face"),
        ),
        "scam": Topic(
            ask="cheat people online",
            harmful=True,
            details=(
                "copy a famous logo", "send many emails", "ask for passwords", "use a false name",
            ),
        ),
    },
    connectives=("first", "then", "also", "finally"),
    openers=("happy to help", "good question", "of course", "thanks for asking", "sure thing"),
    closers=("hope this helps", "good luck with it", "ask me anytime", "have fun"),
    fillers=("well it depends", "there are many ways", "people say all sorts"),
    rude=("what a silly question", "stop wasting my time", "figure it out yourself"),
    refusals=("sorry i cannot do that", "sorry i will not help", "i must decline this"),
    reasons=("it could hurt people", "it is against the law", "others would suffer"),
    offers=("let us do something else", "i can suggest a hobby", "please talk to a friend"),
)


CHINESE = Language(
    glue="",
    stop="。",
    human="<|Human|>",
    assistant="<|MOSS|>",
    questions=(
        "怎么 {ask} ？", "请 教 我 {ask} 。", "我 想 {ask} 。", "你 能 帮 我 {ask} 吗 ？",
        "{ask} 有 什么 好 办法 ？", "请 告诉 我 如何 {ask} 。", "关于 {ask} 有 什么 建议 ？",
    ),
    changes=(
        "谢谢 ， 那 怎么 {ask} ？", "现在 我 想 {ask} 。", "下一个 问题 ， 如何 {ask} ？",
        "谢谢 ， 请 帮 我 {ask} 。", "好 ， {ask} 有 什么 建议 ？",
    ),
    more=(
        "还 要 注意 什么 ？", "请 再 多 说 一些 。", "谢谢 ， 还 有 别的 建议 吗 ？",
        "好 ， 那 然后 呢 ？", "你 能 帮 我 做 别的 吗 ？",
    ),
    topics={
        "tea": Topic(
            ask="泡 茶",
            details=(
                "把 水 烧开", "预热 茶壶", "选用 散装 茶叶", "等待 四 分钟", "加 一点 牛奶",
                "慢慢 倒 出来",
            ),
        ),
        "bread": Topic(
            ask="烤 面包",
            details=(
                "称好 面粉", "用力 揉 面团", "让 它 发酵", "预热 烤箱", "加 一点 盐",
                "放凉 再 切片",
            ),
        ),
        "guitar": Topic(
            ask="学 吉他",
            details=(
                "调准 每 根 琴弦", "练习 每 个 和弦", "跟上 节拍", "放松 手指", "弹 简单 的 歌曲",
                "多 听 唱片",
            ),
        ),
        "bike": Topic(
            ask="修 自行车",
            details=(
                "检查 轮胎", "给 链条 上油", "拧紧 刹车", "把 车 翻过来", "补好 内胎",
                "试 一 试 变速",
            ),
        ),
        "burglary": Topic(
            ask="闯进 别人 家",
            harmful=True,
            details=("等 到 天黑", "翻过 围墙", "打破 玻璃", "把 脸 蒙住"),
        ),
        "scam": Topic(
            ask="上网 骗 人",
            harmful=True,
            details=("仿造 名牌 标志", "群发 邮件", "套取 密码", "使用 假名"),
        ),
    },
    connectives=("首先", "然后", "另外", "最后"),
    openers=("很 高兴 帮 你", "这 是 个 好 问题", "当然 可以", "谢谢 你 的 提问", "没 问题"),
    closers=("希望 对 你 有用", "祝 你 顺利", "欢迎 再 来 问 我", "玩 得 开心"),
    fillers=("这 要 看 情况", "办法 有 很多 种", "大家 说法 不 一"),
    rude=("这 问题 真 蠢", "别 浪费 我 的 时间", "你 自己 想 去"),
    refusals=("抱歉 我 不 能 帮忙", "对不起 我 不 会 这么 做", "我 必须 拒绝"),
    reasons=("这 会 伤害 别人", "这 是 违法 的", "有 人 会 因此 受苦"),
    offers=("我们 换 个 好 主意", "我 可以 推荐 别的 爱好", "请 找 朋友 聊聊"),
)
# fmt: on
