"""deploy/systemd, as systemd itself reads it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.manifests import ROOT

SYSTEMD = ROOT / "deploy" / "systemd"
UNIT = "trackagent.service"
PROGRAM = "/opt/trackagent/bin/trackagent"
# systemd's own measure, from 0 to 10: what is left is what sampling a node needs.
MOST_EXPOSED = 22


@pytest.fixture(params=["", "hub.conf", "store.conf"])
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The unit, with each of its drop-ins, for a program that is there."""
    text = (SYSTEMD / UNIT).read_text().replace(PROGRAM, str(shutil.which("true")))
    if request.param:
        text += (SYSTEMD / request.param).read_text()
    path = tmp_path / UNIT
    path.write_text(text)
    return path


def analyzed(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("there is no systemd-analyze here")
    command = [program, "--no-pager", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_systemd_takes_the_unit_as_it_is(unit: Path) -> None:
    done = analyzed("verify", "--man=no", str(unit))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_setting_that_systemd_does_not_know_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / UNIT
    path.write_text((SYSTEMD / UNIT).read_text().replace("UMask=", "Umask="))
    assert "'Umask'" in analyzed("verify", "--man=no", str(path)).stderr


def test_the_unit_is_locked_down(unit: Path) -> None:
    done = analyzed("security", "--offline=yes", f"--threshold={MOST_EXPOSED}", str(unit))
    assert done.returncode == 0, done.stdout


def test_a_unit_that_is_not_locked_down_would_be_seen(tmp_path: Path) -> None:
    lines = (SYSTEMD / UNIT).read_text().splitlines(keepends=True)
    path = tmp_path / UNIT
    path.write_text("".join(line for line in lines if not line.startswith("Protect")))
    done = analyzed("security", "--offline=yes", f"--threshold={MOST_EXPOSED}", str(path))
    assert done.returncode != 0


def test_the_agents_user_is_made_as_sysusers_reads_it() -> None:
    program = shutil.which("systemd-sysusers")
    if program is None:
        pytest.skip("there is no systemd-sysusers here")
    command = [program, "--dry-run", str(SYSTEMD / "sysusers.conf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Creating user 'trackagent' (trackagent agent)" in done.stdout + done.stderr
    assert done.returncode == 0
