"""A fault drill with real ranks: what goes wrong is told in the run, the log, `tail` and by a hook."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.fakes import (
    DEADLINE_S,
    AgentProcess,
    Folders,
    next_line,
    run_script,
    start_script,
    wait_until,
)

# Steps as they are asked for on stdin: the numbers of all of them, then what to log beside them.
RANK = """
import json, sys
from trackagent import client

run = client.init(experiment="drill", run_name="drill")
print(run.rank, flush=True)
for line in sys.stdin:
    steps, values = json.loads(line)
    for step in steps:
        client.log({"loss": 1.0, **values}, step=step)
    print("logged", flush=True)
"""


@contextlib.contextmanager
def rank_of(folders: Folders, run_id: str, rank: int) -> Iterator[Any]:
    job = {"TRACKAGENT_RUN_ID": run_id, "RANK": str(rank), "WORLD_SIZE": "2"}
    with start_script(folders, RANK, **job) as process:
        try:
            assert next_line(process) == str(rank)
            yield process
        finally:
            process.kill()  # a stopped one too


def log(process: Any, steps: range, **values: float) -> None:
    process.stdin.write(json.dumps([list(steps), values]) + "\n")
    process.stdin.flush()
    assert next_line(process) == "logged"


def events(agent: AgentProcess, run_id: str, rule: str) -> list[dict[str, Any]]:
    """What was told of a rule, oldest first."""
    if agent.run(run_id) is None:
        return []
    return [event for event in agent.shown(run_id)["events"] if event["data"].get("rule") == rule]


def test_a_nan_with_which_a_script_ends_is_told(
    own_agent: Callable[..., AgentProcess], folders: Folders
) -> None:
    agent = own_agent("--health", "all", "--deliver-interval-s", "0.05").start()
    script = """
from trackagent import client
run = client.init(experiment="nan")
print(run.id)
client.log({"loss\\u202e": float("nan")}, step=7)
raise SystemExit(3)
"""
    run_id = run_script(folders, script, expect=3).stdout.strip()
    wait_until(lambda: events(agent, run_id, "nonfinite"), "the NaN is told")
    [nan] = events(agent, run_id, "nonfinite")
    assert (nan["data"]["rank"], nan["data"]["step"]) == (0, 7)
    wait_until(lambda: r"loss\u202e is nan on rank 0" in agent.output, "the log shows it")
    assert "\u202e" not in agent.output


def test_a_drill(own_agent: Callable[..., AgentProcess], folders: Folders, tmp_path: Path) -> None:
    hooked = tmp_path / "hooked"
    agent = own_agent(
        *("--health", "all", "--deliver-interval-s", "0.05", "--hang-s", "3", "--hang-steps", "1"),
        *("--hook-command", f"cat >> {hooked}; echo >> {hooked}"),
    ).start()
    run_id = uuid4().hex
    with rank_of(folders, run_id, 0) as first, rank_of(folders, run_id, 1) as second:
        # Rank 1 stops, rank 0 comes some steps further and waits for it.
        log(first, range(20))
        log(second, range(20))
        wait_until(lambda: agent.run(run_id) and len(agent.exported(run_id)) == 40, "all is stored")
        os.kill(second.pid, signal.SIGSTOP)
        log(first, range(20, 24))
        wait_until(lambda: events(agent, run_id, "hang"), "the hang is told")
        hang = events(agent, run_id, "hang")[0]
        assert (hang["level"], hang["data"]["first_ranks"]) == ("error", [1])
        assert (hang["data"]["step"], hang["data"]["last_step"]) == (19, 23)
        os.kill(second.pid, signal.SIGCONT)

        # Rank 1 takes 40 % longer in one phase, and its loss becomes NaN.
        log(first, range(24, 44), **{"time/forward": 0.10, "time/data": 0.02})
        log(second, range(24, 44), **{"time/forward": 0.14, "time/data": 0.02})
        log(second, range(44, 46), loss=float("nan"))
        wait_until(lambda: events(agent, run_id, "straggler"), "the straggler is told")
        wait_until(lambda: events(agent, run_id, "nonfinite"), "the NaN is told")
        straggler = events(agent, run_id, "straggler")[0]["data"]
        assert (straggler["subject"], straggler["phase"]) == ("rank 1", "forward")
        assert straggler["ratio"] == round(0.10 / 0.14, 4)
        nan = events(agent, run_id, "nonfinite")[0]["data"]
        assert (nan["rank"], nan["step"], nan["value"]) == (1, 44, "nan")

        # All is well again, and said to be over.
        steps = itertools.count(46)

        def is_all_over() -> bool:
            step = next(steps)
            for process in (first, second):
                log(process, range(step, step + 1), **{"time/forward": 0.1})
            told = [events(agent, run_id, rule) for rule in ("hang", "nonfinite", "straggler")]
            return all(any(event["data"].get("over") for event in of_rule) for of_rule in told)

        wait_until(is_all_over, "everything is over")
        first.communicate(timeout=DEADLINE_S)
        second.kill()
        wait_until(lambda: "died without finish()" in hooked.read_text(), "the death is passed on")
    told = [json.loads(line) for line in hooked.read_text().splitlines() if line.strip()]
    texts = "\n".join(event["text"] for event in told)
    assert "[error] run drill: loss is nan on rank 1 from step 44 on" in texts
    assert "no rank's step has moved" in agent.output
    tailed = agent.run_cli("tail", run_id, "--once", "--lines", "10000").stdout
    assert "is a straggler in forward" in tailed
