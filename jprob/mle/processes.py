"""Agreement of the processes of one training: all fail if one fails, and all go by the first one's numbers."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Makes all processes fail if one fails, rather than leaving the others to wait for it."""
    if jax.process_count() == 1:
        yield
        return
    error = None
    try:
        yield
    except BaseException as caught:  # of any class: the others wait all the same
        error = caught
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
    if failed.size:
        raise error or OSError(f"fit: process {failed[0]} of {jax.process_count()} could not go on")


def number_of_the_first(number: float) -> float:
    """A number as the first process has it: all must ask for the same chunks, and save them together."""
    return float(multihost_utils.broadcast_one_to_all(np.float32(number)))


def steps_of_the_first(steps: list[int]) -> list[int]:
    """A list as the first process has it: others may look at a folder that their file system remembers."""
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    return multihost_utils.broadcast_one_to_all(np.resize(np.array(steps, np.int32), count)).tolist()


def largest(number: int) -> int:
    """The largest number that any process has."""
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))
