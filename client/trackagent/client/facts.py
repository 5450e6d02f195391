"""What a run records by itself: code version, command line, host, software, launcher; tags "trackagent.…".

quick() is cheap enough for init(): no subprocess, no import, only small files of the kernel. slow()
runs git and reads package metadata, and belongs on a background thread. Neither raises; what cannot
be known is left out.

Secrets are masked by name (`--api-key X`, `PASSWORD=X`), by place (user:password@ in a URL) and, for common
services, by shape. A secret that looks like any other argument is not recognised.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trackagent.client import imports

PREFIX = "trackagent."
MAX_CHARACTERS = 5000
MAX_FILE_BYTES = 4096
GIT_TIMEOUT_S = 10.0
MASK = "***"

_LAUNCHER_VARIABLES = {
    "world_size": ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
    "torchelastic.run_id": ("TORCHELASTIC_RUN_ID",),
    "torchelastic.restart_count": ("TORCHELASTIC_RESTART_COUNT",),
    "torchelastic.max_restarts": ("TORCHELASTIC_MAX_RESTARTS",),
    "torchelastic.group_rank": ("GROUP_RANK",),
    "slurm.cluster": ("SLURM_CLUSTER_NAME",),
    "slurm.job_id": ("SLURM_JOB_ID",),
    "slurm.job_name": ("SLURM_JOB_NAME",),
    "slurm.array_job_id": ("SLURM_ARRAY_JOB_ID",),
    "slurm.array_task_id": ("SLURM_ARRAY_TASK_ID",),
    "slurm.step_id": ("SLURM_STEP_ID",),
    "slurm.nodes": ("SLURM_JOB_NODELIST", "SLURM_NODELIST"),
    "slurm.restart_count": ("SLURM_RESTART_COUNT",),
    "openmpi.world_size": ("OMPI_COMM_WORLD_SIZE",),
    "openmpi.local_size": ("OMPI_COMM_WORLD_LOCAL_SIZE",),
}
_SERVICE_ACCOUNT = "var/run/secrets/kubernetes.io/serviceaccount/namespace"
# They point git to another repository than the script's, as inside a hook.
_GIT_PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_NAMESPACE")

_SECRET_WORDS = frozenset({"auth", "authorization", "bearer", "cookie", "creds", "key", "pass"})
_SECRET_ENDINGS = (
    "apikey",
    "credential",
    "passphrase",
    "passwd",
    "password",
    "pwd",
    "secret",
    "token",
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_ASSIGNED = re.compile(r"([-+~]*[A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
# name=value, "name": "value", Authorization: Bearer value, inside of an argument
_PAIR = re.compile(
    r"""([A-Za-z_][\w.-]{0,80})(["']?\s{0,4}(?:=|:(?!//))\s{0,4}["']?)((?:(?:bearer|basic|token)\s+)?[^\s"',;&}\])]+)""",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,20}://)[^/\s?#]*@")
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{16,}|xox[abprs]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
_DRIVER = re.compile(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)*)(?:\s|$)")


def quick(
    *,
    environ: Mapping[str, str] = os.environ,
    argv: Sequence[str] | None = None,
    script: str | None = None,
    root: Path = Path("/"),
    modules: Mapping[str, Any] = sys.modules,
) -> dict[str, str]:
    """The facts that are at hand. `argv` and `script`: as this process was started, unless given; `root`:
    where /proc and /var/run are looked for."""
    line = sys.orig_argv if argv is None else argv
    facts: dict[str, Callable[[], object]] = {
        "command": lambda: shlex.join(masked(line)),
        "entry": lambda: script or main_script(modules),
        # Not pwd: it may ask a directory server.
        "user": lambda: environ.get("USER") or environ.get("LOGNAME"),
        "host": socket.gethostname,
        "python": lambda: ".".join(str(part) for part in sys.version_info[:3]),
        "platform": lambda: "{0.sysname} {0.release} {0.machine}".format(os.uname()),
        "cpus": lambda: len(os.sched_getaffinity(0)),
        "driver": lambda: _driver(root),
        **{f"torch.{name}": read for name, read in _torch_facts(modules).items()},
        **_kubernetes_facts(environ, root),
    }
    for name, variables in _LAUNCHER_VARIABLES.items():
        facts[name] = partial(_first, environ, variables)
    return _told(facts)


def slow(
    *,
    environ: Mapping[str, str] = os.environ,
    script: str | None = None,
    modules: Mapping[str, Any] = sys.modules,
    git: str = "git",
    timeout_s: float = GIT_TIMEOUT_S,
) -> dict[str, str]:
    """The facts that take time: git, in the folder of the main script, and installed versions. Waits at most
    `timeout_s` for each of four git commands; a key whose command fails is left out."""

    def ask(*arguments: str) -> str | None:
        entry = script or main_script(modules)
        # A working folder that was deleted is none.
        folder = Path(entry).parent if entry else Path.cwd()
        return _git(git, folder, environ, timeout_s, *arguments)

    def dirty() -> str | None:
        changes = ask("status", "--porcelain", "--untracked-files=no")
        return None if changes is None else str(bool(changes)).lower()

    facts: dict[str, Callable[[], object]] = {
        "git.commit": lambda: ask("rev-parse", "--verify", "HEAD"),
        "git.branch": lambda: ask("symbolic-ref", "--short", "-q", "HEAD"),
        "git.dirty": dirty,
        "git.remote": lambda: without_credentials(
            ask("config", "--get", "remote.origin.url") or ""
        ),
        "user": lambda: (
            environ.get("USER") or environ.get("LOGNAME") or pwd.getpwuid(os.getuid()).pw_name
        ),
        **{f"torch.{name}": read for name, read in _installed_facts(modules).items()},
    }
    return _told(facts)


def main_script(modules: Mapping[str, Any] = sys.modules) -> str | None:
    """The absolute path of the file that runs as __main__; None in an interactive session."""
    path = getattr(modules.get("__main__"), "__file__", None)
    return os.path.abspath(path) if path and not path.startswith("<") else None


def masked(argv: Sequence[str]) -> list[str]:
    """`argv` with the values of secrets replaced by ***; of a long one the first MAX_CHARACTERS or so."""
    shown: list[str] = []
    follows_secret = False
    room = MAX_CHARACTERS
    for whole in argv:
        if room < 0:
            break
        argument = whole[: MAX_CHARACTERS + 1]
        room -= len(argument) + 1
        if follows_secret and not argument.startswith("-"):
            shown.append(MASK)
            follows_secret = False
            continue
        follows_secret = argument.startswith("-") and "=" not in argument and _secret(argument)
        assigned = _ASSIGNED.fullmatch(argument)
        if assigned and _secret(assigned[1], assigned[2]):
            shown.append(f"{assigned[1]}={MASK}")
        else:
            shown.append(_masked_text(argument))
    return shown


def without_credentials(url: str) -> str:
    """A URL without user, password and secret query values. `git@host:path` stays: its user is no secret."""
    return _masked_text(_USERINFO.sub(r"\1", url))


def _masked_text(text: str) -> str:
    text = _USERINFO.sub(rf"\1{MASK}@", text)
    text = _PAIR.sub(
        lambda pair: pair[1] + pair[2] + MASK if _secret(pair[1], pair[3]) else pair[0], text
    )
    return _SHAPES.sub(MASK, text)


def _secret(name: str, value: str = "") -> bool:
    """Whether a flag or variable of this name holds a secret. max_tokens=2048 does not."""
    words = re.split(r"[\W_]+", _CAMEL.sub("_", name).lower())
    for word in words:
        if word == "tokens" and (not value or value.isdecimal()):
            continue
        one = word.removesuffix("s") if word not in _SECRET_WORDS else word
        if one in _SECRET_WORDS or one.endswith(_SECRET_ENDINGS):
            return True
    return False


def _first(environ: Mapping[str, str], names: Sequence[str]) -> str | None:
    return next((environ[name] for name in names if environ.get(name)), None)


def _driver(root: Path) -> str | None:
    found = _DRIVER.search(_read(root / "proc/driver/nvidia/version"))
    return found[1] if found else None


def _torch_facts(modules: Mapping[str, Any]) -> dict[str, Callable[[], object]]:
    """What a torch that is already imported says of itself."""
    torch = modules.get("torch")
    if torch is None:
        return {}
    return {
        "version": lambda: torch.__version__,
        "cuda": lambda: torch.version.cuda,
        "rocm": lambda: torch.version.hip,
    }


def _installed_facts(modules: Mapping[str, Any]) -> dict[str, Callable[[], object]]:
    """Also of a torch that is installed only, and of the libraries that came with it."""

    def installed(*distributions: str) -> str | None:
        with imports.whole():
            from importlib.metadata import PackageNotFoundError, version

            for distribution in distributions:
                with contextlib.suppress(PackageNotFoundError):
                    return version(distribution)  # which imports as well
        return None

    def library(name: str) -> str | None:
        cuda = modules["torch"].version.cuda if "torch" in modules else None
        majors = [cuda.partition(".")[0]] if cuda else []
        return installed(*(f"nvidia-{name}-cu{major}" for major in majors))

    def nccl() -> str | None:
        if found := library("nccl"):
            return found
        # A constant of the library; touches no device. CPU builds have no such function.
        compiled: tuple[int, ...] = modules["torch"].cuda.nccl.version()
        return ".".join(str(part) for part in compiled)

    return {
        **({} if "torch" in modules else {"version": lambda: installed("torch")}),
        **_torch_facts(modules),
        "cudnn": lambda: library("cudnn"),
        "nccl": nccl,
    }


def _kubernetes_facts(environ: Mapping[str, str], root: Path) -> dict[str, Callable[[], object]]:
    namespace = _read(root / _SERVICE_ACCOUNT).strip()
    if not namespace and "KUBERNETES_SERVICE_HOST" not in environ:
        return {}
    return {
        # A pod's host name is its own unless the pod says otherwise.
        "kubernetes.pod": lambda: (
            environ.get("POD_NAME") or environ.get("HOSTNAME") or socket.gethostname()
        ),
        "kubernetes.namespace": lambda: environ.get("POD_NAMESPACE") or namespace,
        "kubernetes.node": lambda: environ.get("NODE_NAME"),
    }


def _git(
    git: str, folder: Path, environ: Mapping[str, str], timeout_s: float, *arguments: str
) -> str | None:
    """What the command prints, or None when it fails."""
    # No lock on the index under a user's own git command, no question on a terminal, no fsmonitor daemon.
    settings = {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    kept = {name: value for name, value in environ.items() if name not in _GIT_PLACES}
    ended = subprocess.run(
        [git, "-c", "core.fsmonitor=false", "-C", str(folder), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**kept, **settings},
        timeout=timeout_s,
        check=False,
    )
    return ended.stdout.decode(errors="replace").strip() if ended.returncode == 0 else None


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _told(facts: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    """The facts that can be had, as text that any store takes."""
    tags: dict[str, str] = {}
    for name, read in facts.items():
        try:
            value = read()
            # An argument that is not UTF-8 holds surrogates.
            text = "" if value is None else str(value).encode("utf-8", "replace").decode()
        except Exception:  # noqa: BLE001  a fact is never worth a training run
            continue
        if text:
            tags[PREFIX + name] = (
                text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
            )
    return tags
