"""Work spread over all cores, in processes: the layers are too much for one."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")


def in_processes(function: Callable[[A], R], arguments: Iterable[A], at_once: int | None = None) -> Iterator[R]:
    """`function` of each argument, in the order of the arguments; the largest should come first.

    :param function: found by its name in a fresh process, as its arguments are: at the top level of a module.
    :param at_once: how many at a time; None: one for each core. More, if they wait most of the time.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once or os.cpu_count(), mp_context=context) as pool:
        yield from pool.map(function, arguments)
