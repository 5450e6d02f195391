"""`log()` of tensors on a device: what is in the journal, when, and what is counted where they do not
come."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest

from tests.client.devices import DeviceTensor, FakeDevices, fail
from tests.client.runs import logged, losses, warnings
from tests.fakes import (
    DEADLINE_S,
    Folders,
    holes,
    in_a_forked_process,
    logged_records,
    said,
    wait_until,
)
from trackagent.client import Run, ValueRefused
from trackagent.client.config import ClientConfig
from trackagent.client.device import ROWS, Rings
from trackagent.client.errors import JournalError
from trackagent.client.identity import Identity
from trackagent.client.record import Kind


@pytest.fixture
def devices() -> FakeDevices:
    return FakeDevices()


@pytest.fixture
def begin(
    folders: Folders, devices: FakeDevices, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Run]]:
    """begin(**options): a run without an agent, whose devices are `devices`; finished after the test."""
    monkeypatch.setenv("TRACKAGENT_DIR", str(folders.directory))
    monkeypatch.setenv("TRACKAGENT_STATE", str(folders.state))
    monkeypatch.setenv("TRACKAGENT_EXIT_TIMEOUT_S", "0.4")
    rings = Rings(lambda: devices)
    who = Identity(run_id=uuid4().hex, attempt=1, rank=0, local_rank=0, world_size=1, node="node a")
    runs: list[Run] = []

    def make(**options: Any) -> Run:
        runs.append(
            Run(config=ClientConfig.load(), who=who, experiment="test", rings=rings, **options)
        )
        return runs[-1]

    yield make
    for run in runs:
        run.finish()


@pytest.fixture
def run(begin: Callable[..., Run]) -> Run:
    return begin()


def tensor(value: float = 0.5, **more: Any) -> DeviceTensor:
    return DeviceTensor(value, **more)


def records(folders: Folders) -> int:
    """How many metric records the finished run says that it logged."""
    [end] = said(folders, Kind.FINISH)
    return int(end["records"])


# --- what comes


def test_host_values_are_there_at_once_and_the_devices_follow(
    run: Run, devices: FakeDevices, folders: Folders
) -> None:
    run.log({"loss": tensor(0.25), "lr": 0.1}, step=7)
    at_once = logged(folders)
    devices.land()
    assert at_once == [(7, {"lr": 0.1})]
    wait_until(lambda: len(logged(folders)) == 2)
    first, second = logged_records(folders)
    assert (first.values, second.values) == ({"lr": 0.1}, {"loss": 0.25})
    assert (second.step, second.time_ns) == (first.step, first.time_ns)


def test_all_devices_values_of_a_call_are_one_record(
    run: Run, devices: FakeDevices, folders: Folders
) -> None:
    run.log({"a": tensor(1.0), "b": tensor(2.0), "c": tensor(3.0, device="cuda:1")}, step=7)
    devices.land_all()
    wait_until(lambda: logged(folders) == [(7, {"a": 1.0, "b": 2.0, "c": 3.0})])


def test_a_timestamp_is_the_devices_values_too(
    run: Run, devices: FakeDevices, folders: Folders
) -> None:
    run.log({"loss": tensor()}, step=7, timestamp=1234)
    devices.land()
    wait_until(lambda: [one.time_ns for one in logged_records(folders)] == [1234 * 10**9])


def test_steps_go_on_after_a_call_with_devices_values_only(
    run: Run, devices: FakeDevices, folders: Folders
) -> None:
    run.log({"loss": tensor(1.0)}, step=4)
    run.log({"loss": tensor(2.0)})
    run.log({"lr": 0.1})
    devices.land_all()
    run.finish()
    found = sorted(logged(folders), key=lambda one: one[0])
    assert found == [(4, {"loss": 1.0}), (5, {"loss": 2.0}), (6, {"lr": 0.1})]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_one_element_is_taken_in_any_shape(
    run: Run, devices: FakeDevices, folders: Folders, shape: tuple[int, ...]
) -> None:
    run.log({"loss": tensor(0.5, shape=shape)}, step=1)
    devices.land()
    run.finish()
    assert logged(folders) == [(1, {"loss": 0.5})]


def test_each_record_is_counted_once(run: Run, devices: FakeDevices, folders: Folders) -> None:
    for step in range(3):
        run.log({"loss": tensor(), "lr": 0.1}, step=step)
        devices.land()
    run.finish()
    assert (records(folders), len(logged(folders)), losses(folders)) == (6, 6, {})


def test_more_than_a_ring_comes_while_it_lands(
    run: Run, devices: FakeDevices, folders: Folders
) -> None:
    for step in range(3 * ROWS):
        if step % ROWS == 0:
            wait_until(lambda logged_before=step: len(logged(folders)) == logged_before)
        run.log({"loss": tensor(float(step))}, step=step)
        devices.land()
    run.finish()
    found = sorted(logged(folders), key=lambda one: one[0])
    assert found == [(step, {"loss": float(step)}) for step in range(3 * ROWS)]


def test_they_come_while_the_senders_thread_is_held_up(
    run: Run, devices: FakeDevices, folders: Folders
) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Blocking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            entered.set()
            leave.wait(DEADLINE_S)

    handler = Blocking()
    logging.getLogger("trackagent").addHandler(handler)
    try:
        run.log({"lr": None})
        assert entered.wait(DEADLINE_S)
        for step in range(3 * ROWS):
            run.log({"loss": tensor(float(step))}, step=step)
            devices.land()
    finally:
        logging.getLogger("trackagent").removeHandler(handler)
        leave.set()
    run.finish()
    assert sorted(step for step, _ in logged(folders)) == list(range(3 * ROWS))
    assert losses(folders) == {"not a number": 1}


# --- what is refused


@pytest.mark.parametrize("shape", [(2, 3), (0,)], ids=str)
def test_more_or_fewer_than_one_number_are_refused_by_name(
    run: Run,
    devices: FakeDevices,
    folders: Folders,
    caplog: pytest.LogCaptureFixture,
    shape: tuple[int, ...],
) -> None:
    run.log({"weights": tensor(shape=shape), "loss": tensor(0.5)}, step=1)
    devices.land_all()
    run.finish()
    assert (logged(folders), losses(folders)) == ([(1, {"loss": 0.5})], {"not a number": 1})
    assert warnings(caplog) == [
        f"'weights' is a DeviceTensor, of shape {shape}, which is no number: log a float"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ({"a": 1.0}, tensor(7)),
            "the step is a tensor on cuda:0, and reading it would make the training loop wait: give an int",
        ),
        (
            ({"a": 1.0}, 7, tensor(7)),
            "the timestamp is a tensor on cuda:0, and reading it would make the training loop wait: give "
            "seconds since 1970, or a datetime",
        ),
        (
            ({"a": [tensor()]}, 7),
            "'a' is a list, [<tensor on cuda:0>], which is no number: log a float",
        ),
    ],
    ids=["step", "timestamp", "list"],
)
def test_a_tensor_in_another_place_is_refused_and_not_read(
    begin: Callable[..., Run], arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueRefused) as caught:
        begin(strict=True).log(*arguments)
    assert str(caught.value) == message


def test_calls_in_a_graphs_capture_are_refused_with_one_warning(
    run: Run, devices: FakeDevices, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    devices.capturing = True
    for step in range(3):
        run.log({"loss": tensor(), "lr": 0.1}, step=step)
    devices.capturing = False
    run.log({"loss": tensor(0.5)}, step=3)
    devices.land()
    run.finish()
    assert devices.copies == []
    assert logged(folders)[:3] == [(step, {"lr": 0.1}) for step in range(3)]
    assert (losses(folders), holes(folders)) == ({"graph capture": 3}, {0, 1, 2})
    [warning] = warnings(caplog)
    assert warning.endswith("would be captured with it: log after the capture")


def test_a_full_ring_drops_by_count_and_leaves_a_hole(
    run: Run, devices: FakeDevices, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(ROWS + 5):
        run.log({"loss": tensor(float(step))}, step=step)
    devices.land_all()
    run.finish()
    assert (len(logged(folders)), losses(folders)) == (ROWS, {"device ring full": 5})
    assert holes(folders) == set(range(ROWS, ROWS + 5))
    [warning] = warnings(caplog)
    assert "there is no room for more: log less often" in warning


def test_strict_raises_what_cannot_be_queued(
    begin: Callable[..., Run], devices: FakeDevices, folders: Folders
) -> None:
    run = begin(strict=True)
    devices.on_gather = fail(RuntimeError("CUDA error: launch failed"))
    with pytest.raises(ValueRefused, match=r"copied from cuda:0 \(CUDA error: launch failed\)"):
        run.log({"loss": tensor(), "lr": 0.1}, step=1)
    assert logged(folders) == [(1, {"lr": 0.1})]


def test_what_a_signal_handler_raises_leaves_log(run: Run, devices: FakeDevices) -> None:
    devices.on_gather = fail(TimeoutError("watchdog"))
    with pytest.raises(TimeoutError, match="watchdog"):
        run.log({"loss": tensor()})


def test_a_value_that_finds_the_journal_full_is_counted(
    run: Run, devices: FakeDevices, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.log({"loss": tensor()}, step=7)
    with monkeypatch.context() as patch:
        patch.setattr(run._journal, "write_metrics", fail_with_a_full_journal)
        devices.land()
        wait_until(lambda: losses(folders) == {"journal full": 1})
    assert holes(folders) == {7}


def fail_with_a_full_journal(*arguments: object, **keywords: object) -> None:
    raise JournalError("full")


# --- at the end


def test_finish_waits_for_the_last_ones(
    begin: Callable[..., Run],
    devices: FakeDevices,
    folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRACKAGENT_EXIT_TIMEOUT_S", "60")
    lander = threading.Thread(target=devices.land_all)
    # They land when finish() is under way already.
    run = begin(on_finish=lambda deadline: lander.start())
    for step in range(5):
        run.log({"loss": tensor(float(step))}, step=step)
    run.finish()
    lander.join()
    assert logged(folders) == [(step, {"loss": float(step)}) for step in range(5)]
    assert (records(folders), losses(folders)) == (5, {})


def test_what_never_comes_is_counted_when_the_run_finishes(
    run: Run, devices: FakeDevices, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (3, 4):
        run.log({"loss": tensor(), "lr": 0.1}, step=step)
    devices.land(1)
    run.finish()
    assert logged(folders) == [(3, {"lr": 0.1}), (4, {"lr": 0.1}), (4, {"loss": 0.5})]
    assert (records(folders), losses(folders)) == (3, {"not computed in time": 1})
    assert holes(folders) == {3}
    [warning] = warnings(caplog)
    assert warning.startswith("some values were still being computed by a device when the run")


def test_a_later_run_has_nothing_of_what_came_too_late(
    begin: Callable[..., Run], devices: FakeDevices, folders: Folders
) -> None:
    first = begin()
    for step in range(ROWS):
        first.log({"loss": tensor(-1.0)}, step=step)
    first.finish()
    second = begin()
    devices.land_all()
    second.log({"loss": tensor(1.0)}, step=0)  # no row is free before somebody has looked
    wait_until(lambda: losses(folders).get("device ring full") == 1)

    def takes() -> bool:
        second.log({"loss": tensor(2.0)}, step=1)
        devices.land_all()
        return bool(logged(folders))

    wait_until(takes)
    second.finish()
    assert {values["loss"] for _, values in logged(folders)} == {2.0}


# --- forks


def test_a_forked_process_logs_its_own_and_leaves_the_parents(
    run: Run, devices: FakeDevices, folders: Folders
) -> None:
    run.log({"loss": tensor(1.0)}, step=1)

    def child() -> int:
        devices.land_all()  # in its copy of the parent's memory
        run.log({"loss": tensor(2.0)}, step=2)
        devices.land_all()
        run.finish()
        return len(devices.allocated)

    assert in_a_forked_process(child) == 2
    assert logged(folders) == [(2, {"loss": 2.0})]
    devices.land_all()
    run.finish()
    assert sorted(logged(folders), key=lambda one: one[0]) == [
        (1, {"loss": 1.0}),
        (2, {"loss": 2.0}),
    ]
