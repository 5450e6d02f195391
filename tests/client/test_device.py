"""Values on their way from a device: they come when they have landed, each once, and nobody waits."""

from __future__ import annotations

import math
import struct
import threading
from collections import Counter
from collections.abc import Mapping

import pytest

from tests.client.devices import DeviceTensor, FakeDevices, fail
from tests.fakes import in_a_forked_process
from trackagent.client.device import EMPTY, ROWS, WIDTH, InFlight, Rings, are_whole
from trackagent.client.errors import ValueRefused

HIGH, LOW = EMPTY >> 32 << 32, EMPTY & 0xFFFF_FFFF


def word_as_float(word: int) -> float:
    [value] = struct.unpack("=d", struct.pack("=Q", word))
    return float(value)


@pytest.fixture
def devices() -> FakeDevices:
    return FakeDevices()


@pytest.fixture
def rings(devices: FakeDevices) -> Rings:
    return Rings(lambda: devices)


@pytest.fixture
def in_flight(rings: Rings) -> InFlight:
    return InFlight(rings, None)


def queue(in_flight: InFlight, step: int, *values: float, device: str = "cuda:0") -> None:
    tensors = {f"v{i}": DeviceTensor(value, device) for i, value in enumerate(values)}
    in_flight.queue(tensors, step=step, time_ns=1000 + step)


def come(in_flight: InFlight) -> list[tuple[int, Mapping[str, float]]]:
    return [(one.step, one.values) for one in in_flight.landed()]


def refusal(in_flight: InFlight, step: int = 0, device: str = "cuda:0") -> tuple[str, str]:
    """The reason, and the message."""
    with pytest.raises(ValueRefused) as caught:
        queue(in_flight, step, 1.0, device=device)
    return caught.value.reason, str(caught.value)


def fill(in_flight: InFlight) -> None:
    for step in range(ROWS):
        queue(in_flight, step, float(step))


# --- when a record comes


def test_a_record_comes_when_its_copy_has_landed(in_flight: InFlight, devices: FakeDevices) -> None:
    queue(in_flight, 7, 0.5)
    before = come(in_flight)
    devices.land()
    assert (before, come(in_flight), come(in_flight)) == ([], [(7, {"v0": 0.5})], [])


def test_it_keeps_its_time(in_flight: InFlight, devices: FakeDevices) -> None:
    queue(in_flight, 7, 0.5)
    devices.land()
    [one] = in_flight.landed()
    assert one.time_ns == 1007


def test_a_record_comes_once_all_of_its_values_have(
    in_flight: InFlight, devices: FakeDevices
) -> None:
    queue(in_flight, 7, 1.0, 2.0, 3.0)
    seen = []
    for column in (2, 0, 1):
        seen.append(come(in_flight))
        devices.copies[0].land_one(column)
    assert seen == [[], [], []]
    assert come(in_flight) == [(7, {"v0": 1.0, "v1": 2.0, "v2": 3.0})]


def test_records_may_land_out_of_step(in_flight: InFlight, devices: FakeDevices) -> None:
    for step in range(4):
        queue(in_flight, step, float(step))
    devices.land(3)
    devices.land(1)
    first = come(in_flight)
    devices.land_all()
    assert first == [(1, {"v0": 1.0}), (3, {"v0": 3.0})]
    assert come(in_flight) == [(0, {"v0": 0.0}), (2, {"v0": 2.0})]


def test_values_of_several_devices_are_one_record(
    in_flight: InFlight, devices: FakeDevices
) -> None:
    tensors = {"a": DeviceTensor(1.0, "cuda:0"), "b": DeviceTensor(2.0, "cuda:1")}
    in_flight.queue(tensors, step=3, time_ns=0)
    devices.land(1)
    before = come(in_flight)
    devices.land()
    assert (before, come(in_flight)) == ([], [(3, {"a": 1.0, "b": 2.0})])
    assert devices.allocated == ["cuda:0", "cuda:1"]


def test_a_record_may_have_more_values_than_a_row(
    in_flight: InFlight, devices: FakeDevices
) -> None:
    values = [float(i) for i in range(2 * WIDTH + 1)]
    queue(in_flight, 0, *values)
    assert [len(copy.values) for copy in devices.copies] == [WIDTH, WIDTH, 1]
    devices.land_all()
    assert come(in_flight) == [(0, {f"v{i}": value for i, value in enumerate(values)})]


@pytest.mark.parametrize(
    "value",
    [0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, word_as_float(EMPTY ^ 1 ^ 1 << 40)],
    ids=repr,
)
def test_a_value_keeps_its_bits(in_flight: InFlight, devices: FakeDevices, value: float) -> None:
    queue(in_flight, 0, value)
    devices.land()
    [one] = in_flight.landed()
    assert struct.pack("<d", one.values["v0"]) == struct.pack("<d", value)


@pytest.mark.parametrize("word", [HIGH | 1, 1 << 32 | LOW])
def test_a_value_that_looks_half_written_comes_at_the_second_look(
    in_flight: InFlight, devices: FakeDevices, word: int
) -> None:
    queue(in_flight, 0, word_as_float(word))
    devices.land()
    first = come(in_flight)
    [one] = in_flight.landed()
    assert first == []
    assert struct.pack("=d", one.values["v0"]) == struct.pack("=Q", word)


@pytest.mark.parametrize(
    ("words", "before", "whole"),
    [
        ([EMPTY], [EMPTY], False),
        ([0, EMPTY], [0, EMPTY], False),
        ([0, 1], [], True),
        ([HIGH | 5], [EMPTY], False),
        ([5 << 32 | LOW], [], False),
        ([5 << 32 | LOW], [HIGH | 5], False),
        ([HIGH | 5], [HIGH | 5], True),
    ],
)
def test_words_are_whole(words: list[int], before: list[int], whole: bool) -> None:
    assert are_whole(words, before) is whole


def test_what_has_not_landed_is_on_its_way_at_every_moment_of_a_look(
    in_flight: InFlight, devices: FakeDevices
) -> None:
    for step in range(4):
        queue(in_flight, step, 0.0)
    devices.land(2)
    devices.land(0)
    assert [len(in_flight) for _ in in_flight.landed()] == [3, 2]


def test_a_record_that_is_given_up_in_the_middle_of_a_look_does_not_come(
    in_flight: InFlight, devices: FakeDevices
) -> None:
    queue(in_flight, 0, 0.5)
    queue(in_flight, 1, 0.5)
    devices.land_all()
    found = [(one.step, in_flight.give_up()) for one in in_flight.landed()]
    assert found == [(0, [1])]
    come(in_flight)
    fill(in_flight)  # each row is free, once
    assert refusal(in_flight)[0] == "device ring full"


# --- rows


def test_a_full_ring_refuses_and_keeps_what_is_on_its_way(
    in_flight: InFlight, devices: FakeDevices
) -> None:
    fill(in_flight)
    assert refusal(in_flight) == (
        "device ring full",
        f"{ROWS} rows of values are on their way from cuda:0, and there is no room for more: log less often",
    )
    devices.land_all()
    assert [step for step, _ in come(in_flight)] == list(range(ROWS))


def test_a_row_is_free_again_once_it_was_read(in_flight: InFlight, devices: FakeDevices) -> None:
    fill(in_flight)
    devices.land(5)
    unread = refusal(in_flight)[0]
    come(in_flight)
    queue(in_flight, 9999, 1.0)
    assert unread == "device ring full"
    assert refusal(in_flight)[0] == "device ring full"


def test_a_refused_record_takes_no_rows(in_flight: InFlight, devices: FakeDevices) -> None:
    for step in range(ROWS - 1):
        queue(in_flight, step, 0.0)
    with pytest.raises(ValueRefused):
        queue(in_flight, 0, *range(WIDTH + 1))
    queue(in_flight, ROWS, 1.0)
    assert len(devices.copies) == ROWS


def test_a_full_ring_of_one_device_leaves_the_others_alone(
    in_flight: InFlight, devices: FakeDevices
) -> None:
    fill(in_flight)
    queue(in_flight, 1, 2.0, device="cuda:1")
    devices.land(ROWS)
    assert come(in_flight) == [(1, {"v0": 2.0})]


def test_what_lands_after_it_was_given_up_is_no_other_records(
    rings: Rings, devices: FakeDevices
) -> None:
    earlier, later = InFlight(rings, None), InFlight(rings, None)
    fill(earlier)
    assert earlier.give_up() == list(range(ROWS))
    devices.land_all()
    assert refusal(later)[0] == "device ring full"  # nobody has looked yet
    found = come(later)
    for step in range(ROWS):
        queue(later, step, -1.0)
    devices.land_all()
    assert found == []
    assert {values["v0"] for _, values in come(later)} == {-1.0}


def test_it_is_time_to_look_when_half_of_a_ring_is_taken(
    rings: Rings, devices: FakeDevices
) -> None:
    woken: list[int] = []
    in_flight = InFlight(rings, lambda: woken.append(len(devices.copies)))
    fill(in_flight)
    devices.land_all()
    come(in_flight)
    fill(in_flight)
    assert woken == [ROWS // 2 + 1, ROWS // 2 + 1]


# --- what goes wrong


def test_nothing_is_queued_while_a_graph_is_captured(
    in_flight: InFlight, devices: FakeDevices
) -> None:
    devices.capturing = True
    assert refusal(in_flight) == (
        "graph capture",
        "a graph is being captured on cuda:0, and the copies of logged values would be captured with it: log "
        "after the capture",
    )
    assert (devices.allocated, devices.copies) == ([], [])


def test_a_device_without_memory_is_not_asked_again(
    in_flight: InFlight, devices: FakeDevices
) -> None:
    asked: list[int] = []

    def no_memory() -> None:
        asked.append(1)
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    devices.on_allocate = no_memory
    found = [refusal(in_flight) for _ in range(3)]
    assert found == 3 * [
        (
            "device error",
            "values cannot be copied from cuda:0 (CUDA error: out of memory): log tensor.item()",
        )
    ]
    assert len(asked) == 1


def test_rows_of_what_a_device_did_not_take_are_free(
    in_flight: InFlight, devices: FakeDevices
) -> None:
    devices.on_gather = fail(RuntimeError("launch failed"))
    reasons = {refusal(in_flight)[0] for _ in range(ROWS + 1)}
    devices.on_gather = lambda: None
    fill(in_flight)
    assert (reasons, len(devices.copies)) == ({"device error"}, ROWS)


def test_a_row_of_which_nobody_knows_whether_it_lands_is_free_when_it_has(
    in_flight: InFlight, devices: FakeDevices
) -> None:
    devices.on_send = fail(RuntimeError("launch failed"))
    assert refusal(in_flight)[0] == "device error"
    devices.on_send = lambda: None
    for step in range(ROWS - 1):
        queue(in_flight, step, 0.0)
    unknown = refusal(in_flight)[0]
    devices.land(0)
    found = come(in_flight)
    queue(in_flight, ROWS, 1.0)
    assert (unknown, found) == ("device ring full", [])


@pytest.mark.parametrize("where", ["on_gather", "on_send"])
def test_what_a_signal_handler_raises_leaves(
    in_flight: InFlight, devices: FakeDevices, where: str
) -> None:
    setattr(devices, where, fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        queue(in_flight, 0, 1.0)
    assert (len(in_flight), in_flight.give_up()) == (0, [])


def test_a_call_may_interrupt_another(in_flight: InFlight, devices: FakeDevices) -> None:
    def interrupt() -> None:
        devices.on_gather = lambda: None
        queue(in_flight, 2, 0.2)

    devices.on_gather = interrupt
    queue(in_flight, 1, 0.1)
    devices.land_all()
    assert come(in_flight) == [(2, {"v0": 0.2}), (1, {"v0": 0.1})]


def test_calls_in_many_threads_come_once_each(in_flight: InFlight, devices: FakeDevices) -> None:
    threads, calls = 8, 500
    refused: list[str] = []
    barrier = threading.Barrier(threads + 1)

    def work(number: int) -> None:
        barrier.wait()
        for call in range(calls):
            try:
                queue(in_flight, number * calls + call, float(number), float(call))
            except ValueRefused as error:
                refused.append(error.reason)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    found = []
    barrier.wait()
    while any(worker.is_alive() for worker in workers):
        devices.land_all()
        found += come(in_flight)
    devices.land_all()
    found += come(in_flight)
    assert [values for step, values in found] == [
        {"v0": float(step // calls), "v1": float(step % calls)} for step, _ in found
    ]
    assert max(Counter(step for step, _ in found).values()) == 1
    assert len(found) + len(refused) == threads * calls


def test_a_forked_child_has_rings_of_its_own(rings: Rings, devices: FakeDevices) -> None:
    fill(InFlight(rings, None))

    def child() -> tuple[int, list[str], bool]:
        inherited = len(rings.all())
        queue(InFlight(rings, None), 0, 1.0)
        return inherited, devices.allocated, devices.copies[-1].words is devices.copies[0].words

    assert in_a_forked_process(child) == (0, ["cuda:0", "cuda:0"], False)
    assert len(rings.all()) == 1
