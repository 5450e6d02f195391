"""How a run ends: its last word, in blocks, in forked children and threads."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.client.runs import logged, losses, warnings
from tests.fakes import Folders, said
from trackagent import client
from trackagent.client import ConfigError, Run
from trackagent.client import run as run_module
from trackagent.client.record import Kind


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
    assert run.finish("failed") is False
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
