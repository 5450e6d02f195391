"""deploy/Dockerfile: what a linter says, and its steps on this machine, where no image can be built."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.manifests import ROOT
from tests.deploy.pods import Pod, need_namespaces, pod
from tests.fakes import wait_until
from tests.strangers import give
from trackagent.agent.cli import NOTHING

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")
USER = 10001


def lint(path: Path) -> str:
    command = [str(HADOLINT), "--no-color", "--failure-threshold", "style", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def instructions() -> list[tuple[str, str]]:
    """The name of each instruction, and its text in one line."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.split("\n"))]


def the_last(name: str) -> str:
    return [rest for each, rest in instructions() if each == name][-1]


def environment() -> dict[str, str]:
    """What ENV sets in the image, without PATH."""
    pairs = [word.split("=", 1) for word in the_last("ENV").split()]
    return {name: value for name, value in pairs if name != "PATH"}


def test_a_linter_has_nothing_to_say() -> None:
    assert lint(DOCKERFILE) == ""


def test_a_dockerfile_with_a_mistake_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(DOCKERFILE.read_text().replace("FROM python:3.13-slim-bookworm", "FROM python"))
    assert "DL3006" in lint(path)


def test_it_copies_what_is_there_and_no_more_than_the_wheel_needs() -> None:
    copied = [
        word
        for name, rest in instructions()
        if name == "COPY" and not rest.startswith("--from")
        for word in rest.split()[:-1]
    ]
    assert [word for word in copied if not (ROOT / word).exists()] == []
    ignored = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert {word.rstrip("/") for word in copied} == allowed


def test_it_runs_as_a_user_who_is_not_root() -> None:
    assert the_last("USER") == f"{USER}:{USER}"
    assert f"useradd --uid {USER} --gid {USER}" in the_last("RUN")
    assert f"install -d -m 0700 -o {USER} -g {USER} /run/trackagent /var/lib/trackagent" in (
        the_last("RUN")
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages as the image has them: built as its first stage does, without what they depend on."""
    base = tmp_path_factory.mktemp("image")
    base.chmod(0o755)
    steps: list[list[str]] = [
        ["build", "--wheel", "--no-isolation", "--outdir", str(base / "wheel"), str(ROOT)],
        [
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(base / "packages"),
        ],
    ]
    for step in steps:
        if step[0] == "pip":
            step.extend(map(str, (base / "wheel").glob("*.whl")))
        done = subprocess.run([sys.executable, "-m", *step], capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return base / "packages"


@pytest.fixture
def container(installed: Path, tmp_path: Path) -> Iterator[Pod]:
    """`docker run --read-only` of the image, with the two folders that it writes in."""
    need_namespaces()
    folders = environment()["TRACKAGENT_DIR"], environment()["TRACKAGENT_STATE"]
    for volume in ("memory", "state"):
        # As it is in the image, which docker takes it from.
        (tmp_path / volume).mkdir()
        (tmp_path / volume / "own").mkdir(mode=0o700)
        give(tmp_path / volume / "own", USER, 0o700)
    mounts = [
        {"name": "memory", "mountPath": folders[0], "subPath": "own"},
        {"name": "state", "mountPath": folders[1], "subPath": "own"},
        {"name": "packages", "mountPath": "/packages"},
    ]
    image = {"name": "agent", "image": "trackagent", "volumeMounts": mounts}
    spec = {
        "securityContext": {"runAsUser": USER},
        "initContainers": [],
        "containers": [image],
        "volumes": [{"name": "memory"}, {"name": "state"}],
    }
    (tmp_path / "packages").symlink_to(installed)
    variables = environment() | {"PYTHONPATH": "/packages", "TRACKAGENT_COLLECT": "none"}
    with pod({"spec": spec}, tmp_path, **variables) as made:
        yield made


def test_its_agent_runs_with_a_root_that_is_read_only(container: Pod) -> None:
    program = "import trackagent.agent as a, trackagent.client as c; print(a.__file__, c.__file__)"
    assert container.run("agent", "python", "-c", program).output().split() == [
        "/packages/trackagent/agent/__init__.py",
        "/packages/trackagent/client/__init__.py",
    ]
    written = container.run("agent", "sh", "-c", "touch /etc/a /packages/../a")
    assert written.output().count("Read-only file system") == 2

    agent = container.run("agent", *packaged(the_last("ENTRYPOINT")), *words(the_last("CMD")))
    healthy = packaged(the_last("HEALTHCHECK").partition(" CMD ")[2])
    wait_until(lambda: container.run("agent", *healthy).ended() == 0, "the agent is healthy")
    assert agent.end_with(signal.SIGTERM) == 0
    assert "stopped; everything received is stored" in agent.output()
    assert container.run("agent", *healthy).ended() == NOTHING


def words(instruction: str) -> list[str]:
    """The words of the exec form of an instruction."""
    found: list[str] = json.loads(instruction)
    return found


def packaged(instruction: str) -> list[str]:
    """As words, with the entry point of the wheel that was built here."""
    program, *rest = words(instruction)
    return [f"/packages/bin/{program}", *rest]
