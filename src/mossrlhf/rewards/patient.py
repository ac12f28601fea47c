"""A reward function that may fail now and then, or not answer at all."""

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
from mossrlhf.rewards.model import ModelReward
from mossrlhf.rewards.together import reward_name


class PatientReward:
    """Asks a reward function again where it raises or does not answer, and then gives up.

    It stands wherever the function would: alone, in a list, with a weight. Each attempt begins
    with the random numbers of the first (Python's, NumPy's, torch's on every device), so that one
    which fails changes nothing of the run. Once
    it gives up, what the function raised last (a `TimeoutError` where it did not answer) stops
    the run, and the checkpoint it leaves begins the iteration anew.

    A thread cannot be killed: a call that does not answer goes on in the background, its answer
    is not listened to any more, and as a daemon thread it does not keep the process alive. What it
    does meanwhile, to files or to random numbers, it does. At most ``retries + 1`` of them are
    left behind by the call that ends the run. Under several processes ``ddp_timeout`` must be
    longer than all attempts together.

    Args:
        reward: ``reward(*, prompts, completions, completion_ids, **columns)``.
        timeout: seconds an attempt may take, at most `threading.TIMEOUT_MAX`; None for no bound, in
            the caller's own thread.
        retries: further attempts, a whole number.
        wait: seconds before the second attempt; twice as long before each one after it.

    Raises:
        TypeError: where `reward` is a model, which is local and does not get better by waiting.
        ValueError: where a number is out of range, or the last wait would be.

    Source: ours.
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
        longest = threading.TIMEOUT_MAX  # what the system can wait for at all
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
        # What metrics call it, and what it is called with, are the function's.
        self.__name__ = reward_name(reward)
        self.__signature__ = inspect.signature(reward)

    def __call__(self, **arguments: Any) -> Any:
        """Return what the function does, of its first attempt that succeeds.

        Args:
            arguments: the function's.

        Raises:
            TimeoutError: where the last attempt did not answer in time.
            Exception: whatever the last attempt raised.
        """
        numbers = random_state()
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
                set_random_state(*numbers)

    def _attempt(self, arguments: dict[str, Any]) -> Any:
        if self.timeout is None:
            return self.reward(**arguments)
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        modes = _modes()

        def ask() -> None:
            try:
                with ExitStack() as here:
                    for mode in modes:
                        here.enter_context(mode())
                    answers.put((self.reward(**arguments), None))
            except BaseException as error:
                answers.put((None, error))

        name = f"reward {self.__name__}"
        threading.Thread(target=ask, name=name, daemon=True).start()
        try:
            answer, error = answers.get(timeout=self.timeout)
        except queue.Empty:
            raise TimeoutError(
                f"no answer within {self.timeout:g} s (PatientReward(timeout=))"
            ) from None
        if error is not None:
            raise error
        return answer


def _modes() -> list[Callable[[], AbstractContextManager[None]]]:
    """What torch keeps for each thread, and a reward that runs a model may count on."""
    modes: list[Any] = [
        partial(torch.inference_mode, torch.is_inference_mode_enabled()),  # sets the next one too
        partial(torch.set_grad_enabled, torch.is_grad_enabled()),
    ]
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            modes.append(partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind)))
    return modes
