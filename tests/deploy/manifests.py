"""The manifests of deploy/kubernetes, read and rendered."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
FOLDERS = sorted(path.parent for path in KUBERNETES.rglob("kustomization.yaml"))
# What can be applied as it is; components and the training script are parts of others.
APPLIED = [
    folder for folder in FOLDERS if folder.parent.name != "components" and folder.name != "train"
]


class Container(NamedTuple):
    """A container of a manifest, and the pod that it is in."""

    where: str
    pod: dict[str, Any]
    body: dict[str, Any]

    @property
    def runs_trackagent(self) -> bool:
        return str(self.body["image"]).partition(":")[0] == "trackagent"


def kustomization(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((folder / "kustomization.yaml").read_text())
    return content


def objects(folder: Path) -> list[dict[str, Any]]:
    """What the files that a kustomization names directly hold."""
    files = [folder / name for name in kustomization(folder).get("resources", [])]
    return [one for path in files if path.is_file() for one in documents(path)]


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def every_object() -> list[dict[str, Any]]:
    return [one for folder in FOLDERS for one in objects(folder)]


def name(one: dict[str, Any]) -> str:
    return f"{one['kind']}/{one['metadata']['name']}"


def templates(one: object) -> Iterator[dict[str, Any]]:
    """Every pod template in an object, wherever it stands."""
    if isinstance(one, dict):
        if "containers" in one.get("spec", {}):
            yield one
        for value in one.values():
            yield from templates(value)
    elif isinstance(one, list):
        for value in one:
            yield from templates(value)


def containers(found: list[dict[str, Any]]) -> list[Container]:
    return [
        Container(f"{name(one)}/{body['name']}", template["spec"], body)
        for one in found
        for template in templates(one)
        for part in ("initContainers", "containers")
        for body in template["spec"].get(part, [])
    ]


def copied(folder: Path) -> Path:
    """A copy of deploy/kubernetes below `folder`, in which somebody has made a cluster token."""
    tree = folder / "kubernetes"
    shutil.copytree(KUBERNETES, tree)
    (tree / "hub" / "token").write_text("0123456789abcdef" * 4)
    return tree


def rendered(folder: Path, copy: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of a folder in `copy`, in which there is a cluster token; skips the
    test where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("there is no kubectl here")
    command = [kubectl, "kustomize", str(copy / folder.relative_to(KUBERNETES))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]
