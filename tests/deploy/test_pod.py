"""The job's pod on this machine: agent and trainer in containers of their own that share two volumes."""

from __future__ import annotations

import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.pods import TOKEN, Pod, need_namespaces, pod, template
from tests.fakes import AgentProcess, Folders, Point, wait_until
from trackagent.agent.config import SPOOL_NAME, STORE_NAME

pytestmark = pytest.mark.usefixtures("_namespaces")

JOB = "job/job.yaml"
# What the manifest's TRACKAGENT_RUN_ID is in these pods.
RUN_ID = "00000000000040008000000000000001"
# With no hub: the agent stores what it takes on the volume.
ALONE = {"TRACKAGENT_STORE": "", "TRACKAGENT_TOKEN_FILE": "", "TRACKAGENT_COLLECT": "none"}
# Says that it has logged, and goes on until it is killed.
TRAINING = """
import threading
from trackagent import client
client.init(experiment="pod")
for step in range(1000):
    client.log({"loss": step / 7}, step=step)
print("logged", flush=True)
threading.Event().wait()
"""
EVERY_POINT = [Point("loss", "rank 0", step, step / 7) for step in range(1000)]


@pytest.fixture(scope="module")
def _namespaces() -> None:
    need_namespaces()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Pod]:
    with pod(template(JOB), tmp_path, **ALONE) as made:
        yield made


def stored(base: Path) -> AgentProcess:
    """What the pods of `base` have stored, for reading."""
    return AgentProcess(Folders(base / "no-memory", base / "trackagent-state" / "agent"))


def kill_a_training_container(job: Pod) -> None:
    """Starts a trainer that logs, and ends it with all of its container once it says that it has logged."""
    trainer = job.run("trainer", "python", "-c", TRAINING)
    while trainer.next_line() != "logged":
        pass  # a warning, such as that the agent is slow
    assert trainer.end_with(signal.SIGKILL) != 0


def test_what_a_trainer_logged_outlives_its_container(job: Pod, tmp_path: Path) -> None:
    sidecar = job.start()
    wait_until(lambda: job.probe("trackagent"), "the kubelet may start the trainer")
    kill_a_training_container(job)
    assert sidecar.end_with(signal.SIGTERM) == 0
    assert not job.probe("trackagent")
    run = stored(tmp_path).run(RUN_ID)
    assert run is not None
    assert (run.status, stored(tmp_path).exported(RUN_ID)) == ("killed", EVERY_POINT)


def test_what_a_sidecar_could_not_deliver_is_delivered_by_the_next_on_that_volume(
    tmp_path: Path,
) -> None:
    brief = ALONE | {"TRACKAGENT_DRAIN_TIMEOUT_S": "0.2"}
    with pod(template(JOB), tmp_path, **brief) as first:
        sidecar = first.start()
        with sqlite3.connect(stored(tmp_path).folders.state / STORE_NAME) as other:
            other.execute("BEGIN IMMEDIATE")
            kill_a_training_container(first)
            assert sidecar.end_with(signal.SIGTERM) == 0
            said = sidecar.output()
        other.close()
    assert "in the spool: the next agent here delivers what is left" in said
    assert stored(tmp_path).run(RUN_ID) is None

    with pod(template(JOB), tmp_path, **ALONE) as second:
        assert second.start().end_with(signal.SIGTERM) == 0
    assert stored(tmp_path).exported(RUN_ID) == EVERY_POINT


def test_a_volume_that_was_opened_to_its_group_is_closed_again(tmp_path: Path) -> None:
    state = tmp_path / "trackagent-state"
    with pod(template(JOB), tmp_path, **ALONE) as first:
        first.make_folders()
        assert first.run("trackagent", "mkdir", "/var/lib/trackagent/dead-letters").ended() == 0
        assert first.run("trackagent", "touch", f"/var/lib/trackagent/{SPOOL_NAME}").ended() == 0
    # As the kubelet does at each start where fsGroupChangePolicy is Always.
    for path in state.rglob("*"):
        path.chmod(path.stat().st_mode | (0o2770 if path.is_dir() else 0o660))
    with pod(template(JOB), tmp_path, **ALONE) as second:
        assert second.start().end_with(signal.SIGTERM) == 0
    assert [path for path in state.rglob("*") if path.stat().st_mode & 0o077] == []


def test_a_trainer_sees_nothing_of_the_volumes_but_the_folders_that_are_its_users(job: Pod) -> None:
    job.make_folders()
    shown = job.run(
        "trainer", "stat", "--format", "%A %u", "/run/trackagent", "/var/lib/trackagent"
    )
    assert shown.output() == "drwx--S--- 1000\n" * 2
    listed = job.run("trainer", "ls", "/run", "/var/lib")
    assert listed.output() == "/run:\ntrackagent\n\n/var/lib:\ntrackagent\n"


@pytest.mark.parametrize("manifest", [JOB, "agent/daemonset.yaml"])
def test_the_sidecar_may_read_the_cluster_token(manifest: str, tmp_path: Path) -> None:
    program = (
        "import pathlib, trackagent.agent.hubkey as key; "
        "print(key.read_token(pathlib.Path('/etc/trackagent/token')))"
    )
    with pod(without_folders(template(manifest)), tmp_path) as made:
        agent = made.run("trackagent", "python", "-c", program)
        assert agent.output() == f"{TOKEN}\n"


def without_folders(manifest: dict[str, Any]) -> dict[str, Any]:
    """The pod with nothing but its token, since the node's folders are not this machine's."""
    spec = manifest["spec"]
    token = [volume for volume in spec["volumes"] if "secret" in volume]
    agents = [
        one | {"volumeMounts": [m for m in one["volumeMounts"] if m["name"] == token[0]["name"]]}
        for one in (*spec["initContainers"], *spec["containers"])
    ]
    return {"spec": spec | {"volumes": token, "initContainers": [], "containers": agents}}


def test_the_agent_refuses_a_volumes_own_folder(job: Pod) -> None:
    command = ("trackagent", "start", "--dir", "/volumes/memory/a", "--state", "/volumes/state")
    agent = job.run("trackagent-folders", *command, **ALONE)
    assert "/volumes/state belongs to user 0, this is user 1000" in agent.output()
    assert agent.ended() == 1


def test_the_agent_refuses_a_folder_in_a_volume_that_all_may_rename_in(job: Pod) -> None:
    command = ("trackagent", "start", "--dir", "/volumes/memory/a", "--state", "/volumes/state/a")
    agent = job.run("trackagent-folders", *command, **ALONE)
    assert (
        "/volumes/state, which leads to /volumes/state/a, can be written by everyone (mode 2777) and "
        "has no sticky bit" in agent.output()
    )
    assert agent.ended() == 1


def test_a_nodes_agent_starts_in_folders_that_root_makes_on_the_node(tmp_path: Path) -> None:
    with pod(template("agent/daemonset.yaml"), tmp_path, **ALONE) as made:
        made.make_folders()  # and again before each start
        assert made.start(folder="1000").end_with(signal.SIGTERM) == 0
    for volume in ("trackagent-memory", "trackagent-state"):
        status = (tmp_path / volume / "1000").stat()
        assert (status.st_uid, status.st_mode) == (1000, 0o40700)


def without_group(spec: dict[str, Any]) -> dict[str, Any]:
    security = {name: value for name, value in spec["securityContext"].items() if name != "fsGroup"}
    return spec | {"securityContext": security}


def test_the_sidecar_starts_in_volumes_without_an_fsgroup_too(tmp_path: Path) -> None:
    manifest = template(JOB)
    with pod({"spec": without_group(manifest["spec"])}, tmp_path, **ALONE) as made:
        assert made.start().end_with(signal.SIGTERM) == 0
