"""Where `trackagent export` writes: standard output, a file, or into a FIFO or device."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from trackagent.agent.errors import AgentError


@contextmanager
def destination(output: Path | None) -> Iterator[IO[str]]:
    """What to write text to; None: standard output. AgentError names `output` when it cannot be written.

    A file, links to it followed, gets its new content when that is complete and keeps its old one until
    then. What is there and no file stays what it is and is written into; a FIFO's reader is waited for."""
    if output is None or _is_stdout(output):
        with _whole_stdout() as out:
            yield out
        return
    try:
        mode = _mode(output)
        target = _replaced if mode is None or stat.S_ISREG(mode) else _written_into
        with target(output, mode) as out:
            yield out
    except OSError as error:
        raise AgentError(f"cannot write {output}: {error.strerror or error}") from None


def _is_stdout(output: Path) -> bool:
    """Whether this is /dev/stdout or the like: who appends to a file that way wants to keep what it has."""
    try:
        return os.path.samestat(output.stat(), os.fstat(sys.stdout.fileno()))
    except OSError:
        return False


def _mode(output: Path) -> int | None:
    try:
        return output.stat().st_mode
    except FileNotFoundError:
        return None


@contextmanager
def _replaced(output: Path, mode: int | None) -> Iterator[IO[str]]:
    # The file itself: a link to it stays one.
    path = Path(os.path.realpath(output))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="") as out:
            if mode is not None:
                os.fchmod(out.fileno(), stat.S_IMODE(mode))
            yield out
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextmanager
def _written_into(output: Path, _: int | None) -> Iterator[IO[str]]:
    # Without O_CREAT: were it gone by now, a file would stand there that is not complete.
    descriptor = os.open(output, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY)
    with open(descriptor, "w", encoding="utf-8", newline="") as out:
        yield out


@contextmanager
def _whole_stdout() -> Iterator[IO[str]]:
    """Standard output with a buffer of its own. Without one (PYTHONUNBUFFERED), Python takes a write that
    was cut short, by a full disk or a reader that has gone, for a whole one."""
    try:
        descriptor = sys.stdout.fileno()
    except io.UnsupportedOperation:
        # Not a file: a test reads it, or it is closed.
        yield sys.stdout
        return
    with open(descriptor, "w", encoding="utf-8", newline="", closefd=False) as out:
        yield out
