"""Pods of the manifests, run on this machine as the kubelet and a container runtime would: a mount and a PID
namespace for each container, a root file system that is read-only, volumes with the modes that the kubelet
gives them, and nothing else in common. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes import COMMAND, DEADLINE_S, wait_until
from tests.strangers import command_as
from trackagent.client.config import SOCKET_NAME

MANIFESTS = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
# What every image has; the rest of a container's root is empty.
_OF_THE_IMAGE = (
    *("bin", "dev", "home", "lib", "lib32", "lib64", "opt", "root", "sbin", "sys", "usr"),
    Path(sys.prefix).resolve().parts[1],
)
_NODE = "node-a"
TOKEN = "0123456789abcdef" * 4
# Arguments: the container's root, how many mounts, pairs of source and target, and the command.
_CONTAINER = """
root=$1 count=$2; shift 2
mount -t tmpfs -o mode=755 tmpfs "$root"
for name in IMAGE; do
  [ -d "/$name" ] || continue
  mkdir -p "$root/$name"
  mount --rbind "/$name" "$root/$name"
  mount -o remount,bind,ro "$root/$name"
done
mkdir "$root/etc" "$root/proc" "$root/tmp"
for name in group hosts ld.so.cache localtime nsswitch.conf passwd resolv.conf; do
  [ ! -e "/etc/$name" ] || cp "/etc/$name" "$root/etc/$name"
done
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777,size=64m tmpfs "$root/dev/shm"
while [ "$count" -gt 0 ]; do
  mkdir -p "$root$2"
  mount --bind "$1" "$root$2"
  count=$((count - 1)); shift 2
done
mount -o remount,ro "$root"
exec chroot "$root" "$@"
""".replace("IMAGE", " ".join(dict.fromkeys(_OF_THE_IMAGE)))


class Container:
    """A process of its own mount and PID namespace, the first there."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._unshare = process
        self._pid = 0

    def end_with(self, number: signal.Signals) -> int:
        """Sends the container's first process this signal; how the container ended."""
        os.kill(self._first(), number)
        return self.ended()

    def ended(self) -> int:
        """Its exit status, once it has ended; -n for a signal."""
        return self._unshare.wait(DEADLINE_S)

    def is_running(self) -> bool:
        return self._unshare.poll() is None

    def next_line(self) -> str:
        """The next line that it prints; AssertionError when it ends before."""
        assert self._unshare.stdout is not None
        line = self._unshare.stdout.readline()
        assert line.endswith("\n"), f"the container ended: {self._unshare.wait(DEADLINE_S)}"
        return line.rstrip("\n")

    def output(self) -> str:
        """All that it prints from here to its end."""
        assert self._unshare.stdout is not None
        return self._unshare.stdout.read()

    def close(self) -> None:
        """Ends it, and all in its namespace, if it still runs."""
        self._unshare.kill()
        self._unshare.wait(DEADLINE_S)
        if self._unshare.stdout is not None:
            self._unshare.stdout.close()

    def _first(self) -> int:
        """The first process of the namespace, as it is called out here; it must be past its own start."""
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        return int(wait_until(children.read_text, "the container has a process").split()[0])


class Pod:
    """A pod of a template, with its volumes below `base`; what an earlier pod left on disks is there."""

    def __init__(
        self, template: Mapping[str, Any], base: Path, variables: Mapping[str, str]
    ) -> None:
        """variables: set in every container, over what the manifest says."""
        self.spec = template["spec"]
        self.base = base
        self.variables = variables
        self._security = self.spec["securityContext"]
        self._containers: list[Container] = []
        self._sandbox = self._start_sandbox()

    def volume(self, name: str) -> Path:
        """The volume, as the node sees it."""
        return Path(f"/proc/{self._sandbox.pid}/root{self.base / name}")

    def run(self, name: str, *command: str, **variables: str) -> Container:
        """Starts a container of the manifest, or `command` in its place."""
        container = self.container(name)
        environ = {one["name"]: self._value(one) for one in container.get("env", [])}
        mounts = [part for mount in container["volumeMounts"] for part in self._mounted(mount)]
        # Each container's own mount namespace has another root there.
        root = self.base / "root"
        root.mkdir(exist_ok=True)
        security = self._security | container.get("securityContext", {})
        words = command or _command(container)
        process = subprocess.Popen(
            [
                *("nsenter", f"--mount=/proc/{self._sandbox.pid}/ns/mnt"),
                *("unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"),
                *("sh", "-euc", _CONTAINER, "container", str(root)),
                *(str(len(mounts) // 2), *mounts),
                *self._user(security),
                *("--no-new-privs", "--", *words),
            ],
            env=_ENVIRONMENT | environ | dict(self.variables) | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._containers.append(Container(process))
        return self._containers[-1]

    def start(self, name: str = "trackagent", *, folder: str = "agent") -> Container:
        """What the kubelet does before the trainer: runs the init containers, the agent `name` as the last,
        until it answers. folder: the one that it has in the volume in memory."""
        self.make_folders()
        agent = self.run(name)
        socket = self.volume("trackagent-memory") / folder / SOCKET_NAME

        def answers() -> bool:
            assert agent.is_running(), agent.output()
            return socket.exists()

        wait_until(answers, "the agent answers")
        return agent

    def probe(self, name: str) -> bool:
        """Whether the startupProbe of a container succeeds."""
        command = self.container(name)["startupProbe"]["exec"]["command"]
        return self.run(name, *command).ended() == 0

    def make_folders(self) -> None:
        """Runs the first init container."""
        folders = self.run("trackagent-folders")
        assert (folders.output(), folders.ended()) == ("", 0)

    def container(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(
            one
            for one in (*self.spec["initContainers"], *self.spec["containers"])
            if one["name"] == name
        )
        return found

    def close(self) -> None:
        for container in self._containers:
            container.close()
        assert self._sandbox.stdin is not None
        self._sandbox.stdin.close()
        self._sandbox.wait(DEADLINE_S)

    def _user(self, security: Mapping[str, Any]) -> Sequence[str]:
        """setpriv, for the user of the manifest."""
        user = security["runAsUser"]
        if user != 0:
            return command_as(user, *[security[one] for one in ("fsGroup",) if one in security])
        kept = "".join(f",+{name.lower()}" for name in security["capabilities"].get("add", []))
        return ("setpriv", f"--bounding-set=-all{kept}", f"--inh-caps=-all{kept}")

    def _value(self, variable: Mapping[str, Any]) -> str:
        fields = {"spec.nodeName": _NODE}
        if "value" in variable:
            return str(variable["value"])
        path = variable["valueFrom"]["fieldRef"]["fieldPath"]
        return fields.get(path, "00000000-0000-4000-8000-000000000001")

    def _mounted(self, mount: Mapping[str, Any]) -> list[str]:
        """Source, as the sandbox sees it, and target; with what the kubelet does for a subPath."""
        source = self.base / mount["name"]
        if "subPath" in mount:
            inside = self.volume(mount["name"])
            source, inside = source / mount["subPath"], inside / mount["subPath"]
            if not inside.exists():
                inside.mkdir()
                inside.chmod(inside.parent.stat().st_mode & 0o7777)
        return [str(source), mount["mountPath"]]

    def _start_sandbox(self) -> subprocess.Popen[str]:
        """Holds the pod's mounts; made as the kubelet makes them. Disks are folders, and outlive the pod."""
        steps = []
        for volume in self.spec["volumes"]:
            path = self.base / volume["name"]
            kept = path.exists()
            path.mkdir(exist_ok=True)
            if "secret" in volume or volume.get("emptyDir", {}).get("medium") == "Memory":
                # Without a mode of its own, which is the file system's: 1777.
                steps.append(f"mount -t tmpfs -o size=64m tmpfs {path}")
            elif kept or "hostPath" in volume:
                continue  # the kubelet leaves it as it is, and makes it with mode 0755
            else:
                steps.append(f"chmod 0777 {path}")
            if "secret" in volume:
                secret = self.base / "secrets" / volume["secret"]["secretName"]
                steps.append(f"mkdir {path}/..1; ln -s ..1 {path}/..data")
                steps.append(f"cp {secret}/* {path}/..1; cd {path}")
                steps.append(f"chmod {volume['secret']['defaultMode']:o} ..1/*")
                steps += [f"ln -s ..data/{file.name} {file.name}" for file in secret.iterdir()]
            if group := self._security.get("fsGroup"):
                # Of everything in the volume, where it is new.
                steps.append(f"chgrp -R {group} {path}; chmod -R g+r {path}")
                steps.append(f"find {path} -type d -exec chmod g+rwxs {{}} +")
        process = subprocess.Popen(
            [
                *("unshare", "--mount", "--propagation=private"),
                *("sh", "-euc", "; ".join([*steps, "echo ready", "exec cat"])),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdout.close()
        return process


_ENVIRONMENT = {
    "PATH": f"{COMMAND.parent}:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONDONTWRITEBYTECODE": "1",
    "SQLITE_TMPDIR": "/var/lib/trackagent",
}


def _command(container: Mapping[str, Any]) -> Sequence[str]:
    ours = container["image"].partition(":")[0] == "trackagent"
    entrypoint = ["trackagent"] if ours else []
    return [*container.get("command", entrypoint), *container.get("args", [])]


def template(path: str) -> dict[str, Any]:
    """The pod template of the first object in a manifest."""
    return template_of(next(yaml.safe_load_all((MANIFESTS / path).read_text())))


def template_of(one: Mapping[str, Any]) -> dict[str, Any]:
    """The pod template of an object, with the volumes that are made for each pod."""
    spec = one["spec"]
    claims = [{"name": one["metadata"]["name"]} for one in spec.get("volumeClaimTemplates", [])]
    pod = spec["template"]["spec"]
    return {"spec": pod | {"volumes": [*pod["volumes"], *claims]}}


def need_namespaces() -> None:
    """Skips the test where no mount and PID namespaces can be made."""
    for tool in ("chroot", "nsenter", "unshare"):
        if not shutil.which(tool):
            pytest.skip(f"there is no {tool} here")
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"may not make namespaces: {done.stderr.strip()}")


@contextlib.contextmanager
def pod(template: Mapping[str, Any], base: Path, **variables: str) -> Iterator[Pod]:
    """A pod of this template, ended after the block. base: what is on its disks stays there for the next; the
    cluster's secrets are the folders in its folder `secrets`."""
    token = base / "secrets" / "trackagent-token"
    token.mkdir(parents=True, exist_ok=True)
    (token / "token").write_text(f"{TOKEN}\n")
    made = Pod(template, base, variables)
    try:
        yield made
    finally:
        made.close()
