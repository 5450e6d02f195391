"""Dead letters: batches that a sink has rejected for good, kept aside with the reason until people decide.

    <state>/dead-letters/<sink>/<id>/about.json   who logged it, why and when it was rejected, its schemas
    <state>/dead-letters/<sink>/<id>/records      its journal bytes as received
    <state>/dead-letters/<sink>/retry/<id>        a mark: deliver it again

A letter says everything that is needed to read it or to deliver it again, under the batch id it had; so a
sink that has it already changes nothing. The agent's pipeline writes and removes letters; commands only look
at them, mark them, or throw them away.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trackagent.agent.errors import AgentError
from trackagent.agent.producers import from_fields, to_fields
from trackagent.agent.quarantine import sync
from trackagent.agent.spool import Delivery, SpooledBatch
from trackagent.agent.store.contract import BatchId, ProducerInfo
from trackagent.client import record
from trackagent.client.record import Kind

# What a letter takes on a disk beside its bytes.
_BLOCK_BYTES = 4096
_ABOUT, _RECORDS, _RETRY = "about.json", "records", "retry"


class DeadLettersFull(AgentError):
    """No room for another letter under the cap: what was rejected stays in the spool, and what is behind it
    waits."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One rejected batch of `size` bytes. times: how often it was rejected; the last time at `time_ns` for
    `reason`. schemas: keys by schema id. records: those that can be read, without SCHEMA records."""

    id: str
    sink: str
    reason: str
    time_ns: int
    times: int
    origin: str
    number: int
    lane: int
    first_offset: int
    size: int
    records: int
    producer: ProducerInfo
    schemas: Mapping[int, tuple[str, ...]]
    folder: Path

    @property
    def marked(self) -> bool:
        """Whether it is to be delivered again."""
        return _mark(self.folder).exists()

    def journal_bytes(self) -> bytes:
        return (self.folder / _RECORDS).read_bytes()

    def keys(self, _producer_number: int, schema_id: int) -> tuple[str, ...] | None:
        """What decode() asks for."""
        return self.schemas.get(schema_id)

    def delivery(self) -> Delivery:
        """The letter as it was delivered first, under the same id."""
        data = self.journal_bytes()
        batch = SpooledBatch(self.number, 0, self.producer, self.lane, self.first_offset, data)
        return Delivery(BatchId(self.origin, self.number, self.number), [batch])


class DeadLetters:
    """The letters of one sink, for its pipeline. max_bytes: what they may take on the disk together."""

    def __init__(self, root: Path, sink: str, *, max_bytes: int) -> None:
        self._folder = root / sink
        self._sink = sink
        self._max_bytes = max_bytes
        self._bytes: int | None = None
        for left in self._folder.glob(".*"):
            shutil.rmtree(left)

    def keep(
        self, origin: str, batch: SpooledBatch, reason: str, schemas: Mapping[int, tuple[str, ...]]
    ) -> DeadLetter:
        """Keeps a batch, durable when this returns; again, if it is kept already, changes nothing.
        DeadLettersFull, or OSError."""
        id_ = f"{origin[:12]}-{batch.number}"
        letter = DeadLetter(
            id=id_,
            sink=self._sink,
            reason=reason,
            time_ns=time.time_ns(),
            times=1,
            origin=origin,
            number=batch.number,
            lane=batch.lane,
            first_offset=batch.first_offset,
            size=len(batch.journal_bytes),
            records=_records(batch.journal_bytes),
            producer=batch.producer,
            schemas=schemas,
            folder=self._folder / id_,
        )
        if letter.folder.exists():
            return letter
        size = _disk_bytes(len(batch.journal_bytes))
        if self._held() + size > self._max_bytes:
            self._bytes = None  # people may make room behind our back
            if self._held() + size > self._max_bytes:
                raise DeadLettersFull(
                    f"the dead letters of sink {self._sink} take {self._held()} bytes, their limit is "
                    f"{self._max_bytes}, and it rejects another batch ({reason}): see `trackagent "
                    "dead-letters list`, then retry or discard them, or raise dead_letter_bytes"
                )
        partial = self._folder / f".{id_}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, mode=0o700)
        _write(partial / _RECORDS, batch.journal_bytes)
        _write(partial / _ABOUT, _about(letter))
        partial.rename(letter.folder)
        sync(self._folder)
        self._bytes = self._held() + size
        return letter

    def numbers(self, origin: str) -> list[int]:
        """The batches of a spool that are kept here, in order."""
        letters = found(self._folder.parent)
        return sorted(
            letter.number
            for letter in letters
            if (letter.sink, letter.origin) == (self._sink, origin)
        )

    def marked(self) -> Iterator[DeadLetter]:
        """Those to be delivered again. Marks without a letter are removed."""
        with contextlib.suppress(FileNotFoundError):
            for mark in sorted((self._folder / _RETRY).iterdir()):
                folder = self._folder / mark.name
                if folder.is_dir():
                    yield _read(folder)
                else:
                    mark.unlink(missing_ok=True)

    def rejected_again(self, letter: DeadLetter, reason: str) -> None:
        """It stays, with the new reason, and is no longer marked."""
        about = json.loads((letter.folder / _ABOUT).read_text())
        about |= {"reason": reason, "time_ns": time.time_ns(), "times": letter.times + 1}
        partial = letter.folder / f".{_ABOUT}"
        _write(partial, json.dumps(about, indent=2).encode())
        partial.rename(letter.folder / _ABOUT)
        _mark(letter.folder).unlink(missing_ok=True)

    def remove(self, letter: DeadLetter) -> None:
        """It was delivered."""
        discard(letter)
        self._bytes = None

    def count(self) -> tuple[int, int]:
        """How many there are, and what they take on the disk."""
        sizes = [
            _disk_bytes(path.stat().st_size) for path in self._folder.glob(f"[!.]*/{_RECORDS}")
        ]
        return len(sizes), sum(sizes)

    def _held(self) -> int:
        if self._bytes is None:
            self._bytes = self.count()[1]
        return self._bytes


def found(root: Path) -> list[DeadLetter]:
    """All letters under `root`, the oldest first, without those that `unreadable` names."""
    letters = []
    for folder in _folders(root):
        with contextlib.suppress(AgentError, FileNotFoundError):
            letters.append(_read(folder))
    return sorted(letters, key=lambda letter: (letter.time_ns, letter.number))


def unreadable(root: Path) -> list[str]:
    """What is wrong with letters that cannot be read, a line each."""
    problems = []
    for folder in _folders(root):
        try:
            _read(folder)
        except FileNotFoundError:
            continue
        except AgentError as error:
            problems.append(str(error))
    return problems


def mark(letter: DeadLetter) -> None:
    """The agent delivers it again, now or when it next starts. Idempotent."""
    path = _mark(letter.folder)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.touch()


def discard(letter: DeadLetter) -> None:
    """Throws it away."""
    gone = letter.folder.with_name(f".{letter.id}.gone")
    with contextlib.suppress(FileNotFoundError):
        letter.folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    _mark(letter.folder).unlink(missing_ok=True)


def _folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob(f"*/[!.]*/{_ABOUT}"))


def _mark(folder: Path) -> Path:
    return folder.parent / _RETRY / folder.name


def _read(folder: Path) -> DeadLetter:
    try:
        about = json.loads((folder / _ABOUT).read_text())
        producer = from_fields(about.pop("producer"))
        schemas = {int(number): tuple(keys) for number, keys in about.pop("schemas").items()}
        return DeadLetter(**about, producer=producer, schemas=schemas, folder=folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AgentError(f"the dead letter {folder} cannot be read: {error!r}") from None


def _about(letter: DeadLetter) -> bytes:
    about: dict[str, Any] = asdict(letter)
    del about["folder"]
    about["producer"] = to_fields(letter.producer)
    return json.dumps(about, indent=2).encode()


def _records(data: bytes) -> int:
    return sum(data[offset + 8] != Kind.SCHEMA for offset in record.scan(data).offsets)


def _disk_bytes(data_bytes: int) -> int:
    return (data_bytes + 3 * _BLOCK_BYTES) // _BLOCK_BYTES * _BLOCK_BYTES


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
