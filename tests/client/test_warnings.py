"""What is refused is warned of, once, or raised where the run is strict."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.client.runs import logged, losses, warnings
from tests.fakes import DEADLINE_S, Folders, wait_until
from trackagent import client
from trackagent.client import Run, TrackagentError, ValueRefused

# --- strict


cyclic: dict[str, Any] = {}
cyclic["self"] = cyclic


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
        assert time.monotonic() - start < DEADLINE_S
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
