"""A hook's command: run by /bin/sh in a process group of its own, which ends with the time that it has."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time

POLL_S = 0.1


class Command:
    """`send` on one thread, `end` on any."""

    def __init__(self, command: str, timeout_s: float) -> None:
        self.name = "the hook command"
        self._command = command
        self._timeout_s = timeout_s
        self._ended = threading.Event()

    def send(self, body: bytes) -> None:
        """Runs it with `body` on its standard input. RuntimeError when it fails, or takes too long: it is
        killed then, with what it has started. What a command that is done leaves running is its own."""
        if self._ended.is_set():
            raise RuntimeError("the agent stops")
        # What it prints goes nowhere: it might be endless, or a secret.
        with subprocess.Popen(
            ["/bin/sh", "-c", self._command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                self._wait(process, body)
            except BaseException:
                # It was not waited for yet, so its number is still its own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}")

    def end(self) -> None:
        """Kills what is running, within POLL_S; nothing is run any more."""
        self._ended.set()

    def _wait(self, process: subprocess.Popen[bytes], body: bytes) -> None:
        """Until it is done. RuntimeError when that is too late."""
        until = time.monotonic() + self._timeout_s
        given: bytes | None = body
        while True:
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise RuntimeError(f"it took longer than {self._timeout_s:g} s")
            if self._ended.is_set():
                raise RuntimeError("it was still running when the agent stopped")
            try:
                process.communicate(given, timeout=min(left_s, POLL_S))
                return
            except subprocess.TimeoutExpired:
                given = None  # what is left of it is remembered
