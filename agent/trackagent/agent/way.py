"""The way of everything that no rank has named a hub for: to this node's store, or to one hub.

Where it is another one than the agent took before, what was delivered until now went elsewhere: it is not
missing where everything goes from here on.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from trackagent.agent.quarantine import sync
from trackagent.agent.spool import Spool

logger = logging.getLogger(__name__)


def take(spool: Spool, noted: Path, address: str, sink: str, other: str) -> None:
    """All goes to `sink` now, which is a hub's at `address`, or a store's where that is "": with the oldest
    batch that it, or else the `other` one, had yet to get. noted: the file that says where it went before.
    Waits for the disk. SpoolError or sqlite3.Error: try again."""
    began_elsewhere = other in spool.sinks().result()
    spool.add_sink(sink).result()
    before = None
    with contextlib.suppress(OSError):
        before = noted.read_text(errors="replace")
    if began_elsewhere or before not in (None, address):
        spool.take_another_way(sink).result()
    if before != address:
        try:
            _write(noted, address)
        except OSError as error:
            # An agent begins on a full disk too. It is told of too little that is missing, at worst.
            logger.warning("cannot note in %s where everything goes: %s", noted, error)
    spool.remove_sink(other).result()


def _write(noted: Path, address: str) -> None:
    partial = noted.with_name(f"{noted.name}.new")
    partial.write_text(address)
    sync(partial)
    os.replace(partial, noted)
    sync(noted.parent)
