"""Journals without a sender: what a dead rank left, and what forked processes write.

A journal whose lock is free belongs to nobody any more. It is read into the spool from where its
sender had come to, the producer's end is noted (killed, unless it had said otherwise), and its
folder is deleted. A journal whose owner lives is left alone, unless the owner is a forked process
without a sender: what that publishes is read as it comes. That a rank died becomes an event of its run.

Crash-safe: everything goes through the spool, which keeps each byte once; a folder is deleted only after.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import re
import shutil
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from pathlib import Path

from trackagent.agent import deaths, notices
from trackagent.agent.errors import AgentError
from trackagent.agent.quarantine import set_aside
from trackagent.agent.segments import NotOurs, SegmentFile, copies, pieces, segment_files
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import ProducerInfo
from trackagent.client import record
from trackagent.client.folder import LOCK_NAME
from trackagent.client.hub import Hub
from trackagent.client.segment import HEADER_BYTES
from trackagent.client.trust import check_folder

logger = logging.getLogger(__name__)

SCAN_INTERVAL_S = 1.0
TIDY_INTERVAL_S = 3600.0
# How long a folder that nobody holds may be in the making; then its maker is dead.
MAKING_S = 60.0
# How often, at least, producers without a journal are looked for.
GONE_INTERVAL_S = 60.0
_PRODUCER_ID = re.compile(r"[0-9a-f]{32}")
_IN_THE_MAKING = re.compile(r"\.[0-9a-f]{32}\.[0-9]+\.[0-9]+")


class Orphans(threading.Thread):
    """Watches the journals of `directory` and `state_directory`. `quarantine`: where unreadable
    segments go. `claim`: asked, with run and producer, before a journal is read; what it raises leaves the
    journal as it is; so does `route`, which says which way a run goes whose rank 0 named a hub. `connected`:
    whether a producer is, by its id. `gone_after_s`: how long one may have neither a connection nor a
    journal, since its node was started anew or the folder in memory was emptied. `proc`, `groups`: where the
    kernel tells of processes and control groups, and `clock` (seconds, monotonic): seams for tests."""

    def __init__(
        self,
        spool: Spool,
        directory: Path,
        state_directory: Path,
        quarantine: Path,
        *,
        claim: Callable[[str, bytes], None] | None = None,
        route: Callable[[str, Hub], str] = lambda run_id, hub: "",
        connected: Callable[[bytes], bool] = lambda producer_id: False,
        gone_after_s: float = 3600.0,
        proc: Path = Path("/proc"),
        groups: Path = Path("/sys/fs/cgroup"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="orphans", daemon=True)
        self._spool = spool
        self._bases = [directory / "journals", state_directory / "journals"]
        self._quarantine = quarantine
        self._claim = claim
        self._route = route
        self._connected = connected
        self._gone_after_s = gone_after_s
        # Producers that have not ended and have neither journal nor connection, and since when.
        self._gone: dict[bytes, float] = {}
        self._gone_due = -math.inf
        self._stopping = threading.Event()
        # Live journals by name: whether they have no sender. They need no second look at their header.
        self._live: dict[str, bool] = {}
        # The memory groups of living ranks, by their journal's name.
        self._memory: dict[str, deaths.MemoryGroup] = {}
        # Folders in the making, and when each was first seen.
        self._making: dict[Path, float] = {}
        self._proc, self._groups, self._clock = proc, groups, clock
        # What stands in the way of a journal, by its name: told once.
        self._problems: dict[str, str] = {}
        # The file of a journal that was not there any more, by the journal's name.
        self._missing: dict[str, str] = {}
        self._reading = 0

    @property
    def reading(self) -> int:
        """Journals of dead producers found and not yet wholly read."""
        return self._reading

    def run(self) -> None:
        tidied = -math.inf
        while not self._stopping.wait(SCAN_INTERVAL_S):
            self.look()
            now = self._clock()
            if now - tidied > TIDY_INTERVAL_S:
                tidied = now
                self._tidy()

    def _tidy(self) -> None:
        """Lets the spool forget who ended long ago, but no one whose journal might come again."""
        try:
            kept = [bytes.fromhex(name) for base in self._bases for name in _folders(base)]
            self._spool.forget_ended(kept).result()
        except (OSError, AgentError, sqlite3.Error) as error:
            logger.warning("cannot tidy the spool: %s; trying again", error)

    def stop(self) -> None:
        """Ends after the journal under way, with a last look for what has ended meanwhile."""
        self._stopping.set()
        self.join()
        self.look()

    def look(self) -> None:
        """Reads every journal that is to be read, once."""
        try:
            names = {name for base in self._bases for name in _folders(base)}
            self._remove_unmade()
        except OSError as error:
            if self._problems.get("") != str(error):
                logger.warning("cannot list the journals: %s; trying again", error)
            self._problems[""] = str(error)
            return
        self._problems = {name: known for name, known in self._problems.items() if name in names}
        self._missing = {name: file for name, file in self._missing.items() if name in names}
        self._live = {name: alone for name, alone in self._live.items() if name in names}
        self._memory = {name: group for name, group in self._memory.items() if name in names}
        self._reading = len(names - self._live.keys())
        for name in sorted(names):
            try:
                self._look_at(name)
                self._problems.pop(name, None)
                self._missing.pop(name, None)
            except Exception as error:  # noqa: BLE001 - it is tried again, and the others are read
                # A rank removes its segments as it goes on: only what is missing again is a problem.
                if isinstance(error, FileNotFoundError) and self._missing.get(name) != str(error):
                    self._missing[name] = str(error)
                    continue
                if self._problems.get(name) != str(error):
                    logger.warning("journal %s: %s; trying again", name, error)
                self._problems[name] = str(error)
        self._reading = 0
        self._end_gone(names)

    def _end_gone(self, names: Set[str]) -> None:
        """Ends producers that nothing more can come from. One that comes back all the same is heard: what it
        says of its end counts."""
        now = self._clock()
        if now < self._gone_due:
            return
        self._gone_due = now + min(GONE_INTERVAL_S, self._gone_after_s / 4)
        try:
            infos = {info.producer_id: info for info in self._spool.not_ended().result()}
            self._gone = {
                id_: self._gone.get(id_, now)
                for id_ in infos
                # What the agent itself samples has neither; who samples ends it.
                if not infos[id_].sampled and id_.hex() not in names and not self._connected(id_)
            }
            for id_, since in self._gone.items():
                if now - since >= self._gone_after_s:
                    self._spool.end_producer(id_, notices.vanished(infos[id_])).result()
                    logger.warning("%s (run %s) is gone", infos[id_].source, infos[id_].run_id)
        except (AgentError, sqlite3.Error) as error:
            logger.warning("cannot look for producers that are gone: %s; trying again", error)

    def _look_at(self, name: str) -> None:
        # Nearly all journals at nearly all looks: known, delivered by their own sender, and held.
        if self._live.get(name) is False and any(_is_held(base / name) for base in self._bases):
            return
        folders = self._folders_of(name)
        for folder in folders:
            # Its owner may be deleting it just now.
            with contextlib.suppress(FileNotFoundError):
                check_folder(folder)
            lock = folder / LOCK_NAME
            if lock.is_dir() and not lock.is_symlink():  # what nobody holds and nobody can take
                reason = "a folder in place of a lock"
                set_aside(lock, self._quarantine, f"{name}-{LOCK_NAME}", reason)
        with contextlib.ExitStack() as locks:
            if all(locks.enter_context(_locked(folder)) for folder in folders):
                # One that was made before its owner died must not be missed.
                if folders == self._folders_of(name):
                    self._live.pop(name, None)
                    self._adopt(folders)
                return
        if name not in self._live:
            segments = segment_files(folders)
            if segments:
                info = segments[0].info
                self._live[name] = info.forked or segments[0].without_sender
                lock = segments[0].path.with_name(LOCK_NAME)
                group = deaths.memory_group(info.pid, lock, proc=self._proc, groups=self._groups)
                if group is not None:
                    self._memory[name] = group
                logger.debug("%s (run %s, pid %d) is watched", info.source, info.run_id, info.pid)
        if self._live.get(name):
            self._read(folders, live=True)

    def _folders_of(self, name: str) -> list[Path]:
        return [base / name for base in self._bases if (base / name).is_dir()]

    def _adopt(self, folders: list[Path]) -> None:
        info = self._read(folders, live=False)
        if info is not None:
            final_records = self._notice_of_death(info, folders) + notices.killed()
            self._spool.end_producer(info.producer_id, final_records).result()
            logger.info(
                "%s (run %s, pid %d) has ended: its journal is delivered",
                info.source,
                info.run_id,
                info.pid,
            )
        for folder in folders:
            shutil.rmtree(folder)

    def _notice_of_death(self, info: ProducerInfo, folders: list[Path]) -> bytes:
        """The event that a rank died; nothing for one that had said its end, and for what a rank forked: such
        processes end as they like."""
        if info.forked:
            return b""
        segments = segment_files(folders)
        last = deaths.LastRecord()
        for at, found in enumerate(segments):
            # The last two of each lane: its owner may have died with the last one still empty.
            if at + 2 < len(segments) and segments[at + 2].lane == found.lane:
                continue
            with found.mapped() as view:
                last = last.and_then(view)
        if last.finished:
            return b""
        group = self._memory.get(info.producer_id.hex())
        kills = None if group is None else group.killed_since()
        return notices.died(info, last, kills)

    def _remove_unmade(self) -> None:
        """Removes folders whose makers died before they had given them their name."""
        now = self._clock()
        found = [path for base in self._bases for path in _in_the_making(base)]
        self._making = {path: self._making.get(path, now) for path in found}
        for path, since in self._making.items():
            if now - since >= MAKING_S:
                with _locked(path) as locked:
                    if locked:
                        shutil.rmtree(path, ignore_errors=True)

    def _read(self, folders: list[Path], *, live: bool) -> ProducerInfo | None:
        """Brings what the segments hold beyond what is committed into the spool; the producer, if
        there is one."""
        problems: list[str] = []
        if live:  # what cannot be read yet may be in the making
            segments = segment_files(folders)
        else:
            segments = segment_files(
                folders, lambda path, error: problems.append(self._set_aside(path, error))
            )
        info = segments[0].info if segments else None
        if info is None and problems:
            info = self._known(folders[0].name)
        if info is None:
            return None
        if self._claim is not None:
            self._claim(info.run_id, info.producer_id)
        if segments and (hub := segments[0].hub) is not None:
            info = replace(info, hub=self._route(info.run_id, hub))
        # Of a new producer, what was before is delivered elsewhere.
        held: dict[int, int] = {}
        for found in segments:
            held.setdefault(found.lane, found.held_from)
        committed = self._spool.open_producer(info, held).result()
        for problem in problems:
            notice = notices.unreadable_segment(problem)
            self._spool.append_own(info.producer_id, notice).result()
        for found, following in zip(segments, [*segments, None][1:], strict=True):
            more = following is not None and following.lane == found.lane
            if live and more and following is not None and following.number > found.number + 1:
                break  # the owner went on while the headers were read: the next look finds what is between
            if found.held_from > committed.get(found.lane, 0):
                # What was before is lost, and the spool says so in the run: go on with what there is.
                held = {found.lane: found.held_from}
                committed = self._spool.open_producer(info, held).result()
            end = following.base if following is not None and more else None
            others = [] if live else segments
            self._read_segment(found, committed.get(found.lane, 0), end, others, live=live)
            committed = self._spool.committed(info.producer_id).result()
            if live and more:
                # The owner has gone on to the next one; its mapping stays valid.
                found.path.unlink(missing_ok=True)
        return info

    def _set_aside(self, path: Path, error: Exception) -> str:
        """Moves what cannot be read out of its journal; what the run is told of it."""
        # Moved within its file system, nothing of what is not ours is read or copied.
        here = path.parent.parent.parent / self._quarantine.name
        place = here if isinstance(error, NotOurs) else self._quarantine
        target = set_aside(path, place, f"{path.parent.name}-{path.name}", str(error))
        return f"a journal segment is unreadable ({error}): set aside as {target}"

    def _known(self, name: str) -> ProducerInfo | None:
        """The producer of a journal of which nothing can be read, where the spool knows it."""
        infos = self._spool.not_ended().result()
        return next((info for info in infos if info.producer_id.hex() == name), None)

    def _learn_schemas(self, info: ProducerInfo, segments: list[SegmentFile]) -> None:
        """A SCHEMA record that is damaged stands in other segments as well, if these have records of it."""
        for found in segments:
            with found.mapped() as view:
                self._spool.open_producer(info, {}, [bytes(view[HEADER_BYTES:])]).result()

    def _read_segment(
        self,
        found: SegmentFile,
        committed: int,
        lane_end: int | None,
        others: list[SegmentFile],
        *,
        live: bool,
    ) -> None:
        """Spools the segment's records from lane offset `committed` on. `lane_end`: where the next segment
        goes on; None: in the last one, data ends with the last record. `others`: where else the schemas of
        damaged records may stand."""
        with found.mapped() as view:
            start = max(committed - found.base, 0) + HEADER_BYTES
            if start > HEADER_BYTES:
                # This spool may be newer than what was delivered from here.
                delivered = bytes(view[HEADER_BYTES : min(start, len(view))])
                self._spool.open_producer(found.info, {}, [delivered]).result()
            if start >= len(view):
                return
            scan = record.scan(view, start)
            end = scan.end
            if lane_end is not None:
                end = max(end, min(lane_end - found.base + HEADER_BYTES, len(view)))
            elif not live and view[end : end + 8].tobytes().strip(b"\0"):
                # One that was being written when its process died has no length yet: this one was published.
                end += record.padded(len(bytes(view[end:]).rstrip(b"\0")))
                scan.damage.append(record.Damage(scan.end, end, "the last record is damaged"))
            if scan.damage and not live:
                self._learn_schemas(found.info, others)
            # In a live journal, a record published during the scan looks like damage.
            for damage in [] if live else scan.damage:
                logger.error(
                    "%s: bytes %d to %d are unreadable (%s)",
                    found.path,
                    damage.start,
                    damage.end,
                    damage.reason,
                )
            doubled = [] if live else copies(view, scan.offsets)
            for first, last in pieces(scan.offsets, start, end):
                data = bytearray(view[first:last])
                for at in doubled:
                    if first <= at < last:
                        data[at - first : at - first + 8] = bytes(8)
                self._spool.append(
                    found.info.producer_id,
                    found.lane,
                    found.base + first - HEADER_BYTES,
                    bytes(data),
                ).result()


def _folders(base: Path) -> Iterator[str]:
    """The journals' names; those that begin with a dot are being made, and what is named otherwise is
    somebody else's."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(base) as entries:
        for entry in entries:
            if _PRODUCER_ID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                yield entry.name


def _in_the_making(base: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(base) as entries:
        for entry in entries:
            if _IN_THE_MAKING.fullmatch(entry.name) and _is_our_folder(base / entry.name):
                yield base / entry.name


def _is_our_folder(path: Path) -> bool:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _is_held(folder: Path) -> bool:
    """Whether a journal's owner lives. Only that: what stands in the way of the lock is for a closer look."""
    try:
        descriptor = os.open(f"{folder}/{LOCK_NAME}", _LOCK_FLAGS)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


_LOCK_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the journal's lock; False while its owner lives."""
    try:
        descriptor = os.open(folder / LOCK_NAME, _LOCK_FLAGS | os.O_CREAT, 0o600)
    except FileNotFoundError:  # its owner is deleting it just now
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
