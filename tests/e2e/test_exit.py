"""How a process ends: what of it is delivered, what its run becomes, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import (
    DEADLINE_S,
    TORCHRUN_S,
    AgentProcess,
    Folders,
    next_line,
    run_script,
    start_script,
    torchrun,
    wait_until,
)
from tests.groups import memory_group
from trackagent.agent.config import STORE_NAME
from trackagent.agent.store import open_reader

STEPS = 20
BEGIN = f"""
import os, signal, sys, threading, time
from trackagent import client

run = client.init(experiment="exit")
for step in range({STEPS}):
    client.log({{"loss": step}}, step=step)
print(run.id, flush=True)
"""
DIED = "the process ended without finish()"

# What the script does then; its exit status; the run's status and error.
ENDINGS: dict[str, tuple[str, int, str, str]] = {
    "finish": ("client.finish()", 0, "finished", ""),
    "finish as failed": ("client.finish('failed', 'no data')", 0, "failed", "no data"),
    "normal end": ("", 0, "finished", ""),
    "exception": (
        "raise ValueError('no such\\nlayer')",
        1,
        "failed",
        "ValueError: no such layer",
    ),
    "sys.exit()": ("sys.exit()", 0, "finished", ""),
    "sys.exit(0)": ("sys.exit(0)", 0, "finished", ""),
    "sys.exit(3)": ("sys.exit(3)", 3, "failed", "SystemExit: 3"),
    "sys.exit of a text": ("sys.exit('no data')", 1, "failed", "SystemExit: no data"),
    "sys.exit through finally": (
        "try:\n    sys.exit(3)\nfinally:\n    client.log({'end': 1}, step=0)",
        3,
        "failed",
        "SystemExit: 3",
    ),
    "sys.exit that was caught": (
        "try:\n    sys.exit(3)\nexcept SystemExit:\n    pass",
        0,
        "finished",
        "",
    ),
    "sys.exit that was caught, then another": (
        "try:\n    sys.exit(3)\nexcept SystemExit:\n    sys.exit(4)",
        4,
        "failed",
        "SystemExit: 4",
    ),
    "sys.exit that was caught, then an exception": (
        "try:\n    sys.exit(3)\nexcept SystemExit:\n    raise KeyError('x') from None",
        1,
        "failed",
        "KeyError: 'x'",
    ),
    "an exception that was caught": (
        "try:\n    1 / 0\nexcept ArithmeticError as error:\n"
        "    sys.excepthook(type(error), error, None)",
        0,
        "finished",
        "",
    ),
    # Nobody is told of the code: the run says so in an event.
    "raise SystemExit(3)": ("raise SystemExit(3)", 3, "finished", ""),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", -2, "killed", "KeyboardInterrupt"),
    "SIGINT": (
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
        -2,
        "killed",
        "KeyboardInterrupt",
    ),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", -15, "killed", DIED),
    "SIGTERM with a handler": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)",
        143,
        "failed",
        "SystemExit: 143",
    ),
    "SIGHUP": ("os.kill(os.getpid(), signal.SIGHUP)", -1, "killed", DIED),
    "SIGKILL": ("os.kill(os.getpid(), signal.SIGKILL)", -9, "killed", DIED),
    "os._exit(0)": ("os._exit(0)", 0, "killed", DIED),
    "os._exit(1)": ("os._exit(1)", 1, "killed", DIED),
    "os.abort": ("os.abort()", -6, "killed", DIED),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", -11, "killed", DIED),
    "exec": ("os.execv(sys.executable, [sys.executable, '-c', ''])", 0, "killed", DIED),
    "a block": ("with run:\n    pass", 0, "finished", ""),
    "a block that an exception leaves": (
        "with run:\n    raise KeyError('x')",
        1,
        "failed",
        "KeyError: 'x'",
    ),
    "a block that sys.exit leaves": (
        "with run:\n    sys.exit(3)",
        3,
        "failed",
        "SystemExit: 3",
    ),
    "a forked child that ends first": (
        "pid = os.fork()\nif pid == 0:\n    sys.exit(5)\nos.waitpid(pid, 0)",
        0,
        "finished",
        "",
    ),
    "another thread that calls sys.exit": (
        "thread = threading.Thread(target=sys.exit, args=(3,))\nthread.start()\nthread.join()",
        0,
        "finished",
        "",
    ),
    "a daemon thread that goes on logging": (
        "def work():\n    while True:\n        client.log({'more': 1})\n"
        "threading.Thread(target=work, daemon=True).start()",
        0,
        "finished",
        "",
    ),
}


@pytest.fixture(scope="module")
def ended(agent: AgentProcess) -> dict[str, subprocess.CompletedProcess[str]]:
    """Every ending's process, after its end; a few run side by side."""
    with ThreadPoolExecutor(4) as pool:
        done = pool.map(
            lambda ending: run_script(
                agent.folders, BEGIN + ENDINGS[ending][0] + "\n", expect=None
            ),
            ENDINGS,
        )
        return dict(zip(ENDINGS, done, strict=True))


@pytest.mark.parametrize("ending", ENDINGS)
def test_everything_is_delivered_and_the_run_says_how_its_process_ended(
    agent: AgentProcess, ended: dict[str, subprocess.CompletedProcess[str]], ending: str
) -> None:
    _, code, status, error = ENDINGS[ending]
    done = ended[ending]
    assert done.returncode == code, done.stderr
    run = agent.wait_for_status(done.stdout.split()[0], status)
    assert run.error == error
    assert losses(agent, run.run_id) == (list(range(STEPS)), [float(i) for i in range(STEPS)])
    assert run.lost_records == 0 or ending == "a daemon thread that goes on logging"
    wait_until(lambda: not left_of(agent.folders, run.run_id), "no journal of the run is left")


def losses(agent: AgentProcess, run_id: str) -> tuple[list[int], list[float]]:
    with contextlib.closing(open_reader(agent.folders.state / STORE_NAME)) as reader:
        found = reader.series(run_id, "loss", "rank 0")
    return found.steps.tolist(), found.values.tolist()


def left_of(folders: Folders, run_id: str) -> list[Path]:
    """Segments in the journals' folders that name the run."""
    found = []
    for base in (folders.directory, folders.state):
        for folder, _, names in os.walk(base / "journals"):  # which may go meanwhile
            for path in (Path(folder, name) for name in names if name.endswith(".seg")):
                with contextlib.suppress(FileNotFoundError):
                    if run_id.encode() in path.read_bytes()[:4096]:
                        found.append(path)
    return found


def events(agent: AgentProcess, run_id: str) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = agent.shown(run_id)["events"]
    return shown


def test_an_exit_code_that_nobody_is_told_is_said_to_be_unknown(
    agent: AgentProcess, ended: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    done = ended["raise SystemExit(3)"]
    run = agent.wait_for_status(done.stdout.strip(), "finished")
    messages = [(event["level"], event["message"]) for event in events(agent, run.run_id)]
    assert messages == [
        (
            "warning",
            "the script was ended by a SystemExit raised without sys.exit(): its exit code is not known",
        )
    ]


def test_a_process_that_ends_leaves_no_process_behind(agent: AgentProcess) -> None:
    program = BEGIN + "print(os.getpid(), flush=True)"
    done = run_script(agent.folders, program, start="")
    assert not Path(f"/proc/{done.stdout.split()[1]}").exists()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert {Path(f"/proc/{pid}/comm").read_text() for pid in children} <= {"trackagent\n"}


# --- a rank that dies

DEATH = BEGIN + "sys.stdin.readline(); os.kill(os.getpid(), signal.SIGKILL)"


def test_a_rank_that_dies_becomes_an_event_with_its_last_step(agent: AgentProcess) -> None:
    with start_script(agent.folders, DEATH, RANK="0", WORLD_SIZE="1") as process:
        run_id = next_line(process)
        process.stdin.write("\n")
        process.stdin.close()
        process.wait(DEADLINE_S)
    agent.wait_for_status(run_id, "killed")
    [died] = events(agent, run_id)
    assert died["level"] == "error"
    assert died["message"].startswith(
        f"rank 0 on node {os.uname().nodename} (pid {process.pid}) died without finish(): last step 19 at 20"
    )
    told = {name: died["data"][name] for name in ("rank", "node", "pid", "last_step")}
    assert told == {"rank": 0, "node": os.uname().nodename, "pid": process.pid, "last_step": 19}
    [last] = [point for point in export(agent, run_id) if point["step"] == 19]
    assert died["data"]["last_time_ns"] == last["time_ns"]


def export(agent: AgentProcess, run_id: str) -> list[dict[str, Any]]:
    lines = agent.run_cli("export", run_id).stdout.splitlines()
    return [json.loads(line) for line in lines]


def test_a_rank_that_ended_by_itself_while_no_agent_ran_did_not_die(
    folders: Folders, own_agent: Callable[..., AgentProcess]
) -> None:
    done = run_script(folders, BEGIN)
    agent = own_agent("--deliver-interval-s", "0.02").start()
    run = agent.wait_for_status(done.stdout.strip(), "finished")
    agent.wait_for_no_journals()
    agent.wait_for_delivery()
    assert events(agent, run.run_id) == []


def test_a_forked_process_that_dies_is_no_event(agent: AgentProcess) -> None:
    program = BEGIN + (
        "pid = os.fork()\n"
        "if pid == 0:\n    client.log({'worker': 1}); os._exit(1)\n"
        "os.waitpid(pid, 0)"
    )
    done = run_script(agent.folders, program)
    run = agent.wait_for_status(done.stdout.strip(), "finished")
    wait_until(lambda: not left_of(agent.folders, run.run_id), "the worker's journal is read")
    wait_until(lambda: any(p["key"] == "worker" for p in export(agent, run.run_id)))
    assert events(agent, run.run_id) == []


# --- memory that ran out

HUNGRY = """
import sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text("0")
from trackagent import client
run = client.init(experiment="oom")
client.log({"loss": 1.0}, step=7)
print(run.id, flush=True)
sys.stdin.readline()
taken = []
while True:
    taken.append(bytearray(b"x" * 2**20))
"""


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A memory control group below this process's own, with little room."""
    with memory_group(128 * 2**20) as group:
        yield group


def test_a_rank_that_the_kernel_killed_for_lack_of_memory_says_so(
    folders: Folders, own_agent: Callable[..., AgentProcess], small_group: Path
) -> None:
    agent = own_agent("--deliver-interval-s", "0.02", "--log-level", "debug").start()
    with start_script(folders, HUNGRY, small_group) as process:
        run_id = next_line(process)
        # The agent counts from when it first sees the rank.
        wait_until(lambda: f"pid {process.pid}) is watched" in agent.output)
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(DEADLINE_S) == -signal.SIGKILL
    agent.wait_for_status(run_id, "killed")
    [died] = events(agent, run_id)
    assert died["data"]["oom_killed"] == 1
    assert died["message"].endswith(
        "; since it was first seen, the kernel killed 1 process of its control group for lack of memory"
    )


# --- torchrun

TORCHRUN = (
    BEGIN.replace("print(run.id, flush=True)", "")
    + """
if run.rank == 0:
    open(sys.argv[1], "w").write(run.id)
if run.rank == 1:
    raise RuntimeError("no data")
time.sleep(600)
"""
)


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is in the demo extra")
def test_a_job_that_torchrun_ends_for_one_rank_is_failed_with_that_ranks_error(
    agent: AgentProcess, tmp_path: Path
) -> None:
    script, told = tmp_path / "train.py", tmp_path / "run"
    script.write_text(TORCHRUN)
    with torchrun(agent.folders, script, told) as process:
        process.communicate(timeout=TORCHRUN_S)
    assert process.returncode == 1
    run = agent.wait_for_status(told.read_text(), "failed")
    assert run.error == "RuntimeError: no data"
    points = agent.exported(run.run_id)
    assert sorted({point.source for point in points}) == ["rank 0", "rank 1"]
    assert len(points) == 2 * STEPS
    died = [(event["source"], event["data"]["last_step"]) for event in events(agent, run.run_id)]
    assert died == [("rank 0", STEPS - 1)]
    wait_until(lambda: not left_of(agent.folders, run.run_id), "no journal is left")
