"""Ctrl-C at the commands that may take long: exit code 130, no traceback, and nothing half-written."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.agent.store.batches import RUN, batch, points, producer
from tests.fakes import DEADLINE_S, AgentProcess, Folders, wait_until
from trackagent.agent.config import DEAD_LETTERS_NAME, LOCK_NAME, STORE_NAME
from trackagent.agent.deadletters import DeadLetters, found
from trackagent.agent.spool import SpooledBatch
from trackagent.agent.store import open_writer

COMMAND = [sys.executable, "-m", "trackagent.agent.cli"]
INTERRUPTED = 130
MANY = 5000


def begun(folders: Folders, *arguments: str, out: int = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        env=folders.environment,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupted(process: subprocess.Popen[str], when: Callable[[], object]) -> tuple[int, str]:
    """What a command that is interrupted once `when` holds returns, and says on stderr."""
    with process:
        try:
            wait_until(lambda: process.poll() is not None or when())
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    return process.returncode, said


@pytest.fixture
def store(folders: Folders) -> Path:
    """A store whose run takes a while to print."""
    folders.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folders.state / STORE_NAME
    with contextlib.closing(open_writer(path)) as writer:
        who = producer(0)
        writer.write(batch(1, who, points=[points(who, range(MANY))]))
    return path


def has_open(process: subprocess.Popen[str], path: Path) -> bool:
    """Whether the process has got as far as to this file."""
    with contextlib.suppress(FileNotFoundError):
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(link) == str(path):
                    return True
    return False


def sleeps(process: subprocess.Popen[str]) -> bool:
    stat = Path(f"/proc/{process.pid}/stat").read_text()
    return stat.rpartition(") ")[2].startswith("S")


def waiting_bytes(descriptor: int) -> int:
    return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)


# --- export


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    "arguments",
    [["export", RUN], ["export", RUN, "--format", "csv"], ["tail", "--once", "--lines", str(MANY)]],
    ids=["export", "export as CSV", "tail"],
)
def test_a_command_whose_reader_does_not_read(folders: Folders, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    process = begun(folders, *arguments, out=writing)
    os.close(writing)
    full = interrupted(process, lambda: waiting_bytes(reading) and sleeps(process))
    os.close(reading)
    assert full == (INTERRUPTED, "")


def test_an_export_into_a_fifo_that_nobody_reads(
    folders: Folders, store: Path, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = begun(folders, "export", RUN, "--output", str(fifo))
    assert interrupted(process, lambda: has_open(process, store)) == (INTERRUPTED, "")
    assert list(tmp_path.iterdir()) == [fifo]


def test_an_export_into_a_file_leaves_the_old_one_alone(
    folders: Folders, store: Path, tmp_path: Path
) -> None:
    with contextlib.closing(open_writer(store)) as writer:
        who = producer(0)  # some seconds of printing
        writer.write(batch(2, who, points=[points(who, range(MANY, 60 * MANY))]))
    out = tmp_path / "points"
    out.write_text("old")
    process = begun(folders, "export", RUN, "--output", str(out))
    code, said = interrupted(process, lambda: list(tmp_path.glob(".points.*")))
    assert (code, said, out.read_text()) == (INTERRUPTED, "", "old")
    assert list(tmp_path.iterdir()) == [out]


# --- show


@pytest.mark.parametrize("arguments", [["show"], ["show", "--json"], ["runs"], ["tail", "--once"]])
def test_a_look_at_the_store(folders: Folders, store: Path, arguments: list[str]) -> None:
    process = begun(folders, *arguments)
    code, said = interrupted(process, lambda: has_open(process, store))
    assert (code, said) in ((INTERRUPTED, ""), (0, ""))


def test_a_command_that_is_done(folders: Folders, store: Path) -> None:
    program = (
        "import atexit, os, signal, sys\n"
        "from trackagent.agent.cli import entry\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "sys.argv = ['trackagent', 'show']\n"
        "entry()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env=folders.environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert RUN in done.stdout


# --- what asks an agent


@pytest.fixture
def silent(folders: Folders) -> Iterator[socket.socket]:
    """An agent that is there and never answers."""
    folders.directory.mkdir(mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folders.socket))
        listening.listen()
        listening.settimeout(DEADLINE_S)
        yield listening


def test_a_status_that_nobody_answers(folders: Folders, silent: socket.socket) -> None:
    process = begun(folders, "status", "--timeout", "600")
    connection, _ = silent.accept()
    with connection:
        assert interrupted(process, lambda: True) == (INTERRUPTED, "")


STUBBORN = """
import fcntl, json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
json.dump({"pid": os.getpid(), "started_ns": 0, "version": "1"}, lock)
lock.flush()
print("ready", flush=True)
while True:  # not pause(): a signal just before it would be noticed at the next one
    time.sleep(0.01)
"""


@pytest.fixture
def stubborn(folders: Folders) -> Iterator[subprocess.Popen[str]]:
    """Holds the agent's lock and does not end when told to."""
    folders.directory.mkdir(mode=0o700, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN, str(folders.directory / LOCK_NAME)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate(timeout=DEADLINE_S)


def test_a_stop_of_an_agent_that_does_not_end(
    folders: Folders, stubborn: subprocess.Popen[str]
) -> None:
    process = begun(folders, "stop", "--timeout", "600")
    assert stubborn.stdout is not None
    told = stubborn.stdout.readline
    assert interrupted(process, lambda: told() == "told\n") == (INTERRUPTED, "")
    assert stubborn.poll() is None


@pytest.mark.usefixtures("stubborn")
def test_a_retry_that_the_agent_does_not_come_to_stays_marked(folders: Folders) -> None:
    root = folders.state / DEAD_LETTERS_NAME
    spooled = SpooledBatch(1, 1, producer(0), 0, 0, bytes(64))
    DeadLetters(root, "store", max_bytes=1 << 20).keep("0" * 32, spooled, "bad", {})
    process = begun(folders, "dead-letters", "retry", "--all", "--timeout", "600")
    marked = lambda: [one.marked for one in found(root)]  # noqa: E731
    assert interrupted(process, lambda: marked() == [True]) == (INTERRUPTED, "")
    assert marked() == [True]


# --- start

MOMENTS = {
    "lock": lambda folders: (folders.directory / LOCK_NAME).exists(),
    "spool": lambda folders: (folders.state / "spool.db").exists(),
    "store": lambda folders: (folders.state / STORE_NAME).exists(),
    "socket": lambda folders: folders.socket.exists(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_start_that_is_interrupted_leaves_what_the_next_one_can_use(
    folders: Folders, own_agent: Callable[..., AgentProcess], moment: str
) -> None:
    process = begun(folders, "start")
    code, said = interrupted(process, lambda: MOMENTS[moment](folders))
    assert code in (0, INTERRUPTED)
    assert "Traceback" not in said
    assert not folders.socket.exists()
    agent = own_agent().start()
    assert json.loads(agent.run_cli("status", "--json").stdout)["spool"]["batches"] == 0
    assert agent.stop() == 0
