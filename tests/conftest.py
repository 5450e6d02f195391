"""Fixtures that every test may use."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import fuzz
from tests.fakes import LAUNCHER_VARIABLES, AgentProcess, Folders, short_folder

fuzz.load_profile()


@pytest.fixture(scope="session", autouse=True)
def no_settings_from_outside() -> Iterator[None]:
    """No test depends on, or writes to, what the user who runs it has set, or keeps at home."""
    home = short_folder()
    # Other users, as whom some tests run processes, look there too.
    home.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("TRACKAGENT_", "XDG_")) or name in LAUNCHER_VARIABLES:
                patch.delenv(name)
        patch.setenv("HOME", str(home))
        yield
    shutil.rmtree(home)


@pytest.fixture
def folders() -> Iterator[Folders]:
    """Fresh folders for one test: (directory, state)."""
    base = short_folder()
    yield Folders.under(base)
    shutil.rmtree(base)


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    """A running agent on folders of its own, shared by the tests of one file: let them look only at the runs
    that they made."""
    base = short_folder()
    process = AgentProcess(Folders.under(base), "--deliver-interval-s", "0.02")
    try:
        yield process.start()
    finally:
        process.close()
        shutil.rmtree(base)


@pytest.fixture
def own_agent(folders: Folders) -> Iterator[Callable[..., AgentProcess]]:
    """own_agent(*flags): an agent on this test's own `folders`, not yet started, ended after the test."""
    made: list[AgentProcess] = []

    def make(*flags: str) -> AgentProcess:
        made.append(AgentProcess(folders, *flags))
        return made[-1]

    yield make
    for process in made:
        process.close()


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom the system does not know."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
