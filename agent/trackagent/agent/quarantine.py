"""Where damaged files go: out of the way of what comes, with the reason beside them, kept for people.

What a name stands for up to its first dot belongs together: a file, its log, its reason. Beyond a cap the
oldest goes first, since the newest may still be wanted; how many went stands in `.deleted`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)


def set_aside(path: Path, quarantine: Path, name: str, reason: str) -> Path:
    """Moves `path` into the folder `quarantine` as `name` (numbered where that is taken), writes
    `<name without suffix>.reason`, and says so.

    Returns where it is now. OSError when it cannot be moved.
    """
    quarantine.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = quarantine / name
    number = 2
    while target.exists() or target.with_suffix(".reason").exists():
        target = (quarantine / name).with_stem(f"{Path(name).stem}-{number}")
        number += 1
    reason = " ".join(reason.split())
    shutil.move(path, target)
    target.with_suffix(".reason").write_text(f"{reason}\n")
    logger.error("%s is unreadable (%s): set aside as %s", path, reason, target)
    return target


def set_aside_database(path: Path, quarantine: Path, reason: str) -> None:
    """Moves the SQLite file at `path`, which nobody has open and which may be missing, with its log. OSError
    when that cannot be done."""
    quarantine.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = f"{time.time_ns()}-{path.name}"
    for suffix in ("-wal", "-shm"):
        # First: replayed into a new file in its place it would damage that.
        with contextlib.suppress(FileNotFoundError):
            shutil.move(f"{path}{suffix}", quarantine / f"{name}{suffix}")
    try:
        set_aside(path, quarantine, name, reason)
    except FileNotFoundError:
        logger.error("%s is not there: %s", path, reason)


def sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Held:
    """What a quarantine holds: items, what they take on the disk, and how many items went at the cap."""

    items: int
    size: int
    deleted: int


@dataclass(slots=True)
class _Item:
    paths: list[Path] = field(default_factory=list)
    size: int = 0
    when_ns: int = 0


class Quarantine:
    """The folders `folders` under one cap; the first one keeps the count. One thread at a time."""

    def __init__(self, folders: Sequence[Path], *, max_bytes: int) -> None:
        self._folders = folders
        self._max_bytes = max_bytes
        self._count = folders[0] / ".deleted"
        self._stuck: set[Path] = set()

    def held(self) -> Held:
        """OSError where it cannot be listed."""
        items = self._items()
        return Held(len(items), sum(item.size for item in items), self._deleted())

    def trim(self) -> None:
        """Deletes the oldest items until the cap is kept, but never the newest one. OSError where the folders
        cannot be listed or written; what cannot be deleted stays, and is told once."""
        items = self._items()
        size = sum(item.size for item in items)
        for item in items[:-1]:
            if size <= self._max_bytes:
                break
            if item.paths[0] in self._stuck:
                continue
            # First: a death in between may count one twice, never hide one.
            self._note_deleted()
            try:
                for path in item.paths:
                    _delete(path)
            except OSError as error:
                self._stuck.add(item.paths[0])
                logger.warning("cannot make room in the quarantine: %s", error)
                continue
            size -= item.size
            logger.warning(
                "%s and what belongs to it is deleted: the quarantine is at its limit, %d bytes",
                item.paths[0],
                self._max_bytes,
            )

    def _items(self) -> list[_Item]:
        """The oldest first."""
        found: dict[tuple[Path, str], _Item] = {}
        for folder in self._folders:
            with contextlib.suppress(FileNotFoundError):
                for path in sorted(folder.iterdir()):
                    if path.name.startswith("."):
                        continue
                    try:
                        status = path.lstat()
                    except FileNotFoundError:
                        continue
                    item = found.setdefault((folder, path.name.partition(".")[0]), _Item())
                    item.paths.append(path)
                    item.size += _disk_bytes(path, status)
                    # When it was moved here: the file's own time is that of its content.
                    item.when_ns = max(item.when_ns, status.st_ctime_ns)
        return sorted(found.values(), key=lambda item: item.when_ns)

    def _deleted(self) -> int:
        try:
            return int(json.loads(self._count.read_text())["items"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return 0

    def _note_deleted(self) -> None:
        self._count.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = self._count.with_name(f"{self._count.name}.new")
        partial.write_text(json.dumps({"items": self._deleted() + 1}))
        partial.replace(self._count)


def _disk_bytes(path: Path, status: os.stat_result) -> int:
    size = max(status.st_blocks * 512, 4096)
    if stat.S_ISDIR(status.st_mode):
        for inner in path.rglob("*"):
            with contextlib.suppress(OSError):
                size += max(inner.lstat().st_blocks * 512, 4096)
    return size


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
