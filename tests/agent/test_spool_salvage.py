"""What becomes of a damaged spool under a running agent, when the process dies while it is replaced, and of
one that is an older copy of itself."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.agent.samples import Connections, losses, producer
from tests.agent.sinks import FakeSink
from tests.agent.spools import ANY_SIZE, ID, OpenSpool, spooled
from tests.fakes import DEADLINE_S, AgentProcess, Folders, next_line, start_script, wait_until
from trackagent.agent import quarantine
from trackagent.agent.deadletters import DeadLetters
from trackagent.agent.pagelog import PAGE_BYTES
from trackagent.agent.pipeline import Pipeline
from trackagent.agent.spool import Delivery, Spool, SpoolError

PIECE = losses(range(3000))


class Remembering(FakeSink):
    """Knows what it has, as the store does."""

    def last_accepted(self, origin: str) -> int:
        return max((one.id.last for one in self.accepted if one.id.origin == origin), default=0)


def filled(spool: Spool, pieces: int) -> None:
    at = spool.open_producer(producer(), {}).result().get(0, 0)
    for _ in range(pieces):
        at = spool.append(ID, 0, at, PIECE).result()


def root_of(path: Path, table: str) -> int:
    connection = sqlite3.connect(f"file:{path}?immutable=1", uri=True)
    (page,) = connection.execute(
        "SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)
    ).fetchone()
    connection.close()
    return int(page)


def spoil(path: Path, *tables: str) -> None:
    """Makes the root page of each table unreadable."""
    pages = [root_of(path, table) for table in tables]
    with path.open("r+b") as file:
        for page in pages:
            file.seek((page - 1) * PAGE_BYTES)
            file.write(bytes(range(256)) * (PAGE_BYTES // 256))


def reasons(folders: Folders) -> list[str]:
    return [path.read_text() for path in (folders.state / "quarantine").glob("*.reason")]


# --- set aside


def overwritten(path: Path, start: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(random.Random(1).randbytes(length))


def test_damage_that_cannot_be_put_into_words_is_damage(
    open_spool: OpenSpool, folders: Folders
) -> None:
    """SQLite's message quotes the name of the table, which is no text any more."""
    spool = open_spool()
    spool.add_sink("store").result()
    filled(spool, 2)
    spool.close()
    path = folders.state / "spool.db"
    data = path.read_bytes()
    for good, bad in (
        (b"tablelanes", b"table\xff\xff\xff\xff\xff"),
        (b"TABLE lanes ", b"XABLE lanes "),
    ):
        assert good in data
        data = data.replace(good, bad)
    path.write_bytes(data)
    with contextlib.closing(open_spool()) as spool:
        assert len(spooled(spool)) == 2
    assert len(reasons(folders)) == 1


def many_pages(open_spool: OpenSpool) -> None:
    spool = open_spool()
    spool.open_producer(producer(), {}).result()
    spool.append(ID, 0, 0, losses(range(4000))).result()
    spool.close()


@pytest.mark.parametrize(
    ("start", "length", "left"),
    [(0, 4096, 1), (4096, 8192, 0), (80_000, 40_000, 1)],
    ids=["head", "start", "middle"],
)
def test_a_damaged_spool_does_not_block_a_start(
    open_spool: OpenSpool, folders: Folders, start: int, length: int, left: int
) -> None:
    many_pages(open_spool)
    overwritten(folders.state / "spool.db", start, length)
    assert open_spool().statistics().result()["batches"] == left


def test_a_damaged_spool_is_set_aside_as_it_was(open_spool: OpenSpool, folders: Folders) -> None:
    many_pages(open_spool)
    overwritten(folders.state / "spool.db", 0, 4096)
    damaged = (folders.state / "spool.db").read_bytes()
    open_spool()
    aside = list((folders.state / "quarantine").glob("*-spool.db"))
    assert [path.read_bytes() for path in aside] == [damaged]


def test_the_reason_lies_beside_a_spool_that_was_set_aside(
    open_spool: OpenSpool, folders: Folders
) -> None:
    many_pages(open_spool)
    overwritten(folders.state / "spool.db", 0, 4096)
    open_spool()
    (reason,) = (folders.state / "quarantine").glob("*.reason")
    assert reason.read_text().startswith(
        "file is not a database of this program (byte 0 of its head);"
    )


def test_the_log_of_a_damaged_spool_is_set_aside_with_it(
    open_spool: OpenSpool, folders: Folders
) -> None:
    many_pages(open_spool)
    # As long as somebody else has the file open, SQLite does not delete its log.
    other = sqlite3.connect(folders.state / "spool.db")
    other.execute("CREATE TABLE other (x)")
    log = (folders.state / "spool.db-wal").read_bytes()
    overwritten(folders.state / "spool.db", 0, 4096)
    open_spool()
    aside = list((folders.state / "quarantine").glob("*-spool.db-wal"))
    other.close()
    assert [path.read_bytes()[: len(log)] for path in aside] == [log]


def test_a_spool_set_aside_is_told_with_its_place(
    open_spool: OpenSpool, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    many_pages(open_spool)
    overwritten(folders.state / "spool.db", 0, 4096)
    open_spool()
    (aside,) = (folders.state / "quarantine").glob("*-spool.db")
    assert [one.getMessage() for one in caplog.records if one.levelname == "ERROR"] == [
        f"{folders.state / 'spool.db'} is unreadable (file is not a database of this program (byte 0 of its "
        "head); 1 batches and 1 producers are brought over, known to be missing: nothing): set aside as "
        f"{aside}"
    ]


def test_a_spool_on_a_failing_disk_is_not_set_aside(
    open_spool: OpenSpool, folders: Folders, connections: Connections
) -> None:
    open_spool().close()

    def connect(path: Path, **keywords: Any) -> sqlite3.Connection:
        connection = connections(path, **keywords)
        connections.last.failing = "PRAGMA synchronous"
        connections.last.error = sqlite3.OperationalError("disk I/O error")
        return connection

    with pytest.raises(SpoolError, match="disk I/O error"):
        open_spool(connect=connect)
    assert not (folders.state / "quarantine").exists()


# --- a log that is destroyed

FILL = """
import os, signal, sys
from pathlib import Path
from tests.agent.samples import losses, producer
from trackagent.agent.spool import Spool

spool = Spool(Path(sys.argv[1]), max_bytes=1 << 30)
spool.open_producer(producer(), {}).result()
spool.open_producer(producer(1), {}).result()
spool.append(producer().producer_id, 0, 0, losses(range(100))).result()
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def filled_by_another(folders: Folders, end: str) -> None:
    """A process takes something, and is killed or exits without closing."""
    folders.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [sys.executable, "-c", FILL, str(folders.state / "spool.db"), end]
    subprocess.run(command, timeout=DEADLINE_S, check=False)


def removed(log: Path) -> None:
    log.unlink()


def emptied(log: Path) -> None:
    log.write_bytes(b"")


def zeroed(log: Path) -> None:
    log.write_bytes(bytes(log.stat().st_size))


def random_bytes(log: Path) -> None:
    log.write_bytes(random.Random(1).randbytes(log.stat().st_size))


def few_random_bytes(log: Path) -> None:
    log.write_bytes(random.Random(1).randbytes(20))


def removed_with_the_file(log: Path) -> None:
    log.unlink()
    log.with_name("spool.db").unlink()


@pytest.mark.parametrize(
    "destroy", [removed, emptied, zeroed, random_bytes, few_random_bytes, removed_with_the_file]
)
def test_a_destroyed_log_of_an_agent_that_was_killed_is_told(
    open_spool: OpenSpool,
    folders: Folders,
    caplog: pytest.LogCaptureFixture,
    destroy: Callable[[Path], None],
) -> None:
    filled_by_another(folders, "killed")
    destroy(folders.state / "spool.db-wal")
    spool = open_spool()
    assert spool.statistics().result()["lost_batches"] == 1
    assert sum(one.levelname == "ERROR" for one in caplog.records) == 1
    # Once, and it goes on.
    filled(spool, 1)
    spool.close()
    caplog.clear()
    assert open_spool().statistics().result()["lost_batches"] == 1
    assert [one.getMessage() for one in caplog.records] == []


def test_what_stands_behind_a_destroyed_beginning_of_a_log_is_brought_over(
    open_spool: OpenSpool, folders: Folders
) -> None:
    filled_by_another(folders, "killed")
    log = folders.state / "spool.db-wal"
    overwritten(log, 0, 32 + 2 * (24 + PAGE_BYTES))
    spool = open_spool()
    spool.add_sink("store").result()
    found = spool.next_delivery("store", ANY_SIZE).result()
    assert found is not None
    assert [batch.journal_bytes for batch in found.batches] == [losses(range(100))]
    assert len(reasons(folders)) == 1


@pytest.mark.parametrize("end", ["killed", "exits"])
def test_a_log_that_is_whole_or_done_with_is_no_damage(
    open_spool: OpenSpool, folders: Folders, end: str
) -> None:
    for _ in range(2):
        filled_by_another(folders, end)
    statistics = open_spool().statistics().result()
    assert (statistics["batches"], statistics["lost_batches"]) == (1, 0)
    assert reasons(folders) == []


def test_an_agent_that_was_killed_and_had_taken_nothing_lost_nothing(
    open_spool: OpenSpool, folders: Folders
) -> None:
    copies = folders.state / "copy.db"
    spool = open_spool()
    shutil.copy(folders.state / "spool.db", copies)  # its log is not there
    spool.close()
    copies.rename(folders.state / "spool.db")
    assert open_spool().statistics().result()["lost_batches"] == 0
    assert reasons(folders) == []


# --- where the cursor is lost


def drained(spool: Spool, sink: FakeSink, folder: Path) -> None:
    letters = DeadLetters(folder, sink.name, max_bytes=ANY_SIZE)
    pipeline = Pipeline(spool, sink, interval_s=0.0, dead_letters=letters)
    pipeline.start()
    pipeline.stop(30)


def test_what_the_sink_has_is_not_delivered_again_when_the_cursor_is_lost(
    open_spool: OpenSpool, folders: Folders, tmp_path: Path
) -> None:
    first = open_spool()
    sink = Remembering("store")
    filled(first, 2)
    first.add_sink("copy").result()  # so that what the other has stays
    drained(first, sink, tmp_path)
    first.close()
    spoil(folders.state / "spool.db", "sinks", "sinks_copy")
    second = open_spool()
    filled(second, 1)
    drained(second, sink, tmp_path)
    assert len(sink.steps) == 3 * 3000


def test_nothing_comes_twice_when_even_the_name_is_lost(
    open_spool: OpenSpool, folders: Folders, tmp_path: Path
) -> None:
    first = open_spool()
    sink = Remembering("store")
    filled(first, 1)
    first.add_sink("copy").result()
    drained(first, sink, tmp_path)
    filled(first, 1)
    first.close()
    spoil(folders.state / "spool.db", "spool", "spool_copy", "sinks", "sinks_copy")
    second = open_spool()
    drained(second, sink, tmp_path)
    assert len(sink.steps) == 3000
    (message,) = {
        event.message
        for batch in sink.accepted
        for event in batch.events
        if event.data.get("start")
    }
    assert "are lost: the spool was damaged" in message
    assert second.add_sink("another").result() != sink.accepted[0].id.origin


# --- an older copy


def test_an_older_copy_uses_no_id_of_before_for_other_bytes(
    open_spool: OpenSpool, folders: Folders, tmp_path: Path
) -> None:
    first = open_spool()
    sink = Remembering("store")
    filled(first, 1)
    drained(first, sink, tmp_path)
    first.close()
    older = folders.state / "older.db"
    shutil.copy(folders.state / "spool.db", older)
    second = open_spool()
    filled(second, 2)
    drained(second, sink, tmp_path)
    second.close()
    shutil.copy(older, folders.state / "spool.db")

    third = open_spool()
    # The rank knows that more was acknowledged.
    third.open_producer(producer(), {0: 3 * len(PIECE)}).result()
    filled(third, 1)
    drained(third, sink, tmp_path)
    before, after = {b.id.origin for b in sink.accepted[:2]}, sink.accepted[2:]
    assert before.isdisjoint(batch.id.origin for batch in after)
    assert len(sink.steps) == 4 * 3000
    (event,) = [event for batch in after for event in batch.events]
    assert f"{2 * len(PIECE)} bytes of lane 0" in event.message


def test_of_an_older_copy_nothing_that_the_sink_has_is_delivered_again(
    open_spool: OpenSpool, folders: Folders, tmp_path: Path
) -> None:
    first = open_spool()
    sink = Remembering("store")
    first.add_sink("store").result()
    filled(first, 2)
    first.close()
    older = folders.state / "older.db"
    shutil.copy(folders.state / "spool.db", older)
    second = open_spool()
    drained(second, sink, tmp_path)
    second.close()
    shutil.copy(older, folders.state / "spool.db")
    third = open_spool()
    drained(third, sink, tmp_path)
    assert len(sink.steps) == 2 * 3000
    assert third.statistics().result()["batches"] == 0


# --- while it runs


@pytest.mark.parametrize(("at", "length"), [(0, PAGE_BYTES), (2000, 8)], ids=["page", "bytes"])
def test_a_page_that_goes_bad_under_a_running_agent_is_mended(
    open_spool: OpenSpool, folders: Folders, at: int, length: int
) -> None:
    spool = open_spool()
    spool.add_sink("store").result()
    filled(spool, 60)
    path = folders.state / "spool.db"
    other = sqlite3.connect(path)
    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    other.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2 // PAGE_BYTES * PAGE_BYTES + at)
        file.write(bytes(length))

    found: list[Delivery] = []
    failed = 0
    while True:
        future = spool.next_delivery("store", 1 << 20)
        if isinstance(future.exception(), sqlite3.DatabaseError):
            failed += 1
            continue
        delivery = future.result()
        if delivery is None:
            break
        found.append(delivery)
        spool.delivered("store", delivery.id.last).result()
    pieces = [batch.journal_bytes for one in found for batch in one.batches]
    assert failed == 1
    assert len(pieces) == 60
    assert sum(piece != PIECE for piece in pieces) == 1
    assert len(reasons(folders)) == 1


def test_a_spool_that_cannot_be_replaced_yet_fails_what_is_asked_and_is_replaced_later(
    open_spool: OpenSpool, folders: Folders
) -> None:
    full = False

    def connect(path: Path, **keywords: Any) -> sqlite3.Connection:
        if full:
            raise OSError("No space left on device")
        return sqlite3.connect(path, **keywords)

    spool = open_spool(connect=connect)
    filled(spool, 5)
    spool.close()
    path = folders.state / "spool.db"
    # In a batch in the middle, at which opening does not look.
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 // PAGE_BYTES * PAGE_BYTES + 2000)
        file.write(bytes(8))
    spool = open_spool(connect=connect)
    spool.add_sink("store").result()
    full = True
    problems = [spool.next_delivery("store", ANY_SIZE).exception() for _ in range(3)]
    assert [type(problem) for problem in problems[1:]] == [SpoolError] * 2
    assert "cannot be replaced: No space left" in str(problems[2])
    full = False
    found = spool.next_delivery("store", ANY_SIZE).result()
    assert found is not None
    assert len(found.batches) == 5


# --- dying while it is replaced


@pytest.mark.parametrize("step", ["os.replace", "shutil.move", "set_aside"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_process_that_dies_while_it_replaces_a_spool_loses_nothing(
    open_spool: OpenSpool,
    folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    nth: int,
) -> None:
    spool = open_spool()
    filled(spool, 3)
    spool.close()
    spoil(folders.state / "spool.db", "lanes")
    left = nth

    class Died(BaseException):
        pass

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Died
            return call(*arguments)

        return wrapped

    with monkeypatch.context() as patch:
        owner, _, name = step.rpartition(".")
        target = getattr(quarantine, owner) if owner else quarantine
        patch.setattr(target, name, dying(getattr(target, name)))
        try:
            open_spool().close()
        except Died:
            assert left == 0
    again = open_spool()
    again.add_sink("store").result()
    found = again.next_delivery("store", ANY_SIZE).result()
    assert found is not None
    assert [batch.journal_bytes for batch in found.batches] == [PIECE] * 3
    assert again.committed(ID).result() == {0: 3 * len(PIECE)}


# --- the real agent

LOG = """
from trackagent import client
run = client.init(experiment="damage")
for step in range(500):
    client.log({"loss": float(step)}, step=step)
print(run.id, flush=True)
input()
for step in range(500, 600):
    client.log({"loss": float(step)}, step=step)
client.finish()
"""


@pytest.mark.parametrize("start", [0, 0.5], ids=["head", "middle"])
def test_an_agent_starts_on_a_damaged_spool_and_delivers_what_is_whole(
    own_agent: Callable[..., AgentProcess], folders: Folders, start: float
) -> None:
    agent = own_agent("--deliver-interval-s", "0.02").start()
    with start_script(folders, LOG) as script:
        run_id = next_line(script)
        wait_until(lambda: (run := agent.run(run_id)) is not None and run.records_stored >= 500)
        agent.kill()
        path = folders.state / "spool.db"
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(int(start * size))
            file.write(b"\xff" * 64)
        agent.start()
        script.communicate("\n", timeout=30)
        assert script.returncode == 0
    agent.wait_for_status(run_id, "finished")
    steps = sorted(point.step for point in agent.exported(run_id) if point.key == "loss")
    assert steps == list(range(600))


def test_status_names_batches_that_belong_to_no_known_run(
    own_agent: Callable[..., AgentProcess], open_spool: OpenSpool, folders: Folders
) -> None:
    spool = open_spool()
    filled(spool, 3)
    spool.close()
    spoil(folders.state / "spool.db", "producers", "producers_copy")
    agent = own_agent().start()
    lost = json.loads(agent.run_cli("status", "--json").stdout)["lost_records"]
    assert lost == {"batches of unknown runs, lost with a damaged spool": 3}
    agent.stop()
    agent.start()
    assert json.loads(agent.run_cli("status", "--json").stdout)["lost_records"] == lost
