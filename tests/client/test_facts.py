"""What a run records by itself, and what it must not."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes import DEADLINE_S
from trackagent.client import facts
from trackagent.client.facts import masked, quick, slow, without_credentials

DRIVERS = {
    "closed": (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n",
        "535.129.03",
    ),
    "open": (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build  (u@h)\n",
        "550.54.14",
    ),
}
SERVICE_ACCOUNT = "var/run/secrets/kubernetes.io/serviceaccount"


def tag(name: str, root: Path = Path("/nowhere"), **arguments: Any) -> str | None:
    defaults: dict[str, Any] = {"environ": {}, "root": root, "modules": {}}
    return quick(**(defaults | arguments)).get(f"trackagent.{name}")


# The process and its host


def test_the_command_line_can_be_pasted() -> None:
    assert tag("command", argv=["python", "a b.py", "--lr", "0.1"]) == "python 'a b.py' --lr 0.1"


def test_the_command_line_is_this_processs_own() -> None:
    assert (tag("command") or "").startswith(masked(sys.orig_argv)[0])


def test_a_command_line_that_is_not_utf8_becomes_utf8() -> None:
    assert (tag("command", argv=["a\udcff"]) or "").encode() == b"'a?'"


def test_the_entry_is_the_main_script() -> None:
    modules = {"__main__": SimpleNamespace(__file__="/jobs/train.py")}
    assert tag("entry", modules=modules) == "/jobs/train.py"


@pytest.mark.parametrize("main", [SimpleNamespace(), SimpleNamespace(__file__="<stdin>")])
def test_an_interactive_session_has_no_entry(main: Any) -> None:
    assert tag("entry", modules={"__main__": main}) is None


def test_the_user_is_the_environments() -> None:
    assert tag("user", environ={"USER": "ada"}) == "ada"


def test_the_host_is_named() -> None:
    assert tag("host") == socket.gethostname()


def test_the_python_version_is_told() -> None:
    assert tag("python") == sys.version.split()[0].rstrip("+")


def test_the_kernel_is_told() -> None:
    assert (tag("platform") or "").startswith(os.uname().sysname)


def test_the_cpus_are_those_that_this_process_may_use() -> None:
    assert tag("cpus") == str(len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(("text", "version"), DRIVERS.values(), ids=DRIVERS.keys())
def test_the_drivers_version_is_the_kernel_modules(tmp_path: Path, text: str, version: str) -> None:
    file = tmp_path / "proc/driver/nvidia/version"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert tag("driver", tmp_path) == version


def test_without_a_driver_none_is_told() -> None:
    assert tag("driver") is None


def test_a_loaded_torch_tells_its_versions() -> None:
    version = SimpleNamespace(cuda="12.4", hip=None)
    modules = {"torch": SimpleNamespace(__version__="2.6.0", version=version)}
    told = quick(environ={}, modules=modules, root=Path("/nowhere"))
    assert {name: text for name, text in told.items() if "torch" in name} == {
        "trackagent.torch.version": "2.6.0",
        "trackagent.torch.cuda": "12.4",
    }


# Launchers


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("world_size", "WORLD_SIZE"),
        ("torchelastic.run_id", "TORCHELASTIC_RUN_ID"),
        ("torchelastic.restart_count", "TORCHELASTIC_RESTART_COUNT"),
        ("torchelastic.max_restarts", "TORCHELASTIC_MAX_RESTARTS"),
        ("torchelastic.group_rank", "GROUP_RANK"),
        ("slurm.job_id", "SLURM_JOB_ID"),
        ("slurm.job_name", "SLURM_JOB_NAME"),
        ("slurm.step_id", "SLURM_STEP_ID"),
        ("slurm.nodes", "SLURM_JOB_NODELIST"),
        ("slurm.nodes", "SLURM_NODELIST"),
        ("slurm.restart_count", "SLURM_RESTART_COUNT"),
        ("openmpi.world_size", "OMPI_COMM_WORLD_SIZE"),
    ],
)
def test_a_launchers_variable_is_told(name: str, variable: str) -> None:
    assert tag(name, environ={variable: "7"}) == "7"


def test_a_launcher_that_is_not_there_is_not_told() -> None:
    told = quick(environ={}, root=Path("/nowhere"))
    parts = ("world_size", "torchelastic", "slurm", "openmpi", "kubernetes")
    assert [name for name in told if any(part in name for part in parts)] == []


@pytest.fixture
def pod(tmp_path: Path) -> Path:
    (tmp_path / SERVICE_ACCOUNT).mkdir(parents=True)
    (tmp_path / SERVICE_ACCOUNT / "namespace").write_text("ml-team\n")
    return tmp_path


def test_a_pods_namespace_is_its_service_accounts(pod: Path) -> None:
    assert tag("kubernetes.namespace", pod) == "ml-team"


def test_a_pods_namespace_in_the_environment_comes_first(pod: Path) -> None:
    assert tag("kubernetes.namespace", pod, environ={"POD_NAMESPACE": "other"}) == "other"


def test_a_pods_name_is_its_host_name(pod: Path) -> None:
    assert tag("kubernetes.pod", pod, environ={"HOSTNAME": "gpt-0"}) == "gpt-0"


def test_a_pods_name_in_the_environment_comes_first(pod: Path) -> None:
    environ = {"HOSTNAME": "gpt-0", "POD_NAME": "gpt-worker-0"}
    assert tag("kubernetes.pod", pod, environ=environ) == "gpt-worker-0"


def test_a_pods_node_is_told(pod: Path) -> None:
    assert tag("kubernetes.node", pod, environ={"NODE_NAME": "n1"}) == "n1"


def test_a_pod_without_a_service_account_is_still_a_pod() -> None:
    environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "POD_NAME": "p"}
    assert tag("kubernetes.pod", environ=environ) == "p"


# Secrets


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--api-key", "X"], ["--api-key", "***"]),
        (["--token=X"], ["--token=***"]),
        (["--token=two words"], ["--token=***"]),
        (["PASSWORD=X"], ["PASSWORD=***"]),
        (["--db-password", "X", "7"], ["--db-password", "***", "7"]),
        (["--hfToken", "X"], ["--hfToken", "***"]),
        (["--wandb_key=X"], ["--wandb_key=***"]),
        (["+hub.auth_token=X"], ["+hub.auth_token=***"]),
        (["AWS_SECRET_ACCESS_KEY=X"], ["AWS_SECRET_ACCESS_KEY=***"]),
        (["--api-keys", "X"], ["--api-keys", "***"]),
        (["--tokens=X"], ["--tokens=***"]),
        (["Authorization: Bearer X"], ["Authorization: ***"]),
        (['{"api_key": "X", "lr": 1}'], ['{"api_key": "***", "lr": 1}']),
        (["env A=1 TOKEN=X python"], ["env A=1 TOKEN=*** python"]),
        (["postgres://me:X@db/runs"], ["postgres://***@db/runs"]),
        (["https://h/p?token=X&a=1"], ["https://h/p?token=***&a=1"]),
        (["hf_" + "X" * 34], ["***"]),
        (["see ghp_" + "X" * 36], ["see ***"]),
    ],
    ids=lambda value: " ".join(value)[:24],
)
def test_a_secret_is_masked(argv: list[str], expected: list[str]) -> None:
    assert masked(argv) == expected


@pytest.mark.parametrize(
    "argv",
    [
        ["--lr", "0.1", "--epochs=3"],
        ["--tokenizer", "gpt2"],
        ["--max-tokens", "2048"],
        ["--max_tokens=2048"],
        ["--use-auth-token", "--lr", "3"],
        ["--keyframes=3", "--compass", "n", "--passes", "2", "--author=ada"],
        ["s3://bucket/path", "data:image", "C:/x"],
        ["git@github.com:org/repo.git"],
    ],
    ids=lambda value: " ".join(value)[:24],
)
def test_what_is_no_secret_stays(argv: list[str]) -> None:
    assert masked(argv) == argv


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://me:X@host/org/repo.git", "https://host/org/repo.git"),
        ("https://X@host/org/repo.git", "https://host/org/repo.git"),
        ("https://me:p@ss@host/repo", "https://host/repo"),
        ("ssh://git@host/repo", "ssh://host/repo"),
        ("https://host/repo?private_token=X", "https://host/repo?private_token=***"),
        ("git@host:org/repo.git", "git@host:org/repo.git"),
        ("/srv/git/repo.git", "/srv/git/repo.git"),
    ],
)
def test_a_remote_has_no_credentials(url: str, expected: str) -> None:
    assert without_credentials(url) == expected


@pytest.mark.parametrize("unit", ["a", "a-", "a ", "a:", "eyJ-", "://", "=", "token="])
def test_a_huge_argument_is_masked_in_bounded_time(unit: str) -> None:
    begin = time.process_time()
    masked([unit * 100_000] * 10_000)
    assert time.process_time() - begin < 1


# git


def git(folder: Path, *arguments: str) -> str:
    names = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_CONFIG_GLOBAL": os.devnull}
    committer = {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    ended = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **names, **committer},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return ended.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "topic")
    git(folder, "remote", "add", "origin", "https://me:X@host/org/repo.git")
    (folder / "train.py").write_text("1\n")
    git(folder, "add", "train.py")
    git(folder, "commit", "-q", "-m", "one")
    return folder


def git_tags(folder: Path, **arguments: Any) -> dict[str, str]:
    environ = {"PATH": os.environ["PATH"]}
    script = str(folder / "train.py")
    defaults: dict[str, Any] = {"environ": environ, "script": script, "modules": {}}
    told = slow(**(defaults | arguments))
    head = "trackagent.git."
    return {name[len(head) :]: text for name, text in told.items() if name.startswith(head)}


def test_the_commit_is_the_scripts_folders(repository: Path) -> None:
    assert git_tags(repository)["commit"] == git(repository, "rev-parse", "HEAD")


def test_the_branch_is_told(repository: Path) -> None:
    assert git_tags(repository)["branch"] == "topic"


def test_a_detached_head_has_no_branch(repository: Path) -> None:
    git(repository, "checkout", "-q", "--detach")
    assert sorted(git_tags(repository)) == ["commit", "dirty", "remote"]


def test_a_clean_tree_is_not_dirty(repository: Path) -> None:
    assert git_tags(repository)["dirty"] == "false"


def test_a_changed_file_makes_the_tree_dirty(repository: Path) -> None:
    (repository / "train.py").write_text("2\n")
    assert git_tags(repository)["dirty"] == "true"


def test_the_remote_has_no_password(repository: Path) -> None:
    assert git_tags(repository)["remote"] == "https://host/org/repo.git"


def test_a_repository_that_the_environment_names_is_not_the_scripts(
    repository: Path, tmp_path: Path
) -> None:
    environ = {"PATH": os.environ["PATH"], "GIT_DIR": str(tmp_path / "other")}
    assert git_tags(repository, environ=environ) == git_tags(repository)


def test_a_folder_without_a_repository_has_no_git_facts(tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    assert git_tags(tmp_path, environ=environ) == {}


def test_without_git_there_are_no_git_facts(repository: Path) -> None:
    assert git_tags(repository, git="/nowhere/git") == {}


def test_a_git_that_hangs_is_given_up(repository: Path, tmp_path: Path) -> None:
    hung = tmp_path / "git"
    hung.write_text("#!/bin/sh\nexec sleep 600\n")
    hung.chmod(0o755)
    begin = time.monotonic()
    assert git_tags(repository, git=str(hung), timeout_s=0.05) == {}
    assert time.monotonic() - begin < DEADLINE_S


# Both


def test_the_user_is_looked_up_where_the_environment_has_none() -> None:
    told = slow(environ={}, git="/nowhere/git")
    assert told["trackagent.user"] == pwd.getpwuid(os.getuid()).pw_name


def test_a_value_is_cut_to_what_stores_take() -> None:
    assert len(tag("command", argv=["x" * 9000]) or "") == facts.MAX_CHARACTERS


def test_every_tag_has_our_prefix() -> None:
    told = quick() | slow()
    assert [name for name in told if not name.startswith("trackagent.")] == []


def test_a_fact_that_fails_is_left_out() -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise OSError(name)

    told = quick(environ={}, modules={"torch": Broken()}, root=Path("/nowhere"))
    assert ("trackagent.torch.version" in told, "trackagent.host" in told) == (False, True)


@pytest.mark.parametrize(
    "trouble",
    ["os.rmdir(os.getcwd())", "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))"],
    ids=["deleted folder", "no descriptor"],
)
def test_a_process_in_trouble_tells_the_facts_that_it_has(tmp_path: Path, trouble: str) -> None:
    program = (
        f"import os, resource; from trackagent.client import facts; {trouble};"
        "told = facts.quick() | facts.slow();"
        "print(told['trackagent.user'], [name for name in told if 'git' in name])"
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    shown = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "USER": "ada"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert (shown.stdout, shown.stderr) == ("ada []\n", "")


def test_quick_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    assert "trackagent.host" in quick()


def test_the_module_imports_nothing_heavy() -> None:
    program = (
        "import sys, trackagent.client.facts;"
        "print([m for m in ('torch', 'numpy', 'grpc', 'psutil', 'importlib.metadata') if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert shown.stdout == "[]\n"
