"""Rewards that cannot be called, or return what is none."""

import numpy as np
import torch

from bad_inputs.room import Room
from bad_inputs.shop import brevity

room = Room("Rewards")
row = room.row


def returns(given, gets, value):
    """A row on a reward that returns `value(8 completions)`."""

    def odd(*, completions):
        return value(completions)

    row(given, gets, lambda shop: shop.scored(odd))


row("an empty list", "ValueError: reward: got an empty list", lambda shop: shop.trainer(reward=[]))
row(
    "a number",
    "TypeError: reward: got 3, expected a reward model, a sequence classifier, a path to one, or a "
    "function reward(*, prompts, completions, completion_ids, **columns)",
    lambda shop: shop.trainer(reward=3),
)
row("None", "TypeError: reward: got None, expected", lambda shop: shop.trainer(reward=None))
row(
    "a weight that is NaN",
    "ValueError: reward: the weight of <function brevity … is nan, expected a number",
    lambda shop: shop.trainer(reward=[(brevity, float("nan"))]),
)
row(
    "a pair the wrong way round",
    "TypeError: reward: got 0.5, expected",
    lambda shop: shop.trainer(reward=[(0.5, brevity)]),
)
row(
    "a triple",
    "ValueError: reward: got a tuple of 3, expected (reward, weight)",
    lambda shop: shop.trainer(reward=[(brevity, 1.0, "brevity")]),
)
row(
    "nothing but weights of 0",
    "ValueError: reward: every weight is 0, so there is nothing to learn from",
    lambda shop: shop.trainer(reward=[(brevity, 0.0)]),
)
row(
    "two of one name",
    "ValueError: reward: names must differ, since metrics carry them; got ['brevity', 'brevity']",
    lambda shop: shop.trainer(reward=[brevity, brevity]),
)


@row(
    "a name that other metrics have",
    "ValueError: reward: 'kl' cannot be a reward's name, since other metrics are called eval/kl/",
)
def reserved(shop):
    def kl(*, completions):
        return [0.0] * len(completions)

    return shop.trainer(reward=kl)


@row(
    "a function with a parameter that is no column of the dataset",
    "ValueError: reward 'judge': got a parameter 'answer', expected prompts, completions, "
    "completion_ids or a column of the dataset",
)
def no_such_column(shop):
    def judge(*, completions, answer):
        return [0.0] * len(completions)

    return shop.scored(judge, train_dataset=[{"prompt": "help"}])


@row(
    "a function that raises",
    "ValueError: reward 'judge' raised KeyError: 'gone'. It was called for 8 completions with "
    "['completions'] and the columns []; the first completion is '",
)
def raises(shop):
    def judge(*, completions):
        raise KeyError("gone")

    return shop.scored(judge)


@row(
    "a coroutine function",
    "ValueError: reward 'judge' returned coroutine, expected a list of 8 numbers (None where it "
    "does not apply), or a tensor: it was never awaited",
)
def coroutine(shop):
    async def judge(*, completions):
        return [0.0] * len(completions)

    return shop.scored(judge)


LIST = "expected a list of 8 numbers (None where it does not apply), or a tensor: "
returns(
    "a function that returns None",
    f"ValueError: reward 'odd' returned NoneType, {LIST}",
    lambda texts: None,
)
returns("… a single number", f"ValueError: reward 'odd' returned float, {LIST}", lambda texts: 1.0)
returns("… a text", f"ValueError: reward 'odd' returned str, {LIST}its order", lambda texts: "12")
returns(
    "… a dict",
    f"ValueError: reward 'odd' returned dict, {LIST}its order is not that of the completions",
    lambda texts: dict.fromkeys(texts, 1.0),
)
returns(
    "… one number too few",
    "ValueError: reward 'odd' returned (7,) values for 8 completions, expected (8,), or (8, ",
    lambda texts: [0.0] * 7,
)
returns(
    "… numbers as texts",
    f"ValueError: reward 'odd' returned list, {LIST}'1.0' is no number",
    lambda texts: ["1.0"] * 8,
)
returns(
    "… a list of lists",
    f"ValueError: reward 'odd' returned list, {LIST}[1.0] is no number",
    lambda texts: [[1.0]] * 8,
)
returns(
    "… complex numbers",
    f"ValueError: reward 'odd' returned list, {LIST}1j is no number",
    lambda texts: [1j] * 8,
)
returns(
    "… an array of complex numbers",
    f"ValueError: reward 'odd' returned ndarray, {LIST}…1j… is no number",
    lambda texts: np.full(8, 1j),
)
returns(
    "… a list of tensors of two numbers",
    f"ValueError: reward 'odd' returned list, {LIST}tensor([0., 0.]) is no number",
    lambda texts: [torch.zeros(2)] * 8,
)
returns(
    "… a list of tensors of one number",
    "taken: it is read as that number",
    lambda texts: list(torch.zeros(8, 1)),
)
returns(
    "… a tensor of complex numbers",
    "ValueError: reward 'odd' returned a tensor of torch.complex64, expected real numbers",
    lambda texts: torch.full((8,), 1j),
)
returns(
    "… an array of columns, `[8, 1]`",
    f"ValueError: reward 'odd' returned ndarray, {LIST}array([0.]) is no number",
    lambda texts: np.zeros((8, 1)),
)
returns(
    "… a tensor `[8, 1]`",
    "ValueError: reward 'odd' returned (8, 1) values for 8 completions, expected (8,), or (8, ",
    lambda texts: torch.zeros(8, 1),
)
returns(
    "… NaN",
    "ValueError: reward 'odd' returned nan for sample 1, …expected finite numbers (None where it "
    "does not apply)",
    lambda texts: [0.0, float("nan")] * 4,
)
returns(
    "… infinity",
    "ValueError: reward 'odd' returned -inf for sample 0, …expected finite numbers",
    lambda texts: [-float("inf")] * 8,
)
returns(
    "… a number beyond float32",
    "ValueError: reward 'odd' returned inf for sample 0, …expected finite numbers",
    lambda texts: [1e300] * 8,
)
returns(
    "… an integer beyond any float",
    f"ValueError: reward 'odd' returned list, {LIST}int too large to convert to float",
    lambda texts: [10**400] * 8,
)
returns(
    "… None for every completion",
    "taken: it applies to none of them, and each is worth 0",
    lambda texts: [None] * 8,
)
row(
    "scores of one's own, one too few",
    "ValueError: scores: got (7,), expected one for each of the 8 responses",
    lambda shop: (lambda t: t.step(t.collect(), scores=[0.0] * 7))(shop.trainer()),
)
row(
    "scores of one's own that are not finite",
    "ValueError: scores: got [nan, …expected finite numbers",
    lambda shop: (lambda t: t.step(t.collect(), scores=[float("nan")] * 8))(shop.trainer()),
)
row(
    "scores of one's own that are texts",
    "ValueError: scores: got ['a', …expected 8 numbers",
    lambda shop: (lambda t: t.step(t.collect(), scores=["a"] * 8))(shop.trainer()),
)
