"""The shape of the project: the namespace, which way dependencies point, what the Makefile offers."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CLIENT = ROOT / "client" / "trackagent" / "client"
NAMESPACE_ROOTS = [ROOT / part / "trackagent" for part in ("client", "agent", "protos")]
# Each would make `import trackagent.client` slow, or is not there in every training environment.
HEAVY = ("google.protobuf", "grpc", "numpy", "psutil", "torch")


def imported_names(path: Path) -> Iterator[str]:
    """The dotted name of everything that a file imports, anywhere in it; relative imports made absolute."""
    package = ["trackagent", "client", *path.relative_to(CLIENT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


@pytest.mark.parametrize("root", NAMESPACE_ROOTS, ids=lambda root: root.parent.name)
def test_a_namespace_root_is_a_folder_without_init(root: Path) -> None:
    assert root.is_dir()
    assert not (root / "__init__.py").exists()


@pytest.mark.parametrize("root", NAMESPACE_ROOTS, ids=lambda root: root.parent.name)
def test_the_packages_say_that_they_are_typed(root: Path) -> None:
    assert (root / root.parent.name / "py.typed").is_file()


def test_importing_the_client_imports_nothing_heavy() -> None:
    program = f"import sys, trackagent.client; print([m for m in {HEAVY} if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-I", "-c", program], stdout=subprocess.PIPE, text=True, check=True
    )
    assert shown.stdout == "[]\n"


def test_the_client_never_imports_the_agent() -> None:
    sources = sorted(CLIENT.rglob("*.py"))
    names = {name: source.name for source in sources for name in imported_names(source)}
    assert "trackagent.client.record" in names
    assert [
        (name, where) for name, where in names.items() if name.startswith("trackagent.agent")
    ] == []


@pytest.mark.parametrize(
    "statement",
    [
        "import trackagent.agent.store",
        "from trackagent import agent",
        "from trackagent.agent import store",
        "from ..agent import store",
        "def later():\n    from trackagent.agent import store",
    ],
)
def test_an_import_of_the_agent_would_be_seen(
    statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "CLIENT", tmp_path)
    source = tmp_path / "example.py"
    source.write_text(statement, encoding="utf-8")
    assert [n for n in imported_names(source) if n.startswith("trackagent.agent")] != []


@pytest.mark.parametrize("root", NAMESPACE_ROOTS[:2], ids=lambda root: root.parent.name)
def test_the_readme_says_what_each_file_is_for(root: Path) -> None:
    shown = re.findall(r"\w+\.py\b", (ROOT / "README.md").read_text(encoding="utf-8"))
    names = {path.name for path in (root / root.parent.name).glob("*.py")} - {"__init__.py"}
    assert sorted(names - set(shown)) == []


def test_make_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    targets = re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.MULTILINE)
    shown = subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory"],
        capture_output=True,
        text=True,
        check=True,
    )
    listed = re.findall(r"^  ([\w-]+) +\S", shown.stdout, re.MULTILINE)
    assert phony is not None
    assert sorted(listed) == sorted(targets) == sorted(phony.group(1).split())
