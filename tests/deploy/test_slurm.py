"""deploy/slurm: what a linter says; the scripts themselves, with Slurm's and systemd's commands played."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.manifests import ROOT
from trackagent.agent import store

SLURM = ROOT / "deploy" / "slurm"
SCRIPTS = sorted(path for path in SLURM.iterdir())
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
Played = Callable[..., list[str]]


def lint(path: Path) -> str:
    done = subprocess.run([SHELLCHECK, path], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_linter_has_nothing_to_say(script: Path) -> None:
    assert lint(script) == ""


def test_a_script_with_a_mistake_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "epilog.sh"
    path.write_text((SLURM / "epilog.sh").read_text().replace('"$jobs"', "$jobs"))
    assert "SC2086" in lint(path)


@pytest.fixture
def played(tmp_path: Path) -> Played:
    """played(script, *arguments, job=…): runs a script for a job of this user; the calls of commands that are
    played: scontrol and srun, which runs what it is told as node 0 of 2, and systemd-run and systemctl, which
    know the units that were started."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, body in PLAYED.items():
        (commands / name).write_text(
            f'#!/bin/sh\nlog() {{ echo "$@" >>{tmp_path}/calls; }}\n{body}'
        )
        (commands / name).chmod(0o755)
    calls = tmp_path / "calls"

    def play(script: str, *arguments: str, job: int = 7, **variables: str) -> list[str]:
        calls.write_text("")
        slurm = {
            "SLURM_CLUSTER_NAME": "cluster",
            "SLURM_GPUS_ON_NODE": "2",
            "SLURM_JOB_GID": str(os.getgid()),
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NODELIST": "node-[0-1]",
            "SLURM_JOB_UID": str(os.getuid()),
            "SLURM_NNODES": "2",
            "SLURM_SUBMIT_DIR": str(tmp_path / "submitted"),
        }
        mine = {"ROOT_FOLDER": str(tmp_path), "LOCAL_DISK": str(tmp_path), "UNITS": str(tmp_path)}
        path = f"{commands}:{os.environ['PATH']}"
        done = subprocess.run(
            [SLURM / script, *arguments],
            env=os.environ | slurm | mine | {"PATH": path} | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        (tmp_path / "said").write_text(done.stdout + done.stderr)
        status = variables.get("STATUS", "0")
        assert str(done.returncode) == status, done.stderr
        return calls.read_text().splitlines()

    return play


PLAYED = {
    "scontrol": "printf 'node-0\nnode-1\n'",
    "srun": """
case $1 in --kill-on-bad-exit=1) ;; *) log srun "$1" "$2" "$3" ;; esac
while case $1 in --*) true ;; *) false ;; esac; do shift; done
SLURM_NODEID=0 "$@"
""",
    "trackagent": """
log trackagent "$@"
log "node $PET_NODE_RANK run $TRACKAGENT_RUN_ID state $TRACKAGENT_STATE"
mkdir -p "$TRACKAGENT_STATE"
test -z "${STORE:-}" || "$STORE" "$TRACKAGENT_STATE/store.db"
exit "${STATUS:-0}"
""",
    "systemd-run": """
log systemd-run "$@"
for word in "$@"; do case $word in --unit=*) touch "$UNITS/${word#--unit=}.unit" ;; esac; done
""",
    "systemctl": """
case $1 in
  is-active) test -e "$UNITS/$3.unit" ;;
  stop) log systemctl "$@"; rm "$UNITS/$2.unit" ;;
esac
""",
}


def test_each_node_of_a_job_runs_torchrun_beside_an_agent_that_listens(
    played: Played, tmp_path: Path
) -> None:
    command, where, copied = played("train.sbatch", "train.py", "--epochs", "3", job=1234)
    assert command == (
        "trackagent run --listen 0.0.0.0:17951 --drain-timeout-s 60 -- torchrun --nnodes=2 "
        "--nproc-per-node=2 --master-addr=node-0 --master-port=29734 train.py --epochs 3"
    )
    state = tmp_path / f"trackagent-{os.getuid()}"
    run_id = where.split()[3]
    assert where == f"node 0 run {run_id} state {state}"
    assert (len(run_id), int(run_id, 16) > 0) == (32, True)
    assert copied == "srun --nodes=1 --ntasks=1 --nodelist=node-0"  # rank 0's node


# The store of an agent that is killed with its last transaction in the log.
KILLED = f"""#!{sys.executable}
import os, pathlib, sys
from tests.agent.store.batches import batch, param, producer
from trackagent.agent import store

path = pathlib.Path(sys.argv[1])
path.unlink(missing_ok=True)
writer = store.open_writer(path)
writer.write(batch(1, producer(), params=[param(producer(), "job", os.environ["SLURM_JOB_ID"])]))
assert path.with_name("store.db-wal").stat().st_size
os._exit(1)
"""


def test_the_result_of_a_job_has_what_a_killed_agent_stored_last(
    played: Played, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    killed.write_text(KILLED)
    killed.chmod(0o755)
    result = tmp_path / "submitted" / "trackagent-7"
    result.mkdir(parents=True)
    (result / "store.db-wal").write_bytes(b"of an earlier attempt")
    played("train.sbatch", "train.py", STORE=str(killed), PYTHONPATH=str(ROOT))
    assert f"trackagent show latest --state {result}" in (tmp_path / "said").read_text()
    with contextlib.closing(store.open_reader(result / "store.db")) as reader:
        (run,) = reader.runs()
        assert reader.params(run.run_id) == {"job": "7"}


def test_a_job_that_slurm_starts_again_has_the_same_run(played: Played) -> None:
    runs = [played("train.sbatch", "train.py", job=job)[1].split()[3] for job in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]


def test_a_job_that_delivers_to_a_hub_copies_nothing(played: Played) -> None:
    calls = played("train.sbatch", "train.py", TRACKAGENT_STORE="hub.example.com:7717")
    assert [call for call in calls if call.startswith("srun")] == []


def test_a_jobs_status_is_its_trainings(played: Played, tmp_path: Path) -> None:
    calls = played("train.sbatch", "train.py", STATUS="3")
    assert calls[-1].startswith("srun --nodes=1 --ntasks=1")  # what was stored is kept all the same
    assert "the result was not copied" in (tmp_path / "said").read_text()  # nothing was stored


def test_the_first_job_of_a_user_on_a_node_starts_an_agent(played: Played, tmp_path: Path) -> None:
    (started,) = played("prolog.sh", job=1)
    state = tmp_path / "var" / "lib" / "trackagent" / str(os.getuid())
    assert f"--unit=trackagent-{os.getuid()} --uid={os.getuid()} " in started
    assert f"--setenv=TRACKAGENT_STATE={state} " in started
    assert started.endswith(" /opt/trackagent/bin/trackagent start")
    assert state.stat().st_mode == 0o40700


def test_further_jobs_use_it_and_the_last_ends_it(played: Played) -> None:
    played("prolog.sh", job=1)
    assert played("prolog.sh", job=2) == []
    assert played("epilog.sh", job=1) == []
    assert played("epilog.sh", job=2) == [f"systemctl stop trackagent-{os.getuid()}"]
    assert len(played("prolog.sh", job=3)) == 1


def test_an_agent_that_cannot_start_holds_no_job_up(played: Played, tmp_path: Path) -> None:
    (tmp_path / "commands" / "systemd-run").write_text("#!/bin/sh\nexit 1\n")
    assert played("prolog.sh", job=1) == []
    assert "trackagent: no agent for user" in (tmp_path / "said").read_text()


def test_the_end_of_a_job_whose_prolog_never_ran_is_no_error(played: Played) -> None:
    assert played("epilog.sh", job=1) == [f"systemctl stop trackagent-{os.getuid()}"]
