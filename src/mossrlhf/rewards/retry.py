"""Retries and a timeout for a reward function."""

import inspect
import queue
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch

from mossrlhf.options import check_range
from mossrlhf.randomness import random_state, set_random_state
from mossrlhf.rewards.model_reward import ModelReward
from mossrlhf.rewards.reward_set import reward_name


class PatientReward:
    """A reward function that is called again if it raises or does not return in time.

    Each attempt begins with the random state of the first (Python's, NumPy's, torch's on every
    device), so that a failed attempt does not change the run. The error of the last attempt stops
    the run; resumed from the checkpoint it writes then, the run repeats the iteration.

    A thread cannot be killed: a call that timed out continues in a daemon thread, with its side
    effects on files and random state, and its result is discarded. The run ends with at most
    ``retries + 1`` such threads. With several processes ``ddp_timeout`` must be longer than all
    attempts together.

    Args:
        reward: ``reward(*, prompts, completions, completion_ids, **columns)``.
        timeout: seconds per attempt, at most `threading.TIMEOUT_MAX`; None for no limit, in the
            caller's thread.
        retries: further attempts, an integer.
        wait: seconds before the second attempt; doubled before each one after it.

    Raises:
        TypeError: if `reward` is a model, which fails in the same way each time.
        ValueError: if a number is out of range, or the last wait would be.
    """

    def __init__(
        self,
        reward: Callable[..., Any],
        *,
        timeout: float | None = 60.0,
        retries: int = 2,
        wait: float = 1.0,
    ) -> None:
        if isinstance(reward, (torch.nn.Module, ModelReward, str)) or not callable(reward):
            raise TypeError(
                f"reward: got {type(reward).__name__}, expected a function reward(*, prompts, "
                "completions, completion_ids, **columns); pass models as they are"
            )
        longest = threading.TIMEOUT_MAX
        check_range("PatientReward", "timeout", timeout, 0, longest, above=True)
        check_range("PatientReward", "retries", retries, 0)
        if isinstance(retries, bool) or not isinstance(retries, int):
            raise ValueError(
                f"PatientReward(retries=): got {retries!r}, expected a whole number of attempts"
            )
        check_range("PatientReward", "wait", wait, 0, longest)
        if wait and (retries > 64 or wait * 2 ** max(0, retries - 1) > longest):
            raise ValueError(
                f"PatientReward(wait={wait:g}, retries={retries}): the wait doubles each time, and "
                f"the last would exceed {longest:g} s; lower one of them, or set wait=0"
            )
        self.reward, self.timeout, self.retries, self.wait = reward, timeout, retries, wait
        # Metrics show the function's name, and `RewardSet` passes the parameters of its signature.
        self.__name__ = reward_name(reward)
        self.__signature__ = inspect.signature(reward)

    def __call__(self, **arguments: Any) -> Any:
        """Return the function's result for ``arguments``, from the first attempt that succeeds.

        Raises:
            TimeoutError: if the last attempt did not return in time.
            Exception: whatever the last attempt raised.
        """
        state = random_state()
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(arguments)
            except Exception as error:
                if attempt == self.retries:
                    raise
                pause = self.wait * 2**attempt
                warnings.warn(
                    f"reward {self.__name__!r}: attempt {attempt + 1} of {self.retries + 1} "
                    f"failed ({type(error).__name__}: {error}); trying again in {pause:g} s",
                    UserWarning,
                    stacklevel=2,
                )
                time.sleep(pause)
                set_random_state(*state)

    def _attempt(self, arguments: dict[str, Any]) -> Any:
        if self.timeout is None:
            return self.reward(**arguments)
        results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        modes = _torch_modes()

        def call() -> None:
            try:
                with ExitStack() as stack:
                    for mode in modes:
                        stack.enter_context(mode())
                    results.put((self.reward(**arguments), None))
            except BaseException as error:
                results.put((None, error))

        threading.Thread(target=call, name=f"reward {self.__name__}", daemon=True).start()
        try:
            result, error = results.get(timeout=self.timeout)
        except queue.Empty:
            raise TimeoutError(
                f"no result within {self.timeout:g} s (PatientReward(timeout=))"
            ) from None
        if error is not None:
            raise error
        return result


def _torch_modes() -> list[Callable[[], AbstractContextManager[None]]]:
    """Return torch's modes of this thread, which a function that runs a model may rely on."""
    modes: list[Any] = [
        partial(torch.inference_mode, torch.is_inference_mode_enabled()),  # first: sets grad too
        partial(torch.set_grad_enabled, torch.is_grad_enabled()),
    ]
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            modes.append(partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind)))
    return modes
