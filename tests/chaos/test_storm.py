"""A storm of every kind of fault; and that its parts can be replayed, and do what they say."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.chaos import oracle, storm
from tests.chaos.node import Node
from tests.chaos.proxy import Proxy
from tests.chaos.records import Producer
from tests.chaos.schedule import KINDS, VICTIMS, schedule
from tests.fakes import wait_until
from trackagent.agent.config import STORE_NAME

NEED_MOUNTS = ("state disk full", "memory full")
SECONDS = 10.0


def test_nothing_is_lost_doubled_or_made_up_in_a_storm(tmp_path: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    replay = f"python -m tests.chaos --seed {seed} --seconds {SECONDS:g}"
    no_mounts = storm.can_mount(tmp_path)
    kinds = [kind for kind in KINDS if not (no_mounts and kind in NEED_MOUNTS)]
    print(replay)  # noqa: T201 - shown when the storm hangs
    outcome = storm.run(schedule(seed, SECONDS, kinds), small_disks=not no_mounts)
    assert outcome.violations == [], f"{replay}; its folders: {outcome.folder}"
    assert outcome.returned > 0
    assert outcome.faults.total() > 0


def test_a_schedule_follows_from_its_seed() -> None:
    assert schedule(7, 60.0) == schedule(7, 60.0)
    assert schedule(7, 60.0) != schedule(8, 60.0)


def test_every_kind_of_fault_comes_in_turn_and_never_two_with_one_victim() -> None:
    gusts = schedule(7, 300.0).gusts
    assert {fault.kind for gust in gusts for fault in gust.faults} == set(KINDS)
    assert set(storm.FAULTS) == set(KINDS)
    for gust in gusts:
        victims = Counter(VICTIMS[fault.kind] for fault in gust.faults)
        assert max(victims.values()) == 1


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node(deliver_interval_s=0.02)
    try:
        made.agent.start()
        yield made
    finally:
        made.close()


def test_what_is_taken_out_of_a_store_is_missed(node: Node) -> None:
    node.start_rank(Producer(uuid4().hex, 0, 0, 1), 200)
    node.wait_for_new_records(node.living)
    assert node.finish() == []
    with contextlib.closing(sqlite3.connect(node.folders.state / STORE_NAME)) as store:
        store.execute("DELETE FROM events WHERE id = (SELECT MIN(id) FROM events)")
        store.execute("UPDATE params SET value = value || 'x'")
        store.commit()
    kinds = {violation.kind for violation in node.finish()}
    assert kinds == {oracle.LOST, oracle.WRONG}


@pytest.mark.parametrize(
    ("trouble", "count"),
    [
        ("doubles", "doubled"),
        ("replays", "replayed"),
        ("swaps", "swapped"),
        ("drops_acknowledgements", "dropped"),
    ],
)
def test_nothing_is_lost_or_doubled_by_a_connection_that(
    node: Node, trouble: str, count: str
) -> None:
    proxy = Proxy(node.base / "proxy.sock", node.agent.address, seed=1)
    setattr(proxy, trouble, True)
    proxy.start()
    try:
        rank = node.start_rank(
            Producer(uuid4().hex, 0, 0, 1),
            400,
            TRACKAGENT_AGENT=proxy.address,
            TRACKAGENT_FLUSH_INTERVAL_S="0.02",
        )
        wait_until(lambda: proxy.counts[count] >= 3, f"the proxy has {count}")
        proxy.cut()
        proxy.start()
        setattr(proxy, trouble, False)
        node.wait_for_new_records([rank])
        assert node.finish() == []
    finally:
        proxy.cut()
