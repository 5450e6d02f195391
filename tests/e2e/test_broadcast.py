"""Rank 0's word among real processes: torchrun's store and restarts, a process group's store and its end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Looked for, not imported: the tests' own process stays without torch.
pytestmark = pytest.mark.skipif(find_spec("torch") is None, reason="torch is in the demo extra")

DEADLINE_S = 60
GIVEN = "a" * 32
OTHER = "b" * 32

# Every script begins with this. told() writes what decide() said into a file of this process, for the tests.
PRELUDE = """
import datetime, json, os, sys, time
import torch.distributed as dist
from trackagent.client.hub import Hub
from trackagent.client.identity import decide

class Names:
    def __init__(self, node):
        self.node = node
    def name(self, ranks):
        return Hub(f"{self.node}:7717", "0" * 64, "1" * 32), ""

def told(call, node="", **arguments):
    hubs = Names(node) if node else None
    decision = decide(timeout_s=30, **{"run_id": None, "hubs": hubs, **arguments})
    who = decision.identity
    line = {"call": call, "run_id": who.run_id, "attempt": who.attempt, "rank": who.rank,
            "world_size": who.world_size, "hub": who.hub and who.hub.text(), "warnings": decision.warnings,
            "restart": os.environ.get("TORCHELASTIC_RESTART_COUNT")}
    with open(f"{sys.argv[1]}/{os.getpid()}.jsonl", "a") as file:
        print(json.dumps(line), file=file)
    return decision
"""

# Rank 0 comes last to the first call; the second run begins within a process group, the third after it.
TORCHRUN = """
rank = int(os.environ["RANK"])
if rank == 0:
    time.sleep(1)
first = told("before the group", node=f"rank-{rank}")
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
second = told("in the group", run_id="b" * 32 if rank == 2 else None)
dist.destroy_process_group()
third = told("after the group", run_id="a" * 32)
fourth = told("the same run again", run_id="a" * 32)
if rank != 0:
    time.sleep(0.5)
fifth = told("others late, rank 0 done")
for decision in (first, second, third, fourth, fifth):
    decision.stop_serving()
"""

# Rank 1 dies before its first word, then after it; the third group lives.
RESTARTED = """
rank, restart = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
if (rank, restart) == ("1", "0"):
    while not os.listdir(sys.argv[1]):  # until rank 0 has decided, and waits for somebody to ask
        time.sleep(0.02)
    os._exit(1)
# Each group is on another node.
told("first", node=f"rank-{rank}-of-group-{restart}")
if (rank, restart) == ("1", "1"):
    os._exit(1)
if restart != "2":
    time.sleep(600)  # torchrun ends this rank
told("second")
"""

# As with srun or in pods: the store is rank 0's, and opens after init(). Rank 1 never makes the second call,
# and rank 0 leaves without stop_serving(), its store gone under the thread that serves.
ENVIRONMENT = """
told("before the group")
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
dist.barrier()
if dist.get_rank() == 0:
    told("rank 0 only")
    time.sleep(1.5)  # rank 0 looks ever less often: hardly at the moment in which the group is torn down
dist.barrier()
dist.destroy_process_group()
"""

# No variable says anything: the process group alone knows.
GROUP_ONLY = """
dist.init_process_group("gloo", init_method=sys.argv[2], rank=int(os.environ["NUMBER"]), world_size=2,
                        timeout=datetime.timedelta(seconds=30))
told("in the group")
dist.barrier()
dist.destroy_process_group()
"""


# torchrun, whose ranks are forked where torch is imported already: it takes each of them 3 s.
TORCHRUN_LAUNCHER = """
import runpy, signal, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def rank(script, *arguments):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in a process of its own
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")

ranks, restarts, *script = sys.argv[1:]
elastic_launch(
    LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=int(ranks), max_restarts=int(restarts),
        run_id="job", rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1,
        start_method="fork",
    ),
    rank,
)(*script)
"""

# As srun does it: ranks that know their number at most.
LAUNCHER = """
import os, runpy, sys
import torch.distributed

ranks, name, *script = sys.argv[1:]
for rank in range(int(ranks)):
    if not os.fork():
        os.environ[name] = str(rank)
        sys.argv = script
        runpy.run_path(script[0], run_name="__main__")
        sys.exit()
sys.exit(sum(os.waitstatus_to_exitcode(os.wait()[1]) != 0 for _ in range(int(ranks))))
"""


@dataclass(frozen=True)
class Outcome:
    """What all processes of a job told, and how they ended."""

    lines: list[dict[str, Any]]
    returncode: int
    stderr: str

    def of(self, **wanted: Any) -> list[dict[str, Any]]:
        return [line for line in self.lines if wanted.items() <= line.items()]

    def runs(self, **wanted: Any) -> list[tuple[int, str, int]]:
        """Rank, run id and attempt of every line that is wanted, in order of ranks."""
        return sorted((line["rank"], line["run_id"], line["attempt"]) for line in self.of(**wanted))


def execute(folder: Path, launcher: str, script: str, *arguments: str, **environ: str) -> Outcome:
    """Lets `launcher` start the ranks, each of which runs `script`."""
    path, out = folder / "script.py", folder / "told"
    path.write_text(PRELUDE + script)
    out.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, *arguments[:2], str(path), str(out), *arguments[2:]],
        env={**kept, "OMP_NUM_THREADS": "1", **environ},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, stderr = process.communicate(timeout=DEADLINE_S)
    finally:
        process.terminate()  # SIGTERM: torchrun takes its workers along
        process.wait(DEADLINE_S)
    lines = [json.loads(line) for file in out.iterdir() for line in file.read_text().splitlines()]
    return Outcome(lines, process.returncode, stderr)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return execute(tmp_path_factory.mktemp("job"), TORCHRUN_LAUNCHER, TORCHRUN, "4", "0")


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return execute(tmp_path_factory.mktemp("restarted"), TORCHRUN_LAUNCHER, RESTARTED, "2", "2")


@pytest.fixture(scope="module")
def by_environment(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    environ = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return execute(tmp_path_factory.mktemp("env"), LAUNCHER, ENVIRONMENT, "2", "RANK", **environ)


@pytest.fixture(scope="module")
def by_group(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    method = f"tcp://127.0.0.1:{free_port()}"
    return execute(tmp_path_factory.mktemp("group"), LAUNCHER, GROUP_ONLY, "2", "NUMBER", method)


def the_run(outcome: Outcome, **wanted: Any) -> str:
    """The one run id that the wanted lines name."""
    [run_id] = {line["run_id"] for line in outcome.of(**wanted)}
    return str(run_id)


def everywhere(run_id: str, attempt: int, ranks: int) -> list[tuple[int, str, int]]:
    return [(rank, run_id, attempt) for rank in range(ranks)]


# torchrun


def test_the_job_ends_well(job: Outcome) -> None:
    assert job.returncode == 0, job.stderr


def test_all_ranks_wait_for_a_late_rank_0_and_agree(job: Outcome) -> None:
    call = "before the group"
    assert job.runs(call=call) == everywhere(the_run(job, call=call), 1, 4)


def test_every_rank_hears_of_rank_0s_hub(job: Outcome) -> None:
    hubs = [line["hub"] for line in job.of(call="before the group")]
    assert hubs == [f"rank-0:7717 {'0' * 64} {'1' * 32}"] * 4


def test_all_ranks_agree_within_a_process_group(job: Outcome) -> None:
    call = "in the group"
    assert job.runs(call=call) == everywhere(the_run(job, call=call), 1, 4)


def test_a_second_init_is_another_run(job: Outcome) -> None:
    assert the_run(job, call="in the group") != the_run(job, call="before the group")


def test_an_id_given_to_another_rank_only_is_not_the_runs(job: Outcome) -> None:
    assert the_run(job, call="in the group") != OTHER


def test_only_the_rank_with_another_id_is_warned(job: Outcome) -> None:
    warned = [line["rank"] for line in job.of(call="in the group") if line["warnings"]]
    assert warned == [2]


def test_an_id_given_to_all_is_the_runs(job: Outcome) -> None:
    assert job.runs(call="after the group") == everywhere(GIVEN, 1, 4)


def test_a_second_init_with_the_same_id_is_the_next_attempt(job: Outcome) -> None:
    assert job.runs(call="the same run again") == everywhere(GIVEN, 2, 4)


def test_late_ranks_reach_a_rank_0_that_is_about_to_end(job: Outcome) -> None:
    call = "others late, rank 0 done"
    assert job.runs(call=call) == everywhere(the_run(job, call=call), 1, 4)


# torchrun --max-restarts


def test_the_restarted_job_ends_well(restarted: Outcome) -> None:
    assert restarted.returncode == 0, restarted.stderr


def test_the_first_group_has_rank_0s_word_only(restarted: Outcome) -> None:
    run_id = the_run(restarted, call="first")
    assert restarted.runs(restart="0") == [(0, run_id, 1)]


def test_a_death_before_init_leaves_the_next_group_in_agreement(restarted: Outcome) -> None:
    run_id = the_run(restarted, call="first")
    assert (1, run_id, 2) in restarted.runs(restart="1")
    assert {attempt for _, _, attempt in restarted.runs(restart="1")} == {2}


def test_a_death_after_init_leaves_the_next_group_in_agreement(restarted: Outcome) -> None:
    run_id = the_run(restarted, call="first")
    assert restarted.runs(restart="2", call="first") == everywhere(run_id, 3, 2)


def test_a_restarted_rank_0_names_the_hub_anew(restarted: Outcome) -> None:
    for restart in ("1", "2"):
        hubs = [line["hub"] for line in restarted.of(restart=restart, call="first")]
        assert {hub.partition(" ")[0] for hub in hubs} == {f"rank-0-of-group-{restart}:7717"}


def test_a_second_init_that_no_earlier_group_reached_is_at_attempt_1(restarted: Outcome) -> None:
    run_id = the_run(restarted, call="second")
    assert restarted.runs(call="second") == everywhere(run_id, 1, 2)


# RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT without torchrun


def test_ranks_agree_before_the_process_group_exists(by_environment: Outcome) -> None:
    run_id = the_run(by_environment, call="before the group")
    assert by_environment.runs(call="before the group") == everywhere(run_id, 1, 2)


def test_a_rank_0_that_still_serves_exits_well(by_environment: Outcome) -> None:
    assert by_environment.returncode == 0, by_environment.stderr


def test_a_rank_0_whose_store_is_gone_says_nothing_about_it(by_environment: Outcome) -> None:
    assert len(by_environment.of(call="rank 0 only")) == 1
    assert "Exception raised from" not in by_environment.stderr


# init_method="tcp://…"


def test_a_process_group_alone_is_enough_to_agree(by_group: Outcome) -> None:
    run_id = the_run(by_group)
    assert by_group.runs() == everywhere(run_id, 1, 2)


def test_ranks_and_world_size_are_the_process_groups(by_group: Outcome) -> None:
    assert sorted((line["rank"], line["world_size"]) for line in by_group.lines) == [(0, 2), (1, 2)]
