"""What a training process sees of a run: what is recorded, refused, counted and warned of."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from tests.fakes import (
    AgentProcess,
    Folders,
    logged_records,
    run_script,
    said,
    wait_until,
)
from trackagent import client
from trackagent.agent.config import STORE_NAME
from trackagent.agent.store import open_reader
from trackagent.client import ConfigError, JournalError, Run, TrackagentError, ValueRefused, facts
from trackagent.client import run as run_module
from trackagent.client.record import Kind


@pytest.fixture
def start(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    """start(**options): begins a run in this process, without an agent, and forgets it after the test."""
    monkeypatch.setenv("TRACKAGENT_DIR", str(folders.directory))
    monkeypatch.setenv("TRACKAGENT_STATE", str(folders.state))
    monkeypatch.setenv("TRACKAGENT_SEGMENT_BYTES", "65536")
    # Tags about git come at any moment, beside what a test counts.
    monkeypatch.setattr(facts, "slow", dict)
    client._warn_no_run.cache_clear()

    def begin(experiment: str = "test", **options: Any) -> Run:
        return client.init(experiment, **options)

    yield begin
    client.finish()


@pytest.fixture
def run(start: Callable[..., Run]) -> Run:
    return start()


def logged(folders: Folders) -> list[tuple[int, dict[str, float]]]:
    return [(one.step, dict(one.values)) for one in logged_records(folders)]


def losses(folders: Folders) -> Mapping[str, int]:
    """What the finished run says was lost."""
    return said(folders, Kind.LOSS)[-1] if said(folders, Kind.LOSS) else {}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was warned of, but for the end without an agent."""
    return [
        one.getMessage()
        for one in caplog.records
        if one.name == "trackagent" and not one.getMessage().startswith("not everything was")
    ]


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


# --- strict


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({"a": "x"},), ValueRefused, "'a' is a str, 'x', which is no number: log a float"),
        (({"": 1.0},), ValueRefused, "an empty metric key: give it a name"),
        (({"a": 1.0}, 3.5), ValueRefused, "the step 3.5 is no whole number"),
        ((None,), ValueRefused, "log() got NoneType: give a dict of names and numbers"),
        (
            ({"a": 1.0}, 0, "now"),
            ValueRefused,
            "the timestamp 'now' is no time: use seconds since 1970, or a datetime",
        ),
    ],
    ids=["value", "key", "step", "not a dict", "timestamp"],
)
def test_strict_raises_what_is_refused(
    start: Callable[..., Run], arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    run = start(strict=True)
    run.log({"a": 1.0})
    with pytest.raises(error) as caught:
        run.log(*arguments)
    assert str(caught.value) == message


def test_strict_keeps_the_good_values_of_the_call(
    start: Callable[..., Run], folders: Folders
) -> None:
    run = start(strict=True)
    with pytest.raises(ValueRefused):
        run.log({"a": 1.0, "b": "x"})
    assert logged(folders) == [(0, {"a": 1.0})]


def test_strict_counts_what_it_raises(start: Callable[..., Run], folders: Folders) -> None:
    run = start(strict=True)
    with pytest.raises(ValueRefused):
        run.log({"b": "x"})
    client.finish()
    assert losses(folders) == {"not a number": 1}


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("log_params", (3,)),
        ("set_tags", ({"": 1},)),
        ("event", ("m", "fatal")),
        ("log_params", (cyclic,)),
    ],
)
def test_strict_raises_from_every_method(
    start: Callable[..., Run], method: str, arguments: tuple[Any, ...]
) -> None:
    run = start(strict=True)
    with pytest.raises((TrackagentError, RecursionError)):
        getattr(run, method)(*arguments)


# --- warnings


def test_a_refusal_is_warned_of_once(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        run.log({"loss": "high"})
    client.finish()
    assert warnings(caplog) == ["'loss' is a str, 'high', which is no number: log a float"]


def test_each_key_that_is_refused_is_warned_of(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    for key in ("a", "b"):
        run.log({key: None})
    client.finish()
    assert [line[:3] for line in warnings(caplog)] == ["'a'", "'b'"]


def test_a_refusal_is_warned_of_while_training_goes_on(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.log({"loss": None})
    wait_until(lambda: warnings(caplog))


def test_a_refusal_is_counted_while_training_goes_on(run: Run, folders: Folders) -> None:
    run.log({"loss": None})
    wait_until(lambda: losses(folders) == {"not a number": 1})


def test_log_waits_for_no_log_handler(run: Run) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Blocking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            entered.set()
            leave.wait(10.0)

    handler = Blocking()
    logging.getLogger("trackagent").addHandler(handler)
    try:
        run.log({"a": None})
        assert entered.wait(10.0)
        start = time.monotonic()
        for i in range(100):
            run.log({f"b{i}": None})
        assert time.monotonic() - start < 5.0
    finally:
        leave.set()
        logging.getLogger("trackagent").removeHandler(handler)


def test_logging_without_a_run_is_warned_of_once(
    start: Callable[..., Run], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_ever_begun", False)  # as in a process that never had one
    client.log({"loss": 1.0})
    client.log_params({"lr": 0.1})
    client.set_tags({"a": "b"})
    client.event("hello")
    with client.timer("x"):
        pass
    assert warnings(caplog) == [
        "nothing is recorded: call trackagent.client.init(experiment=...) first"
    ]


def test_logging_after_the_last_run_is_warned_of(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    client.finish()
    client.log({"loss": 1.0})
    assert warnings(caplog) == ["nothing is recorded: the run has finished"]


def test_logging_to_a_finished_run_is_warned_of_once(
    run: Run, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    run.finish()
    for _ in range(3):
        run.log({"loss": 1.0})
    assert warnings(caplog) == ["the run has finished: log before finish(), or call init() again"]
    assert logged(folders) == []


# --- params, tags, events


def test_params_are_kept_as_text(start: Callable[..., Run], folders: Folders) -> None:
    start(params={"lr": 3e-4, "model": {"depth": 12, "norm": {"eps": 1e-5}}, "amp": True})
    assert said(folders, Kind.PARAMS) == [
        {"lr": "0.0003", "model.depth": "12", "model.norm.eps": "1e-05", "amp": "True"}
    ]


def test_a_param_is_written_once(run: Run, folders: Folders) -> None:
    run.log_params({"lr": 0.1})
    run.log_params({"lr": 0.1, "wd": 0.0})
    params = [item for data in said(folders, Kind.PARAMS) for item in data.items()]
    assert sorted(set(params)) == [("lr", "0.1"), ("wd", "0.0")]


def test_a_param_that_changes_is_refused(
    run: Run, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    run.log_params({"lr": 0.1})
    run.log_params({"lr": 0.2, "wd": 0.0})
    client.finish()
    assert said(folders, Kind.PARAMS) == [{"lr": "0.1"}, {"wd": "0.0"}]
    assert losses(folders) == {"param changed": 1}
    assert warnings(caplog) == [
        "the param 'lr' is '0.1' and cannot become '0.2': log what changes as a metric or a tag"
    ]


def test_many_long_params_all_arrive(run: Run, folders: Folders) -> None:
    params = {f"p{i}": "ä" * 6000 for i in range(50)}
    run.log_params(params)
    found = {key: text for data in said(folders, Kind.PARAMS) for key, text in data.items()}
    assert found == params


def test_a_long_param_is_cut_and_warned_of(
    run: Run, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    run.log_params({"p": "x" * 6001})
    client.finish()
    assert said(folders, Kind.PARAMS) == [{"p": "x" * 6000}]
    assert warnings(caplog) == ["the param 'p' was cut to 6000 characters"]


def test_tags_may_change(start: Callable[..., Run], folders: Folders) -> None:
    run = start(tags={"phase": "warmup"})
    run.set_tags({"phase": "main"})
    phases = [data["phase"] for data in said(folders, Kind.TAGS) if "phase" in data]
    assert phases == ["warmup", "main"]


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_an_event_has_level_message_and_step(run: Run, folders: Folders, level: str) -> None:
    run.event("the disk is full", level, step=7)
    assert said(folders, Kind.EVENT) == [{"level": level, "message": "the disk is full"}]


def test_an_unknown_level_is_refused(run: Run, folders: Folders) -> None:
    run.event("x", "fatal")
    client.finish()
    assert (said(folders, Kind.EVENT), losses(folders)) == ([], {"bad level": 1})


def test_a_long_event_is_cut(run: Run, folders: Folders) -> None:
    run.event("x" * 10_000)
    assert said(folders, Kind.EVENT) == [{"level": "info", "message": "x" * 6000}]


# --- the end


def endings(folders: Folders) -> list[tuple[str, str, int]]:
    return [(end["status"], end["error"], end["records"]) for end in said(folders, Kind.FINISH)]


def test_finish_says_how_and_how_many_records(run: Run, folders: Folders) -> None:
    for _ in range(3):
        run.log({"loss": 1.0})
    run.log({"loss": None})
    assert run.finish("failed", "out of memory") is False  # no agent has it
    assert endings(folders) == [("failed", "out of memory", 3)]


def test_finishing_twice_is_finishing_once(run: Run, folders: Folders) -> None:
    run.finish()
    start = time.monotonic()
    assert run.finish("failed") is False
    assert time.monotonic() - start < 0.5
    assert endings(folders) == [("finished", "", 0)]


def test_finish_without_a_run_is_done_already(start: Callable[..., Run]) -> None:
    assert client.finish() is True


def test_an_unknown_status_is_warned_of_and_the_run_finished(
    run: Run, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    run.finish("crashed")
    assert [status for status, *_ in endings(folders)] == ["finished"]
    [warning] = warnings(caplog)
    assert warning.startswith("the status 'crashed' is none of finished, failed, killed")


def test_an_unknown_status_is_no_loss(run: Run, folders: Folders) -> None:
    run.finish("crashed")
    assert losses(folders) == {}


def test_an_exception_may_be_given_as_the_error(run: Run, folders: Folders) -> None:
    run.finish("failed", ValueError("no such layer"))  # type: ignore[arg-type]
    assert endings(folders) == [("failed", "no such layer", 0)]


def test_what_a_signal_handler_raises_leaves_log(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(number: int, frame: object) -> None:
        raise TimeoutError("watchdog")

    def clock() -> int:
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGUSR1)
        return 1

    run.log({"loss": 1.0}, step=1)
    previous = signal.signal(signal.SIGUSR1, handle)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "time_ns", clock)
            with pytest.raises(TimeoutError, match="watchdog"):
                run.log({"loss": 1.0}, step=2)
    finally:
        signal.signal(signal.SIGUSR1, previous)


@pytest.mark.parametrize("error", [OSError("disk"), MemoryError(), RuntimeError("changed size")])
def test_what_log_itself_runs_into_raises_nothing(
    run: Run, folders: Folders, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(run._journal, "write_metrics", fail)
        run.log({"new": 1.0}, step=1)
    run.finish()
    assert losses(folders) == {"error": 1}


class Unshowable:
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


def test_a_timers_name_that_cannot_be_shown_raises_nothing(run: Run, folders: Folders) -> None:
    with run.timer(Unshowable()):  # type: ignore[arg-type]
        pass
    run.finish()
    assert losses(folders) == {"error": 1}


def test_a_status_and_an_error_that_cannot_be_shown_raise_nothing(
    run: Run, folders: Folders
) -> None:
    run.finish(Unshowable(), Unshowable())  # type: ignore[arg-type]
    assert endings(folders) == [("finished", "(an error that cannot be shown)", 0)]


def test_finishing_again_returns_the_same(run: Run) -> None:
    assert run.finish() == run.finish()


def test_what_is_done_at_the_end_is_told_the_deadline(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKAGENT_EXIT_TIMEOUT_S", "7")
    run = start()
    told: list[float] = []
    usual = run._on_finish

    def tell(deadline: float) -> None:
        told.append(deadline)
        usual(deadline)

    monkeypatch.setattr(run, "_on_finish", tell)
    began = time.monotonic()
    run.finish()
    assert began < told[0] <= time.monotonic() + 7


def test_a_finished_run_opens_no_journal_in_a_forked_child(run: Run, folders: Folders) -> None:
    run.finish()
    before = folders.journals()
    child = os.fork()
    if child == 0:
        run.log({"loss": 1.0})
        os._exit(0)
    os.waitpid(child, 0)
    assert folders.journals() == before


def test_the_first_calls_of_a_forked_child_share_one_journal(run: Run, folders: Folders) -> None:
    before = folders.journals()
    child = os.fork()
    if child == 0:
        barrier = threading.Barrier(8)

        def work() -> None:
            barrier.wait()
            for step in range(200):
                run.log({"loss": 1.0}, step=step)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(folders.journals()) == len(before) + 1
    assert len(logged(folders)) == 8 * 200


def test_an_unknown_status_is_raised_if_strict_and_the_run_can_still_finish(
    start: Callable[..., Run], folders: Folders
) -> None:
    run = start(strict=True)
    with pytest.raises(ConfigError, match="'crashed' is none of finished, failed, killed"):
        client.finish("crashed")
    assert client.current_run() is run
    client.finish("failed")
    assert [status for status, *_ in endings(folders)] == ["failed"]


def test_a_second_init_finishes_the_first_run(start: Callable[..., Run], folders: Folders) -> None:
    first = start()
    second = start()
    assert (first.status, second.status) == ("finished", "running")
    assert client.current_run() is second


def test_an_init_that_fails_leaves_the_run_alone(
    start: Callable[..., Run], folders: Folders
) -> None:
    run = start()
    with pytest.raises(ConfigError):
        client.init("")
    assert (client.current_run(), run.status) == (run, "running")


def test_a_block_that_ends_finishes_the_run(start: Callable[..., Run], folders: Folders) -> None:
    with start() as run:
        run.log({"loss": 1.0})
    assert endings(folders) == [("finished", "", 1)]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("no such\nlayer"), "failed", "ValueError: no such layer"),
        (KeyboardInterrupt(), "killed", "KeyboardInterrupt"),
        (SystemExit(3), "failed", "SystemExit: 3"),
        (SystemExit(0), "finished", ""),
        (SystemExit(), "finished", ""),
    ],
    ids=repr,
)
def test_a_block_that_raises_says_how_it_ended(
    start: Callable[..., Run], folders: Folders, error: BaseException, status: str, line: str
) -> None:
    with pytest.raises(type(error)), start():
        raise error
    assert endings(folders) == [(status, line, 0)]


def test_a_run_in_a_block_is_no_longer_current_after_it(start: Callable[..., Run]) -> None:
    with start():
        pass
    assert client.current_run() is None


def test_finish_in_one_thread_ends_logging_in_another(run: Run, folders: Folders) -> None:
    logging_began, stop = threading.Event(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            run.log({"loss": 1.0})
            logging_began.set()

    thread = threading.Thread(target=work)
    thread.start()
    logging_began.wait(10.0)
    run.finish()
    stop.set()
    thread.join()
    ((_, _, records),) = endings(folders)
    assert records == len(logged(folders)) > 0


# --- init


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experiment": ""}, "an empty experiment name: give it a name"),
        ({"experiment": None}, "the experiment name None is no text: use a str"),
        (
            {"experiment": "x", "run_name": "a\nb"},
            "the run name 'a\\nb' holds control characters: leave them out",
        ),
        (
            {"experiment": "x", "run_id": "abc"},
            "run_id is 'abc': give 32 hex digits (a UUID, dashes are allowed)",
        ),
    ],
)
def test_a_wrong_argument_is_a_config_error(
    start: Callable[..., Run], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        client.init(**arguments)
    assert str(caught.value) == message
    assert client.current_run() is None


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TRACKAGENT_SEGMENT_BYTES", "lots", "TRACKAGENT_SEGMENT_BYTES is 'lots': give a number"),
        (
            "TRACKAGENT_EXIT_TIMEOUT_S",
            "nan",
            "exit_timeout_s is nan: give seconds between 0 and 86400",
        ),
        ("TRACKAGENT_SEGMENT_BYTES", "4096", "segment_bytes is 4096: give a multiple of 4096"),
        ("TRACKAGENT_JOURNAL_BYTES", "65536", "journal_bytes is 65536: give at least 4 segments"),
        ("TRACKAGENT_RUN_ID", "xyz", "TRACKAGENT_RUN_ID is 'xyz': give 32 hex digits"),
    ],
)
def test_a_wrong_variable_is_a_config_error_that_names_it(
    start: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        start()
    assert str(caught.value).startswith(message)


def test_a_socket_path_that_is_too_long_is_a_config_error_that_names_it(
    start: Callable[..., Run], folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = folders.directory / ("d" * 100)
    monkeypatch.setenv("TRACKAGENT_DIR", str(directory))
    with pytest.raises(ConfigError) as caught:
        start()
    path = directory / "agent.sock"
    assert str(caught.value) == (
        f"the socket path {path} has {len(str(path))} bytes, the system allows 107: "
        "set TRACKAGENT_DIR to a shorter folder"
    )


def test_no_room_for_a_journal_is_a_journal_error(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKAGENT_DIR", "/proc/trackagent")
    monkeypatch.setenv("TRACKAGENT_STATE", "/proc/trackagent")
    with pytest.raises(
        JournalError, match=r"/proc/trackagent.*set TRACKAGENT_DIR and TRACKAGENT_STATE"
    ):
        start()
    assert client.current_run() is None


def test_an_init_that_fails_leaves_no_thread(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKAGENT_DIR", "/proc/trackagent")
    monkeypatch.setenv("TRACKAGENT_STATE", "/proc/trackagent")
    before = set(threading.enumerate())
    with pytest.raises(JournalError):
        start()
    wait_until(lambda: set(threading.enumerate()) <= before)


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


# --- through to the store


def test_every_bit_of_a_value_arrives_in_the_store(agent: AgentProcess) -> None:
    program = """
import math, struct, sys
from trackagent import client

def nan(bits):
    return struct.unpack("<d", struct.pack("<Q", bits))[0]

values = [0.1, -0.0, math.inf, -math.inf, 5e-324, 1.7976931348623157e308, math.pi, 2.0**53 + 2,
          nan(0x7FF8000000000001), nan(0xFFF80000DEADBEEF)]
run = client.init(experiment="bits")
for value in values:
    client.log({"x": value})
client.finish()
print(run.id, *(struct.pack("<d", value).hex() for value in values))
"""
    run_id, *expected = run_script(agent.folders, program).stdout.split()
    agent.wait_for_status(run_id, "finished")
    with contextlib.closing(open_reader(agent.folders.state / STORE_NAME)) as reader:
        values = np.concatenate([block.values[0] for block in reader.export(run_id)])
    assert [value.tobytes().hex() for value in values] == expected


def test_what_was_refused_is_shown_in_the_run(agent: AgentProcess) -> None:
    program = """
from trackagent import client

run = client.init(experiment="losses")
for _ in range(5):
    client.log({"loss": "high", "lr": 0.1})
client.log({"loss": 1.0}, step=0.5)
print(run.id, client.finish())
"""
    done = run_script(agent.folders, program)
    run_id, delivered = done.stdout.split()
    agent.wait_for_status(run_id, "finished")
    shown = agent.shown(run_id)
    assert (delivered, shown["lost_records"]) == ("True", 6)
    assert shown["losses"] == {"not a number": 5, "bad step": 1}
    assert done.stderr.splitlines() == [
        "'loss' is a str, 'high', which is no number: log a float",
        "the step 0.5 is no whole number",
    ]


def test_settings_of_a_run_arrive_in_the_store(agent: AgentProcess) -> None:
    program = """
from trackagent import client

params = {"model": {"depth": 3}}
run = client.init(experiment="settings", run_name="first try", params=params, tags={"team": "a"})
client.set_tags({"team": "b"})
client.event("odd", "error", step=4)
client.finish()
print(run.id)
"""
    run_id = run_script(agent.folders, program).stdout.strip()
    run = agent.wait_for_status(run_id, "finished")
    shown = agent.shown(run_id)
    assert (run.name, run.experiment) == ("first try", "settings")
    assert (shown["params"], shown["tags"]["team"]) == ({"model.depth": "3"}, "b")
    assert [(one["level"], one["message"], one["step"]) for one in shown["events"]] == [
        ("error", "odd", 4)
    ]


FORK = """
import os, time
from trackagent import client
from trackagent.client.config import default_directory

run = client.init(experiment="fork")
before = set(default_directory().glob("journals/*"))
pid = os.fork()
if pid == 0:
    WORK
    os._exit(0)
os.waitpid(pid, 0)
print(run.id, client.finish())
"""


def test_a_forked_child_counts_and_warns_too(agent: AgentProcess) -> None:
    program = FORK.replace("WORK", "for _ in range(3): client.log({'loss': None})")
    done = run_script(agent.folders, program)
    run_id, _ = done.stdout.split()
    agent.wait_for_status(run_id, "finished")
    agent.wait_for_delivery()
    assert agent.shown(run_id)["losses"] == {"not a number": 3}
    assert done.stderr == "'loss' is a NoneType, None, which is no number: log a float\n"


def test_a_forked_child_may_log_more_in_all_than_a_journal_holds(agent: AgentProcess) -> None:
    work = """
    for step in range(8000):
        client.log({"loss": float(step)}, step=step)
        deadline = time.monotonic() + 20
        while step % 500 == 0:
            own = set(default_directory().glob("journals/*")) - before
            if len([path for folder in own for path in folder.glob("*.seg")]) <= 3:
                break
            assert time.monotonic() < deadline, own
            time.sleep(0.01)
"""
    done = run_script(
        agent.folders,
        FORK.replace("    WORK\n", work),
        TRACKAGENT_SEGMENT_BYTES="65536",
        TRACKAGENT_JOURNAL_BYTES=str(4 * 65536),
    )
    run_id, _ = done.stdout.split()
    assert done.stderr == ""
    agent.wait_for_status(run_id, "finished")
    agent.wait_for_delivery()
    assert [point.step for point in agent.exported(run_id)] == list(range(8000))
    assert agent.shown(run_id)["lost_records"] == 0
