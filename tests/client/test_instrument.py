"""Timers, and functions that are runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.fakes import Folders, logged_records, said
from trackagent import client
from trackagent.client import instrument
from trackagent.client.instrument import Timer
from trackagent.client.record import Kind

Reports = list[tuple[str, float]]


@pytest.fixture
def reports() -> Reports:
    return []


@pytest.fixture
def timer(reports: Reports, monkeypatch: pytest.MonkeyPatch) -> Timer:
    """A timer by whose clock every look is 1 s after the last one."""
    looks = iter(range(1000))
    monkeypatch.setattr(instrument.time, "perf_counter", lambda: float(next(looks)))
    return Timer("forward", lambda key, seconds: reports.append((key, seconds)))


def test_a_block_is_timed(timer: Timer, reports: Reports) -> None:
    with timer:
        pass
    assert reports == [("forward", 1.0)]


def test_a_timer_may_be_used_again(timer: Timer, reports: Reports) -> None:
    for _ in range(3):
        with timer:
            pass
    assert reports == [("forward", 1.0)] * 3


def test_a_timer_may_be_used_within_itself(timer: Timer, reports: Reports) -> None:
    with timer, timer:
        pass
    assert reports == [("forward", 1.0), ("forward", 3.0)]


def test_a_block_that_raises_is_timed_and_raises(timer: Timer, reports: Reports) -> None:
    with pytest.raises(ValueError, match="mine"), timer:
        raise ValueError("mine")
    assert reports == [("forward", 1.0)]


def test_each_call_of_a_decorated_function_is_timed(timer: Timer, reports: Reports) -> None:
    @timer
    def double(number: int) -> int:
        return 2 * number

    assert [double(2), double(number=3)] == [4, 6]
    assert reports == [("forward", 1.0)] * 2


def test_a_decorated_function_keeps_its_name(timer: Timer) -> None:
    @timer
    def double(number: int) -> int:
        """Twice."""
        return 2 * number

    assert (double.__name__, double.__doc__) == ("double", "Twice.")


def test_a_decorated_function_that_raises_is_timed_and_raises(
    timer: Timer, reports: Reports
) -> None:
    @timer
    def fail() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert reports == [("forward", 1.0)]


def test_a_decorated_function_may_run_in_threads_at_once(reports: Reports) -> None:
    barrier = threading.Barrier(4)

    @Timer("work", lambda key, seconds: reports.append((key, seconds)))
    def work() -> None:
        barrier.wait(10.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [key for key, _ in reports] == ["work"] * 4


# --- in a run


@pytest.fixture
def here(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folders]:
    """Folders that this process's runs use."""
    monkeypatch.setenv("TRACKAGENT_DIR", str(folders.directory))
    monkeypatch.setenv("TRACKAGENT_STATE", str(folders.state))
    yield folders
    client.finish()


def logged(folders: Folders) -> list[tuple[int, list[str]]]:
    return [(one.step, [*one.values]) for one in logged_records(folders)]


@pytest.mark.parametrize("by", ["module", "run"])
def test_a_timer_logs_at_the_step_under_way_and_leaves_it(here: Folders, by: str) -> None:
    run = client.init("timers")
    timer = client.timer if by == "module" else run.timer
    for step in (10, 11):
        with timer("forward"):
            pass
        client.log({"loss": 1.0}, step=step)
    client.log({"loss": 1.0})
    assert logged(here) == [
        (0, ["time/forward"]),
        (10, ["loss"]),
        (11, ["time/forward"]),
        (11, ["loss"]),
        (12, ["loss"]),
    ]


def test_what_a_timer_logs_counts_as_a_record(here: Folders) -> None:
    client.init("timers")
    with client.timer("forward"):
        pass
    client.finish()
    assert said(here, Kind.FINISH)[0]["records"] == 1


def test_a_module_timer_logs_to_the_run_that_is_current_when_it_ends(here: Folders) -> None:
    timer = client.timer("setup")
    with timer:
        client.init("timers")
    assert logged(here) == [(0, ["time/setup"])]


# --- functions that are runs


def params(folders: Folders) -> dict[str, str]:
    return {key: text for data in said(folders, Kind.PARAMS) for key, text in data.items()}


def ends(folders: Folders) -> list[tuple[str, str]]:
    return [(end["status"], end["error"]) for end in said(folders, Kind.FINISH)]


def test_a_tracked_function_is_a_run_with_its_arguments_as_params(here: Folders) -> None:
    @client.track("tracked")
    def train(lr: float, *, epochs: int = 3, name: str | None = None, data: Any = ()) -> str:
        return f"{lr} {epochs}"

    assert train(0.5, data=[1, 2]) == "0.5 3"
    assert params(here) == {"lr": "0.5", "epochs": "3", "name": "None"}
    assert ends(here) == [("finished", "")]


def test_the_numbers_that_a_tracked_function_returns_are_metrics(here: Folders) -> None:
    @client.track("tracked")
    def train() -> dict[str, Any]:
        return {"loss": 0.25, "acc": np.float32(0.5), "model": object(), "note": "fine"}

    train()
    ((_, values, _),) = logged_records(here)
    assert {key: value for key, value in values.items() if key != "time/train"} == {
        "loss": 0.25,
        "acc": 0.5,
    }
    assert values["time/train"] > 0


def test_a_tracked_function_that_raises_is_a_failed_run(here: Folders) -> None:
    @client.track("tracked")
    def train() -> None:
        raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged"):
        train()
    assert ends(here) == [("failed", "ValueError: diverged")]


def test_a_tracked_function_called_wrongly_raises_what_it_would(here: Folders) -> None:
    @client.track("tracked")
    def train(lr: float) -> None: ...

    with pytest.raises(TypeError, match="missing a required argument: 'lr'"):
        train()  # type: ignore[call-arg]


def test_each_call_is_a_run_of_its_own(here: Folders) -> None:
    ids: list[str] = []

    @client.track("tracked", run_name="sweep", tags={"a": "b"})
    def train(record: Callable[[str], None]) -> None:
        run = client.current_run()
        assert run is not None
        record(run.id)
        assert run.name == "sweep"

    train(ids.append)
    train(ids.append)
    assert len(set(ids)) == 2
    assert client.current_run() is None
