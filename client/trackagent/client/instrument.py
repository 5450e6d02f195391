"""Timers, and the decorator that makes a run of a function."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Timer:
    """Measures wall-clock seconds of a block (`with`) or of each call of a function (as a
    decorator), and hands them to `report` with the name. As a decorator for any number
    of threads; in `with` for one."""

    def __init__(self, name: str, report: Callable[[str, float], None]) -> None:
        self._name = name
        self._report = report
        self._starts: list[float] = []

    def __enter__(self) -> Timer:
        self._starts.append(time.perf_counter())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._report(self._name, time.perf_counter() - self._starts.pop())

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._report(self._name, time.perf_counter() - start)

        return timed
