"""Runs of several ranks that end differently, ranks that end without an agent, and what finish() leaves."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from uuid import uuid4

import pytest

from tests.fakes import (
    DEADLINE_S,
    TORCHRUN_S,
    AgentProcess,
    Folders,
    Point,
    next_line,
    run_script,
    start_script,
    torchrun,
    wait_until,
)
from trackagent.agent.config import STORE_NAME
from trackagent.agent.store import open_reader

STEPS = 20
DIED = "the process ended without finish()"
RANK = f"""
import os, signal, sys, time
from trackagent import client

run = client.init(experiment="ranks")
for step in range({STEPS}):
    client.log({{"loss": step}}, step=step)
print(run.id, flush=True)
"""


def points(*ranks: int) -> list[Point]:
    return [Point("loss", f"rank {rank}", step, step) for rank in ranks for step in range(STEPS)]


def job(run_id: str, rank: int) -> dict[str, str]:
    return {"TRACKAGENT_RUN_ID": run_id, "RANK": str(rank), "WORLD_SIZE": "3"}


# --- without an agent

# What the script does in the end; the run's status and error.
ENDINGS = {
    "finish": ("assert client.finish() is False", "finished", ""),
    "normal end": ("", "finished", ""),
    "exception": ("raise KeyError('x')", "failed", "KeyError: 'x'"),
    "sys.exit(3)": ("sys.exit(3)", "failed", "SystemExit: 3"),
    "SIGINT": ("os.kill(os.getpid(), signal.SIGINT)", "killed", "KeyboardInterrupt"),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", "killed", DIED),
    "SIGTERM with a handler": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "os.kill(os.getpid(), signal.SIGTERM)",
        "failed",
        "SystemExit: 143",
    ),
    "os._exit": ("os._exit(0)", "killed", DIED),
    "segmentation fault": ("import faulthandler; faulthandler._sigsegv()", "killed", DIED),
}


def test_runs_that_ended_while_there_was_no_agent_are_delivered_later_with_their_status(
    folders: Folders, own_agent: Callable[..., AgentProcess]
) -> None:
    with ThreadPoolExecutor(3) as pool:
        done = pool.map(
            lambda end: run_script(folders, RANK + end[0], expect=None), ENDINGS.values()
        )
        run_ids = [one.stdout.strip() for one in done]
    agent = own_agent("--deliver-interval-s", "0.02").start()
    steps = list(range(STEPS))
    for run_id, (_, status, error) in zip(run_ids, ENDINGS.values(), strict=True):
        run = agent.wait_for_status(run_id, status)
        assert run.error == error
        with contextlib.closing(open_reader(folders.state / STORE_NAME)) as reader:
            series = reader.series(run_id, "loss", "rank 0")
        assert (series.steps.tolist(), series.values.tolist()) == (steps, steps)
    agent.wait_for_no_journals()


# --- several ranks


@pytest.mark.parametrize(
    ("endings", "status", "error"),
    [
        (["", "raise KeyError('x')", ""], "failed", "KeyError: 'x'"),
        (["raise KeyError('x')", "", ""], "failed", "KeyError: 'x'"),
        (["", "", "os.kill(os.getpid(), signal.SIGKILL)"], "killed", DIED),
        (["os._exit(0)", "sys.exit(3)", ""], "failed", "SystemExit: 3"),
        (["", "", ""], "finished", ""),
    ],
    ids=["one fails", "rank 0 fails", "one is killed", "one fails, one is killed", "all finish"],
)
def test_the_run_of_ranks_that_end_differently(
    agent: AgentProcess, endings: list[str], status: str, error: str
) -> None:
    run_id = uuid4().hex
    with ThreadPoolExecutor(3) as pool:
        list(
            pool.map(
                lambda item: run_script(
                    agent.folders, RANK + item[1], expect=None, **job(run_id, item[0])
                ),
                enumerate(endings),
            )
        )
    wait_until(lambda: agent.run(run_id) is not None and agent.run(run_id).ranks == 3)
    assert agent.wait_for_status(run_id, status).error == error
    assert sorted(agent.exported(run_id)) == sorted(points(0, 1, 2))


def test_a_run_whose_rank_0_finishes_first_goes_on_until_the_last_rank_ends(
    agent: AgentProcess,
) -> None:
    run_id = uuid4().hex
    late = RANK + "sys.stdin.readline()\nclient.log({'late': 1.0}, step=0)"
    with start_script(agent.folders, late, **job(run_id, 1)) as process:
        next_line(process)
        run_script(agent.folders, RANK + "assert client.finish()", **job(run_id, 0))
        wait_until(lambda: len(agent.exported(run_id)) == 2 * STEPS)
        run = agent.run(run_id)
        assert run is not None
        assert run.status == "running"
        process.communicate("\n", timeout=DEADLINE_S)
    agent.wait_for_status(run_id, "finished")
    assert Point("late", "rank 1", 0, 1.0) in agent.exported(run_id)


# --- what is left


def test_finish_leaves_no_thread_file_mapping_or_lock_behind(agent: AgentProcess) -> None:
    program = """
import contextlib, os, threading, time
from trackagent import client

run = client.init(experiment="left")
client.log({"loss": 1.0})
assert client.finish()
def files(start):
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [name for name in names if start in name]
print([thread.name for thread in threading.enumerate()])
print(files("journals"))
deadline = time.monotonic() + 20  # gRPC closes its sockets on threads of its own
while files("socket:") and time.monotonic() < deadline:
    time.sleep(0.01)
print(files("socket:"))
print([line for line in open("/proc/self/maps") if "journals" in line])
print(run.id)
"""
    *left, run_id = run_script(agent.folders, program).stdout.splitlines()
    assert left == ["['MainThread']", "[]", "[]", "[]"]
    agent.wait_for_status(run_id, "finished")


# --- torchrun that is told to stop

# One torchrun for several jobs, of two ranks each, that begin without torch: it takes each rank 3 s.
TOLD = (
    """
import json, os, sys
job, rank = divmod(int(os.environ["RANK"]), 2)
run_id, handler = json.loads(sys.argv[2])[job]
os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "TRACKAGENT_RUN_ID": run_id}
del os.environ["TORCHELASTIC_RUN_ID"]
"""
    + RANK.replace("print(run.id, flush=True)", "exec(handler)")
    + """
open(f"{sys.argv[1]}/{job}.{rank}", "x").close()
# Python calls a handler between two instructions: a signal just before a long sleep would wait for its end.
while True:
    time.sleep(0.05)
"""
)
SAVED = """
def save_and_leave(*_):
    client.log({"saved": run.rank}, step=STEPS)
    client.finish()
    sys.exit(0)
signal.signal(signal.SIGTERM, save_and_leave)
""".replace("STEPS", str(STEPS))

# What the script does with SIGTERM, which torchrun passes on; the run's status and error.
HANDLERS = {
    "none": ("", "killed", DIED),
    "sys.exit(143)": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n",
        "failed",
        "SystemExit: 143",
    ),
    "an exception": (
        "def stop(*_):\n    raise RuntimeError('preempted')\nsignal.signal(signal.SIGTERM, stop)\n",
        "failed",
        "RuntimeError: preempted",
    ),
    "a last record and finish()": (SAVED, "finished", ""),
}


@pytest.fixture(scope="module")
def terminated(agent: AgentProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The run of each handler, by its name, after torchrun was told to stop."""
    folder = tmp_path_factory.mktemp("terminated")
    (folder / "train.py").write_text(TOLD)
    (folder / "ready").mkdir()
    jobs = [(uuid4().hex, installed) for installed, _, _ in HANDLERS.values()]
    arguments = (folder / "ready", json.dumps(jobs))
    with torchrun(agent.folders, folder / "train.py", *arguments, ranks=2 * len(jobs)) as process:
        wait_until(
            lambda: len(os.listdir(folder / "ready")) == 2 * len(jobs),
            "all ranks have logged",
            timeout_s=TORCHRUN_S,
        )
        process.terminate()
        process.communicate(timeout=TORCHRUN_S)
    return {name: run_id for name, (run_id, _) in zip(HANDLERS, jobs, strict=True)}


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is in the demo extra")
@pytest.mark.parametrize("handler", HANDLERS)
def test_a_job_whose_torchrun_is_terminated_keeps_everything_and_says_how_its_ranks_ended(
    agent: AgentProcess, terminated: dict[str, str], handler: str
) -> None:
    installed, status, error = HANDLERS[handler]
    run = agent.wait_for_status(terminated[handler], status)
    assert run.error == error
    saved = [Point("saved", f"rank {rank}", STEPS, rank) for rank in (0, 1)]
    logged = points(0, 1) + (saved if installed == SAVED else [])
    assert sorted(agent.exported(run.run_id)) == sorted(logged)
