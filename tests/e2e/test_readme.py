"""What the README says works when it is typed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import COMMAND, Folders

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# What the README's example leaves to its reader.
SURROUNDINGS = """
loader = range(20)

def train_step(batch):
    return 1.0 / (1 + batch)

"""


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language; "" for those without one."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


@pytest.fixture
def trained(folders: Folders) -> Folders:
    """The README's training script, run as the README says, with an agent for as long as it runs."""
    folders.directory.parent.mkdir(exist_ok=True)
    script = folders.directory.parent / "train.py"
    script.write_text(SURROUNDINGS + blocks("python")[0])
    subprocess.run(
        [COMMAND, "run", "--", sys.executable, script],
        env=folders.environment,
        check=True,
        timeout=60,
    )
    return folders


def test_the_script_logs_what_it_shows(trained: Folders) -> None:
    shown = subprocess.run(
        [COMMAND, "export", "latest", "--format", "jsonl"],
        env=trained.environment,
        capture_output=True,
        check=True,
    )
    points = [json.loads(line) for line in shown.stdout.splitlines()]
    found = [(point["key"], point["step"], point["value"]) for point in points]
    assert found == [("train/loss", step, 1.0 / (1 + step)) for step in range(20)]


def test_every_trackagent_command_it_names_exists() -> None:
    named = set(re.findall(r"trackagent ([a-z]+)", "\n".join(blocks("sh"))))
    named |= {"status", "stop", "runs", "tail", "export", "doctor", "config"}
    for name in sorted(named):
        subprocess.run([COMMAND, name, "--help"], stdout=subprocess.DEVNULL, check=True)


def test_every_make_target_it_names_exists() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"^make ([a-z]+)", "\n".join(blocks("sh")), re.MULTILINE))
    assert named <= set(targets)
    assert named


def test_every_file_in_its_tree_exists() -> None:
    named = []
    folder = ""
    for line in blocks("")[0].splitlines():
        # Names come first, set off from what is said of them by at least two spaces.
        names = re.findall(r"[\w/.]+", re.split(r"(?<=\S)\s{3,}", line)[0])
        if not line.startswith(" "):
            folder = names[0]
            named += names
        else:
            named += [folder + name for name in names]
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert "client/trackagent/client/journal.py" in named


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert links
