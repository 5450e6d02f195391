"""Whatever bytes a journal holds: they are read or told to be unreadable, stored, and shown."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Iterator
from itertools import count

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import trackagent.agent.store as store
from tests.agent.samples import producer
from tests.fakes import Folders, short_folder
from tests.fuzz import examples
from tests.fuzz.hostile import LARGE, STREAMS, whole
from trackagent.agent.cli import main
from trackagent.agent.config import STORE_NAME
from trackagent.agent.decode import decode
from trackagent.agent.pipeline import DELIVERY_BYTES
from trackagent.agent.spool import Spool
from trackagent.client import record
from trackagent.client.record import HEAD_BYTES, MAX_RECORD_BYTES, Kind

TIMEOUT_S = 20
COMMANDS = (
    ("show", "{}"),
    ("show", "{}", "--json"),
    ("show", "{}", "--log"),
    ("tail", "{}", "--once"),
    ("export", "{}"),
    ("export", "{}", "--format", "csv"),
    ("export", "{}", "--gaps"),
    ("runs",),
    ("runs", "--json"),
)


@examples(100)
@given(STREAMS, st.integers(0, 64))
def test_scan_finds_valid_records_only_and_decode_raises_value_errors_only(
    data: bytes, start: int
) -> None:
    scan = record.scan(data, start)
    at = start
    for offset in scan.offsets:
        assert offset >= at
        assert record.is_valid(data, offset)
        length = int.from_bytes(data[offset : offset + 4], "little")
        assert HEAD_BYTES <= length <= MAX_RECORD_BYTES
        at = offset + length
        try:
            found = record.decode(data, offset)
        except ValueError:
            continue
        assert found.kind == data[offset + 8]
    assert max(at, start) <= max(scan.end, start) + 7
    assert all(start <= part.start < part.end <= scan.end for part in scan.damage)


@given(STREAMS, st.integers(0, 2**40))
@examples(40)
def test_no_place_in_any_bytes_makes_is_valid_raise(data: bytes, offset: int) -> None:
    assert record.is_valid(data, len(data) + offset) is False
    assert record.is_valid(data, offset % (len(data) + 1)) in (True, False)


class Node:
    """Spool and store of an agent, without its process: what is appended is delivered at once."""

    def __init__(self, folders: Folders) -> None:
        folders.state.mkdir(parents=True)
        self.folders = folders
        self.spool = Spool(folders.state / "spool.db", max_bytes=1 << 30, linger_s=0)
        self.spool.add_sink("store").result()
        self.writer = store.open_writer(folders.state / STORE_NAME)
        self.numbers = count()

    def close(self) -> None:
        self.spool.close()
        self.writer.close()

    def deliver(self, *batches: bytes) -> str:
        """Of a producer of its own; the run's id. Rejected when the store does not take it."""
        number = next(self.numbers)
        info = producer(producer_id=number.to_bytes(16, "big"), run_id=f"{number:032x}")
        self.spool.open_producer(info, {}).result(TIMEOUT_S)
        offset = 0
        for data in batches:
            offset = self.spool.append(info.producer_id, 0, offset, data).result(TIMEOUT_S)
        while (delivery := self.spool.next_delivery("store", DELIVERY_BYTES).result()) is not None:
            self.writer.write(decode(delivery, self.spool.keys))
            self.spool.delivered("store", delivery.id.last).result(TIMEOUT_S)
        while self.writer.compact(1.0):
            pass
        return info.run_id

    def cli(self, *arguments: str) -> str:
        """What a command prints, without an exception and with exit code 0."""
        done = CliRunner().invoke(main, arguments, env=self.folders.environment)
        assert done.exit_code == 0, (arguments, done.output)
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return done.output


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    base = short_folder()
    made = Node(Folders.under(base))
    yield made
    made.close()
    shutil.rmtree(base)


@examples(15)
@given(
    st.lists(STREAMS.filter(len), min_size=1, max_size=3),
    st.lists(st.sampled_from(COMMANDS), min_size=2, max_size=2),
)
def test_whatever_a_rank_sends_is_stored_and_shown(
    node: Node, batches: list[bytes], commands: list[tuple[str, ...]]
) -> None:
    run_id = node.deliver(*(data + bytes(-len(data) % 8) for data in batches))
    for command in commands:
        output = node.cli(*(part.format(run_id) for part in command))
        if "--json" in command:
            json.loads(output, parse_constant=no_json)


def no_json(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.slow
def test_what_ranks_send_takes_memory_in_proportion_to_its_bytes_and_keeps_none(node: Node) -> None:
    """Keys, which are remembered, included: however many a rank makes up."""
    tracemalloc.start()
    try:
        node.deliver(*LARGE)
        _, peak = tracemalloc.get_traced_memory()
        for number in range(25):
            node.deliver(keys_of_their_own(number))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * sum(map(len, LARGE))
    assert kept < 48 << 20


def keys_of_their_own(number: int) -> bytes:
    """A schema of 20 000 keys that no other has, and a record of it."""
    keys = "\n".join(f"{number}-{key}" for key in range(20_000)).encode()
    head = {"schema_id": number % 65536, "count": 20_000}
    return whole(Kind.SCHEMA, keys, **head) + whole(Kind.METRICS, bytes(8 * 20_000), **head)
