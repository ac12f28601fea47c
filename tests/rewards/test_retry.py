"""`PatientReward`: retries, timeouts, and the modes and random state of each attempt."""

import random
import threading
import time
from inspect import unwrap

import numpy as np
import pytest
import torch
from preferences import reward_model

from mossrlhf import PatientReward, RewardSet


def test_a_reward_that_raises_is_called_again(tokenizer):
    calls = []

    def flaky(*, completions, topic):
        calls.append((random.random(), np.random.random(), torch.rand(()).item()))
        if len(calls) < 3:
            raise ConnectionError("not now")
        return [1.0] * len(completions)

    reward = PatientReward(flaky, timeout=5.0, retries=2, wait=0.01)
    with pytest.warns(
        UserWarning, match="attempt . of 3 failed .ConnectionError: not now"
    ) as caught:
        assert reward(completions=["a"], topic=["b"]) == [1.0]
    assert len(caught) == 2
    assert len(set(calls)) == 1  # each attempt begins with the same random state
    assert RewardSet([(reward, 0.5)], tokenizer).weights == {"flaky": 0.5}


def test_the_last_attempt_raises_its_error():
    reward = PatientReward(lambda **_: 1 / 0, retries=1, wait=0.0)
    with pytest.warns(UserWarning, match="attempt 1 of 2"), pytest.raises(ZeroDivisionError):
        reward()


def test_a_reward_that_hangs_raises_a_timeout_error():
    def hangs(**_):
        time.sleep(30)

    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no result within 0\.1 s"):
        PatientReward(hangs, timeout=0.1, retries=0)()
    assert time.monotonic() - began < 5
    (left,) = [t for t in threading.enumerate() if t.name == "reward hangs"]
    assert left.daemon  # otherwise the process could not exit


def test_the_reward_runs_in_the_callers_torch_modes():
    def mode(**_):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), product.dtype

    reward = PatientReward(mode)
    assert reward() == (True, False, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert reward() == (False, False, torch.bfloat16)
    with torch.inference_mode():
        assert reward() == (False, True, torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(timeout=0), r"PatientReward\(timeout=\): got 0"),
        (dict(retries=-1), r"PatientReward\(retries=\): got -1"),
        (dict(wait=-1), r"PatientReward\(wait=\): got -1"),
        (dict(timeout=float("inf")), r"PatientReward\(timeout=\): got inf, expected a number in"),
        (dict(timeout=1e10), r"PatientReward\(timeout=\): got 10000000000.0"),
        (dict(retries=1.5), r"PatientReward\(retries=\): got 1.5, expected a whole number"),
        (dict(wait=float("inf")), r"PatientReward\(wait=\): got inf"),
        (dict(retries=50), r"PatientReward\(wait=1, retries=50\): the wait doubles"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    made = object.__new__(PatientReward)
    with pytest.raises(ValueError, match=message):
        unwrap(PatientReward.__init__)(made, lambda **_: [], **options)  # unchecked types


def test_models_are_refused():
    with pytest.raises(TypeError, match="pass models as they are"):
        PatientReward(reward_model())
