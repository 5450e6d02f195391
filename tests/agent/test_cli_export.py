"""`trackagent export`: where it writes to, and which attempts it finds."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.agent.store.batches import RUN, batch, points, producer
from trackagent.agent.cli import main
from trackagent.agent.store import open_writer

TIMEOUT_S = 20
FULL = os.makedev(1, 7)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with a run that has the attempts 1 and 3."""
    folder = tmp_path_factory.mktemp("state")
    with contextlib.closing(open_writer(folder / "store.db")) as writer:
        for attempt in (1, 3):
            who = producer(0, attempt=attempt, producer_id=bytes([attempt]) * 16)
            writer.write(batch(attempt, who, points=[points(who, range(3))]))
    return folder


def export(state: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["export", RUN, "--state", str(state), *arguments])


def program(state: Path, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "trackagent.agent.cli", "export", RUN]
    return [*command, "--state", str(state), *arguments]


@pytest.fixture
def expected(state: Path) -> str:
    return export(state).stdout


# --- files and links


def test_a_file_is_replaced(state: Path, tmp_path: Path, expected: str) -> None:
    out = tmp_path / "points"
    out.write_text("old")
    before = out.stat().st_ino
    assert export(state, "--output", str(out)).exit_code == 0
    assert (out.read_text(), list(tmp_path.iterdir())) == (expected, [out])
    assert out.stat().st_ino != before


def test_a_file_that_is_replaced_stays_as_private(state: Path, tmp_path: Path) -> None:
    out = tmp_path / "points"
    out.touch()
    out.chmod(0o600)
    export(state, "--output", str(out))
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


@pytest.mark.parametrize("old", ["old", None], ids=["of a file", "of what is missing"])
def test_the_target_of_a_link_is_replaced(
    state: Path, tmp_path: Path, expected: str, old: str | None
) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there" / "points"
    link.symlink_to(Path("there") / "points")
    if old is not None:
        target.write_text(old)
    assert export(state, "--output", str(link)).exit_code == 0
    assert (link.is_symlink(), target.read_text()) == (True, expected)
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_is_refused(state: Path, tmp_path: Path, link: bool) -> None:
    folder = out = tmp_path / "folder"
    folder.mkdir()
    if link:
        out = tmp_path / "link"
        out.symlink_to(folder)
    result = export(state, "--output", str(out))
    assert (result.exit_code, list(folder.iterdir())) == (2, [])
    assert f"'{out}' is a directory" in result.stderr


def test_a_link_to_itself_is_one_line(state: Path, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    result = export(state, "--output", str(loop))
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert result.stderr.startswith(f"trackagent: cannot write {loop}: ")
    assert loop.is_symlink()


# --- FIFOs and devices


def test_a_fifo_is_written_into(state: Path, tmp_path: Path, expected: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE, text=True) as reader:
        done = subprocess.run(
            program(state, "--output", str(fifo)),
            timeout=TIMEOUT_S,
            capture_output=True,
            check=False,
        )
        read, _ = reader.communicate(timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr, read) == (0, b"", expected)
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert list(tmp_path.iterdir()) == [fifo]


def test_a_fifo_does_not_keep_an_export_waiting_that_finds_nothing(
    state: Path, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = program(state, "--output", str(fifo), "--attempt", "2")
    done = subprocess.run(command, timeout=TIMEOUT_S, capture_output=True, check=False)
    assert done.returncode == 3


@pytest.mark.parametrize("link", [False, True])
def test_a_full_device_is_one_line_and_stays(state: Path, tmp_path: Path, link: bool) -> None:
    device = out = tmp_path / "full"
    try:
        os.mknod(device, stat.S_IFCHR | 0o600, FULL)
        os.close(os.open(device, os.O_WRONLY))
    except PermissionError:
        pytest.skip("may not make devices here")
    if link:
        out = tmp_path / "link"
        out.symlink_to(device)
    result = export(state, "--output", str(out))
    assert (result.exit_code, result.stderr) == (
        1,
        f"trackagent: cannot write {out}: No space left on device\n",
    )
    assert stat.S_ISCHR(device.stat().st_mode)
    assert out.is_symlink() == link


def test_a_name_of_standard_output_appends_as_that_does(
    state: Path, tmp_path: Path, expected: str
) -> None:
    out, name = tmp_path / "points", tmp_path / "stdout"
    out.write_text("first\n")
    name.symlink_to("/proc/self/fd/1")
    with out.open("a") as file:
        done = subprocess.run(
            program(state, "--output", str(name)), stdout=file, timeout=TIMEOUT_S, check=False
        )
    assert (done.returncode, out.read_text()) == (0, "first\n" + expected)
    assert name.is_symlink()


@pytest.mark.parametrize(
    ("arguments", "rc"), [((), 1), (("--output", "points"), 0)], ids=["printed", "into a file"]
)
def test_a_closed_standard_output_matters_where_it_is_needed(
    state: Path, tmp_path: Path, arguments: tuple[str, ...], rc: int
) -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *program(state, *arguments)]
    done = subprocess.run(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False
    )
    said = "trackagent: export: standard output is closed\n" if rc else ""
    assert (done.returncode, done.stderr) == (rc, said)


# --- attempts


@pytest.mark.parametrize("more", [(), ("--gaps",), ("--format", "csv")])
@pytest.mark.parametrize("attempt", ["2", "99"])
def test_an_attempt_that_is_not_there_is_exit_code_3_with_those_that_are(
    state: Path, tmp_path: Path, attempt: str, more: tuple[str, ...]
) -> None:
    result = export(state, "--attempt", attempt, *more, "--output", str(tmp_path / "points"))
    assert (result.exit_code, result.stdout, result.stderr) == (
        3,
        "",
        f"trackagent: this run has no attempt {attempt}, only 1, 3\n",
    )
    assert list(tmp_path.iterdir()) == []


def test_an_attempt_that_is_there_is_exported(state: Path) -> None:
    assert export(state, "--attempt", "3").stdout.count('"attempt": 3') == 3
