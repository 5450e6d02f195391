"""`trackagent top`: over a real agent, in a terminal, and where there is none."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.fakes import DEADLINE_S, AgentProcess, Folders, next_line, start_script, wait_until
from trackagent.protos.v1 import agent_pb2_grpc

COMMAND = [sys.executable, "-m", "trackagent.agent.cli", "top"]
RANK = """
import sys
from trackagent import client
run = client.init("x", run_name="demo")
for step in range(5):
    run.log({"train/loss": 1 / (step + 1)}, step)
run.event("halfway\\x1b[2J")
print(run.id, flush=True)
sys.stdin.read()
run.finish()
"""
NODE = "node-of-this-test"


class Terminal:
    """The command in a terminal of 80 columns and 24 rows, and all that it has written there."""

    def __init__(self, folders: Folders, *arguments: str, term: str = "xterm") -> None:
        self._side, other = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            env=folders.environment | {"TERM": term, "COLUMNS": "80", "LINES": "24"},
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
        )
        os.close(other)
        self._written = b""

    def written(self) -> str:
        """What it has written until now."""
        while select.select([self._side], [], [], 0)[0]:
            try:
                self._written += os.read(self._side, 65536)
            except OSError:  # it has ended
                break
        return self._written.decode(errors="replace")

    def frames(self, since: int) -> list[str]:
        """The pages that it has drawn since it had written so much, but for the last, which may be part."""
        return self.written()[since:].split("\x1b[H")[1:-1]

    def end(self, number: int) -> int:
        """Its exit code after this signal."""
        self.process.send_signal(number)
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            select.select([self._side], [], [], 0.05)
            self.written()
        return self.process.wait(1)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._side)


@contextlib.contextmanager
def in_terminal(folders: Folders, *arguments: str) -> Iterator[Terminal]:
    with contextlib.closing(Terminal(folders, *arguments)) as terminal:
        yield terminal


def top(folders: Folders, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=folders.environment | variables,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.fixture
def sampling(folders: Folders) -> Iterator[AgentProcess]:
    """An agent that samples."""
    variables = {
        "TRACKAGENT_COLLECT": "system,processes",
        "TRACKAGENT_NODE": NODE,
    }
    agent = AgentProcess(folders, "--deliver-interval-s", "0.02", variables=variables)
    yield agent.start()
    agent.close()


# --- once


def test_a_page_of_a_run(sampling: AgentProcess, folders: Folders) -> None:
    with start_script(folders, RANK) as rank:
        run_id = next_line(rank)

        def known() -> dict[str, object] | None:
            """The page, when everything on it has come."""
            said = json.loads(sampling.run_cli("top", "--once", "--json").stdout)
            whole = said["events"] and said["runs"] and said["runs"][0]["ranks"][0]["rss_bytes"]
            return said if whole and said["readings"] and said["runs"][0]["losses"] else None

        said = wait_until(known)
        shown = sampling.run_cli("top", "--once").stdout
        assert rank.stdin is not None
        rank.stdin.close()
    assert (said["node"], [one["name"] for one in said["collectors"]]) == (
        NODE,
        ["system", "processes"],
    )
    (run,) = said["runs"]
    assert (run["run_id"], run["run_name"], run["loss_key"]) == (run_id, "demo", "train/loss")
    assert run["losses"] == [1 / (step + 1) for step in range(5)]
    (only,) = run["ranks"]
    assert (only["rank"], only["step"], only["connected"], only["score"]) == (0, 4, True, None)
    assert [one["message"] for one in said["events"]] == ["halfway\x1b[2J"]
    lines = shown.splitlines()
    assert lines[0].startswith(f"node {NODE}  ")
    assert lines[1].startswith("cpu ")
    assert any(line.startswith("demo ") and "train/loss" in line for line in lines)
    assert any(line.endswith("demo rank 0: halfway\\x1b[2J") for line in lines)
    assert max(map(len, lines)) <= 80


def test_without_an_agent_there_is_nothing(folders: Folders) -> None:
    done = top(folders, "--once")
    assert (done.returncode, done.stdout) == (3, "")
    assert "no agent runs" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "this is no terminal"), (["--json"], "--json prints one page: give --once")],
)
def test_what_cannot_be_drawn_again_and_again(
    folders: Folders, arguments: list[str], said: str
) -> None:
    done = top(folders, *arguments)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert said in done.stderr


def test_an_agent_from_before_there_was_this_page(folders: Folders) -> None:
    folders.directory.mkdir(mode=0o700, exist_ok=True)
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        agent_pb2_grpc.add_AgentServicer_to_server(agent_pb2_grpc.AgentServicer(), server)
        server.add_insecure_port(f"unix:{folders.socket}")
        server.start()
        done = top(folders, "--once")
        server.stop(0).wait()
    assert done.returncode == 1
    assert "is older than this command: stop it and start it again" in done.stderr


# --- in a terminal


def is_news(frame: str) -> bool:
    return f"node {NODE}" in frame and "waiting" not in frame


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_it_leaves_the_terminal_as_it_was(folders: Folders, number: int, code: int) -> None:
    with in_terminal(folders, "--interval", "0.1") as terminal:
        wait_until(lambda: "waiting: no agent runs" in terminal.written())
        assert terminal.end(number) == code
        written = terminal.written()
    # The other screen and back, the cursor gone and back.
    assert written.count("\x1b[?1049h") == written.count("\x1b[?1049l") == 1
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h")
    assert "Traceback" not in written


def test_it_waits_for_an_agent_and_goes_on_when_that_has_gone(
    folders: Folders, sampling: AgentProcess
) -> None:
    with in_terminal(folders, "--interval", "0.1") as terminal:
        wait_until(lambda: any(map(is_news, terminal.frames(0))))
        sampling.stop()
        wait_until(lambda: "waiting: no agent runs" in terminal.written())
        sampling.start()
        seen = len(terminal.written())
        wait_until(lambda: any(map(is_news, terminal.frames(seen))))
        assert terminal.end(signal.SIGINT) == 130
