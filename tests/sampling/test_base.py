"""Lists of tokens made into a rollout, and what is refused of them."""

import math

import pytest
import torch

from mossrlhf.sampling import assemble

PROMPTS = [[5, 6, 7], [8], [9, 10]]
COMPLETIONS = [[11], [12, 0, 14, 15], [16, 2]]
LOGPROBS = [[-0.5], [-1.0, -2.0, -3.0, -4.0], [-0.25, -0.125]]
ENDED = [False, False, True]


def made(prompts=PROMPTS, completions=COMPLETIONS, ended=ENDED, logprobs=LOGPROBS, pad=0):
    return assemble(prompts, completions, ended, pad_token_id=pad, logprobs=logprobs)


def test_layout_by_hand():
    rollout = made(pad=9)
    assert rollout.input_ids.tolist() == [
        [5, 6, 7, 11, 9],
        [8, 12, 0, 14, 15],
        [9, 10, 16, 2, 9],  # a token with the padding's id stays
    ]
    assert rollout.prompt_lengths.tolist() == [3, 1, 2]
    assert rollout.response_lengths.tolist() == [1, 4, 2]
    assert rollout.truncated.tolist() == [True, True, False]
    assert rollout.mask.tolist() == [
        [True, False, False, False],
        [True, True, True, True],
        [True, True, False, False],
    ]
    assert rollout.sampler_logprobs.tolist() == [
        [-0.5, 0.0, 0.0, 0.0],
        [-1.0, -2.0, -3.0, -4.0],
        [-0.25, -0.125, 0.0, 0.0],
    ]
    assert rollout.sampler_logprobs.dtype is torch.float32


def test_what_went_in_comes_out():
    rollout = made()
    assert rollout.prompts() == PROMPTS
    assert rollout.completions() == COMPLETIONS
    assert made(logprobs=None).sampler_logprobs is None


def test_device():
    rollout = assemble(PROMPTS, COMPLETIONS, ENDED, pad_token_id=0, device="meta", logprobs=None)
    assert {rollout.input_ids.device.type, rollout.truncated.device.type} == {"meta"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": []}, r"prompts: got 0, of which \[\] are empty"),
        ({"prompts": [[5], [], [6]]}, r"prompts: got 3, of which \[1\] are empty"),
        ({"completions": COMPLETIONS[:2]}, "completions: got 2 for 3 prompts, expected one for"),
        ({"ended": [True]}, "ended: got 1 for 3 prompts"),
        ({"logprobs": LOGPROBS[:1]}, "logprobs: got 1 for 3 prompts"),
        ({"completions": [[1], [], [2]]}, r"completions: \[1\] have no token, expected at least"),
        ({"completions": [[1], [3, -1], [2]]}, r"completions: \[1\] hold negative ids"),
        (
            {"logprobs": [[-0.5], [-1.0], [-0.2, -0.1]]},
            "logprobs: got 1 for the 4 tokens of response 1, expected one for each; pass None",
        ),
        (
            {"logprobs": [[-0.5], [-1.0, -2.0, math.nan, -1.0], [-0.2, -0.1]]},
            "logprobs: that of token 2 of response 1 is nan, expected a finite number",
        ),
    ],
)
def test_refused(given, message):
    with pytest.raises(ValueError, match=message):
        made(**given)
