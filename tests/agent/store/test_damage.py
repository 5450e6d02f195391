"""The damage table of the embedded store: whatever becomes of its bytes, it opens, what is not damaged is
there once and to the bit, and where something is missing the run says so."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.agent.store.batches import (
    OTHER_RUN,
    RUN,
    batch,
    end,
    event,
    gap,
    loss,
    param,
    points,
    producer,
)
from tests.fakes import COMMAND, Folders
from trackagent.agent.store import database, open_reader, open_writer, schema
from trackagent.agent.store.contract import Batch, Setting, StoreError, node_run_id
from trackagent.agent.store.sqlite import SqliteWriter

PAGE = 4096
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
RANKS = [producer(rank) for rank in range(3)]
OTHER = producer(0, run=OTHER_RUN, node="node-b")
NODE = producer(0, run=node_run_id("node-a"), sampled="node node-a")
EYE = producer(0, sampled="rank 0", producer_id=b"who samples 0")
WIDE = tuple(f"layer.{i}/norm" for i in range(4))
Said = dict[str, Any]
Mutation = Callable[[bytearray], "bytearray | None"]


def noise(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n)


def batches() -> Iterator[Batch]:
    """What two runs log: points in chunks of each form, and one of everything else."""
    first = points(RANKS[0], range(1100), keys=("loss", "lr"), value=noise(1100, 1))
    second = points(OTHER, range(500), value=noise(500, 2))
    records = {RANKS[0].producer_id: 1100, OTHER.producer_id: 500}
    yield batch(1, *RANKS, OTHER, points=[first, second], metric_records=records)
    tag = Setting(RANKS[0].producer_id, "host", "a", 5)
    said: Said = {
        "params": [param(RANKS[0], f"param.{i}", f"value {i}") for i in range(30)],
        "tags": [tag],
        "events": [event(RANKS[1], f"event {i}") for i in range(30)],
        "losses": [loss(RANKS[2], "full", 7)],
        "gaps": [gap(RANKS[2], 10, 12)],
    }
    yield batch(2, *RANKS, OTHER, **said)
    for number in range(3, 7):
        steps = range(100 * number, 100 * number + 90)
        some = [points(rank, steps, keys=WIDE, value=noise(90, number)) for rank in RANKS]
        seconds = range(30 * number - 90, 30 * number - 60)
        some.append(points(NODE, seconds, keys=("cpu", "memory"), value=noise(30, number)))
        some.append(points(EYE, seconds, keys=("rss",), value=noise(30, number)))
        records = {rank.producer_id: 90 for rank in RANKS}
        yield batch(number, *RANKS, NODE, EYE, points=some, metric_records=records)
    yield batch(7, OTHER, ends=[end(OTHER)], params=[param(OTHER, "lr", "0.1")])


@cache
def sound() -> tuple[bytes, bytes, Said]:
    """The file, its log, and what they say; the second half is in the log."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        writer = SqliteWriter(path)
        for one in batches():
            writer.write(one)
            if one.id.last == 4:
                while writer.compact(60):
                    pass
                with contextlib.closing(sqlite3.connect(path)) as other:
                    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return path.read_bytes(), path.with_name("store.db-wal").read_bytes(), everything(path)


@cache
def checkpointed() -> bytes:
    """The same in one file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        file, log, _ = sound()
        path.write_bytes(file)
        path.with_name("store.db-wal").write_bytes(log)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return path.read_bytes()


def everything(path: Path) -> Said:
    """All that a store says of its runs; points by key and source."""
    with contextlib.closing(open_reader(path)) as reader:
        said: Said = {}
        for run in reader.runs():
            id_ = run.run_id
            series = {}
            for info in [*reader.series_list(id_), *reader.samples_list(id_)]:
                found = reader.series(id_, info.key, info.source)
                series[info.key, info.source] = list(
                    zip(
                        found.steps.tolist(),
                        found.times_ns.tolist(),
                        found.values.tolist(),
                        strict=True,
                    )
                )
            said[id_] = {
                "summary": run,
                "params": reader.params(id_),
                "tags": reader.tags(id_),
                "losses": reader.losses(id_),
                "gaps": reader.gaps(id_),
                "events": [e.message for e in reader.events(id_)],
                "series": series,
                "infos": [reader.series_list(id_), reader.samples_list(id_)],
            }
        return said


def reopened(path: Path) -> Said:
    """What a store says after it was opened for writing and looked through."""
    with contextlib.closing(open_writer(path)) as writer:
        while writer.compact(60):
            pass
    return everything(path)


def redelivered(path: Path) -> Said:
    """What it says when every batch has come once more."""
    with contextlib.closing(open_writer(path)) as writer:
        for one in batches():
            writer.write(one)
    return everything(path)


def missing(before: Said, after: Said) -> dict[str, list[Any]]:
    """By run, what is not there any more; AssertionError for what was never there."""
    lost: dict[str, list[Any]] = {}
    for run, said in before.items():
        now = after.get(run)
        if now is None:
            lost[run] = ["the run"]
            continue
        gone = [
            (name, said[name], now[name])
            for name in ("params", "tags", "losses", "gaps", "summary", "infos")
            if now[name] != said[name]
        ]
        if now["events"][: len(said["events"])] != said["events"]:
            gone.append("events")
        for series, known in said["series"].items():
            there = now["series"].get(series, [])
            assert set(there) <= set(known), f"{series} has what was never logged"
            assert len(there) == len(set(there)), f"{series} has points twice"
            if len(there) < len(known):
                gone.append((series, len(known) - len(there)))
        assert set(now["series"]) <= set(said["series"])
        if gone:
            lost[run] = gone
    return lost


def told(said: Said, run: str) -> list[str]:
    return [
        text for text in said[run]["events"] if "was damaged (" in text or "were set aside" in text
    ]


def put(path: Path, file: bytes, log: bytes = b"") -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_bytes(file)
    if log:
        path.with_name("store.db-wal").write_bytes(log)


def aside(path: Path) -> list[Path]:
    return sorted((path.parent / "quarantine").glob("*-store.db"))


@cache
def pages_of(file: bytes) -> dict[str, list[int]]:
    """The pages of each table and index that have rows."""
    with tempfile.NamedTemporaryFile(dir=MEMORY) as copy:
        copy.write(file)
        copy.flush()
        with contextlib.closing(
            sqlite3.connect(f"file:{copy.name}?immutable=1", uri=True)
        ) as connection:
            roots = dict(
                connection.execute("SELECT rootpage, name FROM sqlite_master WHERE rootpage > 0")
            )
    found: dict[str, list[int]] = {}
    for number in range(3, len(file) // PAGE + 1):
        at = number
        while at not in roots:
            entry = file[PAGE + 5 * (at - 3) : PAGE + 5 * (at - 3) + 5]
            if entry[0] not in (3, 4, 5):
                break
            at = int.from_bytes(entry[1:], "big")
        if at in roots:
            found.setdefault(roots[at], []).append(number)
    return found


@pytest.fixture
def path() -> Iterator[Path]:
    """Of a store, in memory."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder) / "state" / "store.db"


def check(path: Path) -> dict[str, list[Any]]:
    """Opens the damaged store; what is missing of it, all of it told in its runs, and nothing comes twice."""
    before = sound()[2]
    damaged = path.read_bytes() if path.exists() else b""
    after = reopened(path)
    lost = missing(before, after)
    assert [run for run in lost if not told(after, run)] == []
    for file in aside(path):
        # Opening counts in the head of the first page.
        assert file.read_bytes()[PAGE:] == damaged[PAGE:]
        assert file.with_suffix(".reason").read_text().strip()
    again = missing(before, redelivered(path))
    assert again.keys() <= lost.keys()
    return lost


def fill(at: int, size: int, octet: int) -> Mutation:
    def mutate(data: bytearray) -> None:
        data[at : at + size] = bytes([octet]) * size

    return mutate


def flip(at: int, bits: int = 1) -> Mutation:
    def mutate(data: bytearray) -> None:
        data[at] ^= bits

    return mutate


def mutated(data: bytes, mutate: Mutation) -> bytes:
    copy = bytearray(data)
    changed = mutate(copy)
    return bytes(copy if changed is None else changed)


# --- pages of tables and indexes

PAGES: dict[str, Callable[[int], Mutation]] = {
    "zeros": lambda at: fill(at, PAGE, 0),
    "noise": lambda at: (
        lambda data: data.__setitem__(slice(at, at + PAGE), random.Random(at).randbytes(PAGE))
    ),
    "fewer rows": lambda at: flip(at + 4, 4),
    "a row's place": lambda at: flip(at + 9, 4),
    "a row's content": lambda at: flip(at + PAGE - 40, 4),
}
SMALL = [table for table in schema.TABLES if table not in schema.LARGE]


@pytest.mark.parametrize("table", SMALL)
@pytest.mark.parametrize("damage", PAGES.values(), ids=PAGES)
def test_a_damaged_page_of_a_table_costs_nothing_that_is_not_told(
    path: Path, table: str, damage: Callable[[int], Mutation]
) -> None:
    page = pages_of(checkpointed())[table][0]
    put(path, mutated(checkpointed(), damage((page - 1) * PAGE)))
    lost = check(path)
    # What can be computed, or stands in an index as well, is not lost with a page; of a changed value it
    # cannot always be told which of the two is right.
    if damage in (PAGES["zeros"], PAGES["noise"]):
        assert lost == {}


@pytest.mark.parametrize("index", sorted(schema.TWICE))
def test_a_damaged_copy_costs_nothing(path: Path, index: str) -> None:
    page = pages_of(checkpointed())[f"copy_of_{index}"][0]
    put(path, mutated(checkpointed(), PAGES["noise"]((page - 1) * PAGE)))
    assert check(path) == {}


@pytest.mark.parametrize("table", SMALL)
def test_a_page_written_over_another_adds_nothing(path: Path, table: str) -> None:
    other = "tags" if table == "params" else "params"
    pages = pages_of(checkpointed())
    at, source = ((pages[name][0] - 1) * PAGE for name in (table, other))
    file = bytearray(checkpointed())
    file[at : at + PAGE] = file[source : source + PAGE]
    put(path, bytes(file))
    assert check(path) == {}


def test_a_table_lost_with_its_indexes_is_told(path: Path) -> None:
    pages = pages_of(checkpointed())
    file = bytearray(checkpointed())
    for name in ("params", "copy_of_params", "sqlite_autoindex_params_1"):
        for page in pages[name]:
            file[(page - 1) * PAGE : page * PAGE] = bytes(PAGE)
    put(path, bytes(file))
    lost = check(path)
    assert [what[0] for what in lost[RUN]] == ["params"]


def test_written_batches_are_not_written_again_when_their_list_is_lost(path: Path) -> None:
    pages = pages_of(checkpointed())
    file = bytearray(checkpointed())
    for name in ("applied", "copy_of_applied", "sqlite_autoindex_applied_1"):
        for page in pages[name]:
            file[(page - 1) * PAGE : page * PAGE] = bytes(PAGE)
    put(path, bytes(file))
    reopened(path)
    found = missing(sound()[2], redelivered(path))
    assert found == {}


# --- points

CHUNKS = {
    "the first page of a table of blocks": ("chunks", 0),
    "a page that a block goes on in": ("chunks", 1),
    "the last page of a table of blocks": ("chunks", -1),
    "the first page of a table of columns": ("columns", 0),
    "a page that a column goes on in": ("columns", 1),
}


@pytest.mark.parametrize(("table", "number"), CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("damage", PAGES.values(), ids=PAGES)
def test_damaged_points_are_left_out_and_told(
    path: Path, table: str, number: int, damage: Callable[[int], Mutation]
) -> None:
    page = pages_of(checkpointed())[table][number]
    put(path, mutated(checkpointed(), damage((page - 1) * PAGE)))
    lost = check(path)
    parts = sum(len(series) for series in lost.values())
    assert parts <= 1 + 3 * len(WIDE)


# --- the file's own pages

HEAD = (0, 16, 18, 20, 22, 28, 32, 36, 47, 52, 59, 60, 63, 64, 68, 71)
FILES: dict[str, Mutation] = {
    **{f"a bit of byte {at}": flip(at) for at in HEAD},
    **{f"a bit of byte {at} on the first page": flip(at) for at in (100, 104, 106, 111, 113, 3000)},
    "zeros over the first page": fill(0, PAGE, 0),
    "noise over the first page": fill(0, PAGE, 0xA5),
    "zeros over the pointer map": fill(PAGE, PAGE, 0),
    "noise over the pointer map": fill(PAGE, PAGE, 0xA5),
    "a bit of the pointer map": flip(PAGE + 116, 3),
    "cut off in the first page": lambda data: data[:2000],
    "cut off after many pages": lambda data: data[: 60 * PAGE],
    "cut off in a page": lambda data: data[: 50 * PAGE + 77],
    "cut off after few pages": lambda data: data[: 30 * PAGE],
    "longer": lambda data: data + b"\xa5" * 3 * PAGE,
}
ALL_IS_LOST = ("cut off in the first page",)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_opens_with_what_can_be_read(path: Path, name: str) -> None:
    put(path, mutated(checkpointed(), FILES[name]))
    if name in ALL_IS_LOST:
        assert reopened(path) == {}
        assert len(aside(path)) == 1
    else:
        lost = check(path)
        assert ("cut" in name) == bool(lost)


@pytest.mark.parametrize(
    "data", [b"no database" * 1000, b"x", bytes(9000)], ids=["text", "x", "zeros"]
)
def test_what_is_no_store_is_set_aside_and_a_new_one_begun(path: Path, data: bytes) -> None:
    put(path, data)
    reopened(path)
    assert [file.read_bytes() for file in aside(path)] == [data]
    assert missing(sound()[2], redelivered(path)) == {}


# --- the log: what was written last

FRAME = PAGE + 24
LOGS: dict[str, Mutation] = {
    **{f"a bit of byte {at} of its head": flip(at) for at in (0, 3, 7, 8, 12, 16, 20, 24, 28)},
    **{
        f"a bit of byte {at} of a frame": flip(32 + 10 * FRAME + at)
        for at in (0, 3, 7, 8, 16, 24, 2000)
    },
    "a bit of the first frame": flip(32 + 100),
    "a frame gone": lambda data: data[: 32 + 9 * FRAME] + data[32 + 10 * FRAME :],
    "a frame twice": lambda data: data[: 32 + 9 * FRAME] + data[32 + 8 * FRAME :],
}


@pytest.mark.parametrize("mutate", LOGS.values(), ids=LOGS)
def test_a_damaged_log_costs_what_stood_there(path: Path, mutate: Mutation) -> None:
    file, log, _ = sound()
    put(path, file, mutated(log, mutate))
    check(path)
    assert len(aside(path)) == 1
    assert (aside(path)[0].parent / f"{aside(path)[0].name}-wal").read_bytes() == mutated(
        log, mutate
    )


def test_a_log_that_is_damaged_and_cut_off_in_a_batch_doubles_nothing(path: Path) -> None:
    file, log, _ = sound()
    put(path, file, mutated(log, lambda data: data[: 32 + 21 * FRAME]))
    with path.with_name("store.db-wal").open("r+b") as damaged:
        damaged.seek(14799)
        damaged.write(b"\xff" * 20_000)
    check(path)


def test_a_log_whose_file_is_gone_is_read(path: Path) -> None:
    put(path, b"", sound()[1])
    path.unlink()
    check(path)


# --- in use


def test_damage_met_while_writing_is_mended_and_the_batch_kept(path: Path) -> None:
    put(path, checkpointed())
    writer = SqliteWriter(path)
    page = pages_of(checkpointed())["streams"][0]
    file = bytearray(path.read_bytes())
    file[(page - 1) * PAGE : page * PAGE] = bytes([0xA5]) * PAGE
    path.write_bytes(file)
    more = batch(8, RANKS[0], points=[points(RANKS[0], range(5000, 5010))])
    with contextlib.closing(writer):
        with contextlib.closing(sqlite3.connect(path)) as other:  # so that nothing is remembered
            other.execute(f"PRAGMA user_version = {schema.VERSION}")
        with contextlib.suppress(StoreError):
            writer.write(more)
        writer.write(more)
    assert len(aside(path)) == 1
    said = everything(path)
    assert [step for step, *_ in said[RUN]["series"]["loss", "rank 0"]][-10:] == [
        *range(5000, 5010)
    ]
    del said[RUN]["series"]["loss", "rank 0"][-10:]


@pytest.mark.parametrize("table", ["runs", "streams", "chunks", "events", "producers", "params"])
def test_a_reader_of_a_damaged_store_says_so(path: Path, table: str) -> None:
    page = pages_of(checkpointed())[table][0]
    put(path, mutated(checkpointed(), PAGES["noise"]((page - 1) * PAGE)))
    with pytest.raises(StoreError, match=r"damaged.*restart the agent"):
        everything(path)


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("events", "data", "no json"),
        ("streams", "last_values", b"short"),
        ("sources", "source", None),
        ("runs", "run_id", b"\xff"),
    ],
)
def test_a_row_that_makes_no_sense_is_an_error_of_the_store(
    path: Path, table: str, column: str, value: object
) -> None:
    put(path, checkpointed())
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = 1", (value,))
    with contextlib.suppress(StoreError):
        everything(path)


def test_a_command_that_finds_a_damaged_store_says_so_in_a_line(path: Path) -> None:
    page = pages_of(checkpointed())["runs"][0]
    put(path, mutated(checkpointed(), PAGES["noise"]((page - 1) * PAGE)))
    folders = Folders(path.parent.parent / "dir", path.parent)
    done = subprocess.run(
        [COMMAND, "runs"], env=folders.environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "damaged" in done.stderr


@pytest.mark.parametrize("replaced", [False, True])
def test_a_damaged_store_that_is_not_to_be_repaired_stays_as_it_is(
    path: Path, replaced: bool
) -> None:
    page = pages_of(checkpointed())["copy_of_params"][0]
    put(path, mutated(checkpointed(), PAGES["noise"]((page - 1) * PAGE)))
    ready = path.with_name("store.db.salvaged")
    if replaced:
        ready.write_bytes(checkpointed())
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"damaged.*restart the agent"):
        open_writer(path, repair=False)
    assert (path.read_bytes()[PAGE:], ready.exists()) == (before[PAGE:], replaced)
    assert not (path.parent / "quarantine").exists()


def test_what_keeps_a_damaged_store_from_being_read_stands_beside_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise LookupError("a defect of ours")

    monkeypatch.setattr(database, "salvage", fails)
    page = pages_of(checkpointed())["runs"][0]
    put(path, mutated(checkpointed(), PAGES["noise"]((page - 1) * PAGE)))
    assert reopened(path) == {}
    (file,) = aside(path)
    reason = file.with_suffix(".reason").read_text()
    assert "nothing could be read: LookupError('a defect of ours')" in reason


def test_which_steps_chunks_hold_is_known_of_a_salvaged_store(path: Path) -> None:
    def bounds() -> list[Any]:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            rows = "SELECT stream, start, first_step, last_step FROM chunks ORDER BY stream, start"
            return connection.execute(rows).fetchall()

    put(path, checkpointed())
    before = bounds()
    page = pages_of(checkpointed())["params"][0]
    path.write_bytes(mutated(checkpointed(), PAGES["noise"]((page - 1) * PAGE)))
    open_writer(path).close()
    assert (bounds(), len(aside(path))) == (before, 1)


# --- dying on the way


@pytest.mark.parametrize("at", ["begun", "salvaged", "moved"])
def test_a_replacement_that_was_interrupted_is_ended(path: Path, at: str) -> None:
    page = pages_of(checkpointed())["runs"][0]
    put(path, mutated(checkpointed(), PAGES["noise"]((page - 1) * PAGE)))
    begun, ready = (path.with_name(f"store.db.{word}") for word in ("begun", "salvaged"))
    if at == "begun":
        begun.write_bytes(checkpointed()[: 20 * PAGE])
    else:
        ready.write_bytes(checkpointed())
        if at == "moved":
            path.unlink()
    assert check_equal(path)
    assert (begun.exists(), ready.exists()) == (False, False)


def check_equal(path: Path) -> bool:
    return missing(sound()[2], reopened(path)) == {}


# --- what damage is told by


def test_the_shape_of_a_store_is_known(path: Path) -> None:
    open_writer(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert schema.shape_of(connection) == schema.SHAPE


@pytest.mark.parametrize("word", [b"last_values", b"records_stored", b"idx_runs_name", b"counted"])
def test_a_damaged_name_in_the_schema_costs_nothing(path: Path, word: bytes) -> None:
    file = checkpointed()
    place = file.index(word)
    put(path, mutated(file, flip(place + 3)))
    assert check(path) == {}


def test_a_damaged_length_of_a_streams_last_values_costs_nothing(path: Path) -> None:
    put(path, checkpointed())
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE streams SET last_values = x'00' WHERE rowid = 2")
    assert check(path) == {}
