"""What log() records: steps, times and values; it raises nothing, whatever it is given."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from tests.client.runs import logged, losses, warnings
from tests.fakes import Folders, logged_records, said
from trackagent import client
from trackagent.client import Run
from trackagent.client.record import Kind

# --- steps and times


def test_without_a_step_the_steps_count_from_0(run: Run, folders: Folders) -> None:
    for value in (1.0, 2.0, 3.0):
        run.log({"loss": value})
    assert logged(folders) == [(0, {"loss": 1.0}), (1, {"loss": 2.0}), (2, {"loss": 3.0})]


def test_without_a_step_counting_goes_on_from_the_last_one(run: Run, folders: Folders) -> None:
    run.log({"loss": 1.0}, step=41)
    run.log({"loss": 2.0})
    run.log({"loss": 3.0}, 7)
    run.log({"loss": 4.0})
    assert [step for step, _ in logged(folders)] == [41, 42, 7, 8]


def test_a_refused_call_does_not_count_as_a_step(run: Run, folders: Folders) -> None:
    run.log({"loss": 1.0})
    run.log({"loss": None})
    run.log({"loss": 2.0})
    assert [step for step, _ in logged(folders)] == [0, 1]


@pytest.mark.parametrize("step", [np.int8(127), np.int32(2**31 - 1), np.uint8(255)], ids=repr)
def test_a_narrow_numpy_step_does_not_overflow(run: Run, folders: Folders, step: Any) -> None:
    for _ in range(2):
        run.log({"loss": 1.0}, step=step)
        run.log({"loss": 1.0})
    assert [step for step, _ in logged(folders)] == [int(step), int(step) + 1] * 2


@pytest.mark.parametrize("step", [2**63 - 1, -(2**63), -1, 0, 3.0, np.int64(-7), True], ids=repr)
def test_any_whole_number_of_64_bits_is_a_step(run: Run, folders: Folders, step: Any) -> None:
    for _ in range(2):  # first with unknown, then with known keys
        run.log({"loss": 1.0}, step=step)
    assert [found for found, _ in logged(folders)] == [int(step)] * 2


@pytest.mark.parametrize("step", [3.5, 2**63, -(2**63) - 1, "3", math.nan, [1]], ids=repr)
def test_another_step_is_refused(run: Run, folders: Folders, step: Any) -> None:
    run.log({"loss": 1.0}, step=0)
    run.log({"loss": 1.0}, step=step)
    run.log({"other": 1.0}, step=step)
    client.finish()
    assert [found for found, _ in logged(folders)] == [0]
    assert losses(folders) == {"bad step": 2}


def test_a_record_has_the_time_of_its_call(run: Run, folders: Folders) -> None:
    before = time.time_ns()
    for _ in range(2):
        run.log({"loss": 1.0})
    after = time.time_ns()
    times = [one.time_ns for one in logged_records(folders)]
    assert [before <= one <= after for one in times] == [True, True]


def test_a_given_timestamp_is_the_time(run: Run, folders: Folders) -> None:
    for timestamp in (12.5, datetime(1970, 1, 2, tzinfo=timezone.utc), 86_401):
        run.log({"loss": 1.0}, timestamp=timestamp)
    times = [one.time_ns for one in logged_records(folders)]
    assert times == [12_500_000_000, 86_400 * 10**9, 86_401 * 10**9]


# --- values


@pytest.mark.parametrize(
    "value",
    [1.5, 3, True, Decimal("0.5"), np.float32(0.5), np.int16(4), np.array(2.5), np.bool_(True)],
    ids=repr,
)
def test_a_number_of_any_kind_is_stored_as_float(run: Run, folders: Folders, value: Any) -> None:
    for _ in range(3):
        run.log({"x": value, "y": 1.0})
    assert [dict(one.values) for one in logged_records(folders)] == [
        {"x": float(value), "y": 1.0}
    ] * 3


def test_the_good_values_of_a_call_are_kept_beside_the_refused(run: Run, folders: Folders) -> None:
    for _ in range(2):
        run.log({"a": 1.0, "b": "text", "c": 3.0, "": 4.0})
    client.finish()
    assert logged(folders) == [(0, {"a": 1.0, "c": 3.0}), (1, {"a": 1.0, "c": 3.0})]
    assert losses(folders) == {"not a number": 2, "bad metric key": 2}


class FloatFails:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __float__(self) -> float:
        raise self.error

    __index__ = __float__

    def __repr__(self) -> str:
        return "<odd>"


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), KeyError("no"), ZeroDivisionError()], ids=repr
)
def test_a_value_that_raises_takes_no_other_with_it(
    run: Run, folders: Folders, error: Exception
) -> None:
    run.log({"a": 1.0, "b": FloatFails(error), "c": 2.0})
    assert logged(folders) == [(0, {"a": 1.0, "c": 2.0})]


def test_a_dict_that_changes_its_order_changes_no_value(run: Run, folders: Folders) -> None:
    run.log({"a": 1.0, "b": 2.0})
    run.log({"b": 2.0, "a": 1.0})
    run.log({"a": 1.0, "b": 2.0})
    assert [values for _, values in logged(folders)] == [{"a": 1.0, "b": 2.0}] * 3


def test_a_call_without_values_records_nothing(run: Run, folders: Folders) -> None:
    run.log({})
    client.finish()
    assert (logged(folders), losses(folders)) == ([], {})


def test_more_key_sets_than_schemas_all_arrive(run: Run, folders: Folders) -> None:
    for i in range(1500):
        run.log({f"k{i}": float(i)}, step=i)
    for i in range(1500):
        run.log({f"k{i}": float(i)}, step=i)
    assert logged(folders) == [(i, {f"k{i}": float(i)}) for i in range(1500)] * 2


def test_a_record_of_many_keys_arrives(run: Run, folders: Folders) -> None:
    wide = {f"layer{i}/grad_norm": float(i) for i in range(1500)}
    for _ in range(3):
        run.log(wide)
    assert logged(folders) == [(0, wide), (1, wide), (2, wide)]


@pytest.mark.parametrize("keys", [2000, 10_000, 40_000])
def test_a_record_larger_than_a_segment_is_refused_by_name(
    run: Run, folders: Folders, caplog: pytest.LogCaptureFixture, keys: int
) -> None:
    run.log({f"a key that is rather long {i:030d}": 1.0 for i in range(keys)})
    run.log({"loss": 1.0})
    client.finish()
    assert logged(folders) == [(0, {"loss": 1.0})]
    assert losses(folders) == {"record too large": 1}
    assert [line for line in warnings(caplog) if "log fewer keys at once" in line] != []


def test_a_segment_that_fills_up_loses_nothing(run: Run, folders: Folders) -> None:
    for i in range(5000):
        run.log({"a": float(i), "b": 0.5}, step=i)
        if i % 7 == 0:
            run.log({"c": float(i)}, step=i)
    records = logged(folders)
    assert [step for step, values in records if "a" in values] == list(range(5000))
    assert [step for step, values in records if "c" in values] == list(range(0, 5000, 7))


# --- nothing is raised


class Odd(dict[str, float]):
    """A dict of which one method raises."""

    def __init__(self, method: str, error: Exception) -> None:
        super().__init__(loss=1.0)
        self.error = error
        self.method = method

    def _fail(self, method: str) -> None:
        if method == self.method:
            raise self.error

    def __iter__(self) -> Iterator[str]:
        self._fail("iter")
        return super().__iter__()

    def keys(self) -> Any:
        self._fail("keys")
        return super().keys()

    def values(self) -> Any:
        self._fail("values")
        return super().values()

    def items(self) -> Any:
        self._fail("items")
        return super().items()


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__
    __hash__ = object.__hash__


cyclic: dict[str, Any] = {}
cyclic["self"] = cyclic

ODD_METRICS = [
    None, 3, "loss", b"loss", [], [("loss", 1.0)], [[1]], {"loss"}, object(), iter([1]), cyclic,
    {"loss": None}, {None: 1.0}, {3: 1.0}, {("a", "b"): 1.0}, {"": 1.0}, {"k" * 251: 1.0},
    {"a\nb": 1.0}, {"\ud800": 1.0}, {"a": 10**400}, {"a": "x"}, {"a": [1]}, {"a": {}}, {"a": 1j},
    {"a": np.zeros(3)}, {"a": np.datetime64("2024-01-01")}, {"a": object()},
    {"a": Unprintable()}, {Unprintable(): 1.0}, {"a": FloatFails(SystemError("odd"))},
    {"a": FloatFails(MemoryError())}, {"a": type}, Unprintable(),
    *(Odd(method, error) for method in ("iter", "values", "items")
      for error in (RuntimeError("changed size"), ValueError(), KeyError("x"), IndexError(), OSError())),
]  # fmt: skip
ODD_STEPS = [
    3.5,
    "3",
    [1],
    2**63,
    math.nan,
    object(),
    Unprintable(),
    FloatFails(RuntimeError()),
    {},
]
ODD_TIMES = [
    "now",
    [1],
    math.nan,
    1e300,
    10**30,
    object(),
    Unprintable(),
    datetime.min,  # noqa: DTZ901  a naive one is local time
    datetime.max,  # noqa: DTZ901
]


def test_log_raises_nothing_whatever_it_is_given(run: Run, folders: Folders) -> None:
    run.log({"loss": 1.0})
    for _ in range(2):
        for metrics in ODD_METRICS:
            run.log(metrics)
        for step in ODD_STEPS:
            run.log({"loss": 1.0}, step=step)
        for timestamp in ODD_TIMES:
            run.log({"loss": 1.0}, timestamp=timestamp)
    run.log({"loss": 2.0})
    assert logged(folders)[-1][1] == {"loss": 2.0}


def test_everything_that_was_refused_is_counted(run: Run, folders: Folders) -> None:
    odd = [metrics for metrics in ODD_METRICS if not isinstance(metrics, Odd)]
    for metrics in odd:
        run.log(metrics)
    for step in ODD_STEPS:
        run.log({"loss": 1.0}, step=step)
    for timestamp in ODD_TIMES:
        run.log({"loss": 1.0}, timestamp=timestamp)
    client.finish()
    assert logged(folders) == []
    assert sum(losses(folders).values()) == len(odd) + len(ODD_STEPS) + len(ODD_TIMES)


ODD_TEXTS = [
    None, 3, "text", [], [("a", 1)], object(), cyclic, {"": 1}, {"k" * 251: 1}, {"a\nb": 1},
    {"\ud800": 1}, {"a": Unprintable()}, {Unprintable(): 1}, Unprintable(),
    *(Odd("items", error) for error in (RuntimeError(), KeyError("x"), OSError())),
]  # fmt: skip


def test_params_and_tags_raise_nothing_whatever_they_are_given(run: Run, folders: Folders) -> None:
    for odd in ODD_TEXTS:
        run.log_params(odd)
        run.set_tags(odd)
    run.log_params({"lr": 0.1})
    client.finish()
    assert {"lr": "0.1"} in said(folders, Kind.PARAMS)
    assert sum(losses(folders).values()) == 2 * len(ODD_TEXTS)


def test_events_raise_nothing_whatever_they_are_given(run: Run, folders: Folders) -> None:
    for level in ("", "fatal", None, 3, [], Unprintable(), np.zeros(3)):
        run.event("message", level)  # type: ignore[arg-type]
    for step in ODD_STEPS:
        run.event("message", step=step)  # type: ignore[arg-type]
    run.event(Unprintable())  # type: ignore[arg-type]
    run.event("good")
    client.finish()
    assert [event["message"] for event in said(folders, Kind.EVENT)] == ["good"]
    assert sum(losses(folders).values()) == 7 + len(ODD_STEPS) + 1


def test_timers_raise_nothing_whatever_they_are_named(run: Run) -> None:
    for name in ("", "k" * 300, "a\nb", "\ud800", 3, None):
        with run.timer(name):  # type: ignore[arg-type]
            pass
    client.finish()


class Nested(dict[str, float]):
    """A dict that logs another one while it is being logged."""

    def __init__(self, run: Run, depth: int) -> None:
        super().__init__(depth=float(depth))
        self.run = run
        self.depth = depth
        self.read = False

    def _log_the_next(self) -> None:
        if self.depth and not self.read:
            self.read = True
            self.run.log(Nested(self.run, self.depth - 1), step=self.depth - 1)

    def __iter__(self) -> Iterator[str]:
        self._log_the_next()
        return super().__iter__()

    def items(self) -> Any:
        self._log_the_next()
        return super().items()


def test_calls_within_calls_all_arrive(run: Run, folders: Folders) -> None:
    run.log(Nested(run, 50), step=50)
    assert sorted(step for step, _ in logged(folders)) == [*range(51)]


def test_calls_within_more_than_64_calls_are_refused_and_counted(
    run: Run, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    run.log(Nested(run, 100), step=100)
    run.log({"loss": 1.0}, step=0)
    client.finish()
    assert sorted(step for step, _ in logged(folders)) == [0, *range(37, 101)]
    assert losses(folders) == {"too many calls at once": 1}
    assert warnings(caplog) == ["more than 64 log calls at once"]


# --- a full journal


def test_a_full_journal_refuses_counts_and_warns(
    start: Callable[..., Run],
    folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TRACKAGENT_JOURNAL_BYTES", str(4 * 65536))
    run = start()
    for i in range(10_000):
        run.log({"loss": float(i)}, step=i)
    client.finish()
    kept = [step for step, _ in logged(folders)]
    assert 3500 < len(kept) < 10_000
    assert kept == sorted(set(kept))
    assert losses(folders) == {"journal full": 10_000 - len(kept)}
    assert [line for line in warnings(caplog) if "its limit: start an agent" in line] != []
