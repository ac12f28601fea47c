"""Threads that compute alone, for rows of logits on a CPU.

Were the threads of torch to share every small operation, they would wait for each other after each,
and on a busy machine do little else.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier

import torch


def on_threads(share: Callable[[int], object], threads: int) -> None:
    """Let each thread do its share, in the caller's mode; a thread has a mode of its own.

    Args:
        share: takes the number of a thread, from 0; the caller does the only one itself.
        threads: how many there are.

    Source: ours.
    """
    if threads <= 1:
        for thread in range(threads):
            share(thread)
        return
    inference = torch.is_inference_mode_enabled()

    def alone(thread: int) -> None:
        with torch.inference_mode() if inference else torch.no_grad():
            share(thread)

    pool = _pool(os.getpid(), threads)
    running = [pool.submit(alone, thread) for thread in range(threads)]
    try:
        for future in running:
            future.result()
    finally:
        wait(running)  # interrupted or not: what they write to is let go of by the caller


def _work_alone() -> None:
    torch.get_num_threads()  # at first sight a thread takes the default, whatever it was told
    torch.set_num_threads(1)


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads whose operations are not divided any further; of a process: a fork has none."""
    before, all_there = torch.get_num_threads(), Barrier(threads)
    # What a thread is told is the default of threads to come as well, so all are told at once.
    pool = ThreadPoolExecutor(threads, initializer=_work_alone)
    list(pool.map(lambda _: all_there.wait(), range(threads)))
    torch.set_num_threads(before)
    return pool
