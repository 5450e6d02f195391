"""Uses an installed trackagent as a newcomer would: start the agent, log from a script, read it back, stop.

`make smoke` runs it with the interpreter of an environment that holds only the built wheel; it needs nothing
but the standard library, prints one line a step, and ends with status 0 when every step held.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

DEADLINE_S = 30.0
RECORDS = 100
SCRIPTS = Path(sysconfig.get_path("scripts"))
COMMAND = SCRIPTS / "trackagent"

TRAINING = f"""
from trackagent import client

client.init(experiment="smoke")
for i in range({RECORDS}):
    client.log({{"loss": 1.0 / (i + 1)}}, step=i)
client.finish()
"""


def main() -> None:
    """Every step in order; AssertionError or CalledProcessError where one fails."""
    check_installation()
    # A short path: the name of a unix socket has 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="smoke-"))
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("TRACKAGENT_")
    }
    environment |= {
        "TRACKAGENT_DIR": str(folder / "dir"),
        "TRACKAGENT_STATE": str(folder / "state"),
    }
    log_path = folder / "agent.log"
    with log_path.open("wb") as log:
        agent = subprocess.Popen(
            [COMMAND, "start"], env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        check_delivery(environment, folder, agent)
        trackagent(environment, folder, "stop")
        assert agent.wait(DEADLINE_S) == 0, f"the agent ended with status {agent.returncode}"
        print("smoke: the agent stopped")
    except BaseException:
        print(f"--- the agent's output\n{log_path.read_text(errors='replace')}---", file=sys.stderr)
        raise
    finally:
        if agent.poll() is None:
            agent.kill()
            agent.wait()
        shutil.rmtree(folder)


def check_installation() -> None:
    """The three packages come from site-packages, and the command knows its version."""
    installed = Path(sysconfig.get_path("purelib")).resolve()
    for name in ("trackagent.client", "trackagent.agent", "trackagent.protos.v1"):
        origin = Path(str(importlib.import_module(name).__file__)).resolve()
        assert origin.is_relative_to(installed), f"{name} comes from {origin}, not {installed}"
    assert COMMAND.is_file(), f"there is no {COMMAND}"
    version = trackagent(dict(os.environ), Path.cwd(), "--version")
    expected = metadata.version("trackagent")
    assert expected in version, f"--version prints {version!r}, not {expected}"
    assert "start" in trackagent(dict(os.environ), Path.cwd(), "--help")
    print(f"smoke: trackagent {expected} is installed in {installed}")


def check_delivery(
    environment: dict[str, str], folder: Path, agent: subprocess.Popen[bytes]
) -> None:
    """What a script logs can be read back by the command."""

    def answers() -> bool:
        assert agent.poll() is None, f"the agent ended with status {agent.returncode}"
        status = subprocess.run(
            [COMMAND, "status"], env=environment, cwd=folder, capture_output=True, check=False
        )
        return status.returncode == 0

    wait_for("the agent answers", answers)
    training = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", TRAINING],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert training.returncode == 0, f"the training script failed:\n{training.stderr}"
    assert training.stderr == "", f"the training script was told:\n{training.stderr}"
    print(f"smoke: a script logged {RECORDS} records")

    def finished_run() -> dict[str, Any] | None:
        listed = subprocess.run(
            [COMMAND, "runs", "--json"],
            env=environment,
            cwd=folder,
            capture_output=True,
            check=False,
        )
        runs = json.loads(listed.stdout) if listed.returncode == 0 else []
        return runs[0] if len(runs) == 1 and runs[0]["status"] == "finished" else None

    run = wait_for("the run is finished", finished_run)

    def losses() -> list[dict[str, Any]]:
        export = trackagent(environment, folder, "export", run["run_id"], "--format", "jsonl")
        points = [json.loads(line) for line in export.splitlines()]
        return [point for point in points if point["key"] == "loss"]

    wait_for("every point is stored", lambda: len(losses()) >= RECORDS)
    stored = sorted((point["step"], point["value"]) for point in losses())
    assert stored == [(i, 1.0 / (i + 1)) for i in range(RECORDS)], f"stored: {stored}"
    print(f"smoke: all {RECORDS} points are stored, each once, and the run is finished")


def trackagent(environment: dict[str, str], folder: Path, *arguments: str) -> str:
    """What the command prints; it must succeed."""
    done = subprocess.run(
        [COMMAND, *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, f"trackagent {' '.join(arguments)} failed:\n{done.stderr}"
    return done.stdout


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    """The first true value of `condition`; AssertionError when there is none before the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.05)
    return value


if __name__ == "__main__":
    main()
