"""Reductions in the embedded store: what is left of them in a damaged file, and what is said of it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from tests.agent.store.batches import RUN, batch, param, points, producer
from trackagent.agent.policies import Policies
from trackagent.agent.reducing import reduced
from trackagent.agent.store import open_reader, open_writer

PAGE = 4096
RANKS = [
    producer(n, world_size=4, node=f"n{n // 2}", groups=(("tp", str(n % 2)),)) for n in range(4)
]
OVERS = ("all", "node n0", "node n1", "tp=0", "tp=1")


def stored(path: Path) -> None:
    """A run of which extremes are kept at every tenth step, and of one key every point."""
    text = json.dumps({"reduce": "mean", "keep": "extremes", "every": 10})
    tags = [param(RANKS[0], "trackagent/define/loss", text)]
    known = Policies()
    with contextlib.closing(open_writer(path)) as writer:
        for number in range(1, 4):
            steps = range(100 * number, 100 * number + 100)
            rows = np.random.default_rng(number).normal(size=(4, 100))
            said = [
                points(one, steps, keys=("loss", "acc"), value=row)
                for one, row in zip(RANKS, rows, strict=True)
            ]
            made = batch(number, *RANKS, points=said, tags=tags)
            known.learn(made)
            writer.write(reduced(made, known, keep_all_ranks=64, stores=True))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def answers(path: Path) -> list[tuple[str, bytes, bytes]]:
    with contextlib.closing(open_reader(path)) as reader:
        found = [reader.reduction(RUN, key, over) for key in ("loss", "acc") for over in OVERS]
        assert [one.key for one in reader.reductions_list(RUN)] == ["acc", "loss"]
        return [(one.over, one.mean.tobytes(), one.world_size.tobytes()) for one in found]


@pytest.mark.parametrize(
    "table", ["producers", "streams", "keysets", "sources", "runs", "idx_chunks_stream_start"]
)
def test_a_bad_page_of_rows_costs_no_reduction(tmp_path: Path, table: str) -> None:
    path = tmp_path / "store.db"
    stored(path)
    before = answers(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)
        ).fetchone()
    page = bytearray(path.read_bytes())
    page[(root - 1) * PAGE : root * PAGE] = b"\xa5" * PAGE
    path.write_bytes(page)
    open_writer(path).close()
    assert any((tmp_path / "quarantine").iterdir())
    assert answers(path) == before


def test_damaged_partials_are_left_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    stored(path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "UPDATE chunks SET data = zeroblob(length(data)) WHERE id ="
            " (SELECT min(c.id) FROM chunks c JOIN streams s ON s.id = c.stream"
            " JOIN producers p ON p.id = s.producer WHERE p.reduced = 'all')"
        )
    with contextlib.closing(open_reader(path)) as reader:
        (line,) = reader.damage(RUN)
        assert "of all ranks" in line
        assert reader.reduction(RUN, "loss").steps.tolist() == list(range(200, 400))
        assert reader.reduction(RUN, "loss", "node n0").steps.tolist() == list(range(100, 400))
