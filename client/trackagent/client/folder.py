"""The folder that holds one producer's segments, and the lock that says whether its owner lives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from itertools import count
from pathlib import Path

from trackagent.client.trust import private_folder

LOCK_NAME = "lock"


class ProducerFolder:
    """One producer's folder under `<base>/journals`, made and locked when it is first needed."""

    def __init__(self, base: Path, producer_id: str) -> None:
        self.base = base
        self.path = base / "journals" / producer_id
        self._lock: int | None = None
        self._numbers = count()

    def open(self) -> Path:
        """The folder, existing and locked. OSError when it cannot be.

        Calls may meet (the sender, log calls in threads and in signal handlers): all of them get the folder
        that one of them has made.
        """
        if self._lock is None:
            private_folder(self.base)
            private_folder(self.path.parent)
            # Made under another name and renamed when locked: whoever sees it sees it locked.
            making = self.path.with_name(f".{self.path.name}.{os.getpid()}.{next(self._numbers)}")
            lock = None
            try:
                making.mkdir(mode=0o700)
                lock = os.open(making / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                making.rename(self.path)
            except BaseException as error:
                if lock is not None:
                    os.close(lock)
                (making / LOCK_NAME).unlink(missing_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    making.rmdir()
                # The name is this producer's alone: what is there, another call has just made.
                if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return self.path
                raise
            self._lock = lock
        return self.path

    def close(self, *, remove: bool) -> None:
        if self._lock is None:
            return
        if remove:
            with contextlib.suppress(OSError):
                for path in self.path.iterdir():
                    path.unlink()
                self.path.rmdir()
        os.close(self._lock)
        self._lock = None
