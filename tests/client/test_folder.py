"""The folder of one producer: made once, and locked for as long as its owner lives."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from tests.fakes import Folders
from trackagent.client.folder import LOCK_NAME, ProducerFolder

ID = "ab" * 16


def is_locked(folder: Path) -> bool:
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("turn", range(20))
def test_calls_that_meet_make_one_folder_and_it_is_locked(folders: Folders, turn: int) -> None:
    folder = ProducerFolder(folders.directory, ID)
    barrier = threading.Barrier(8)
    opened: list[Path | OSError] = []

    def open_it() -> None:
        barrier.wait()
        try:
            opened.append(folder.open())
        except OSError as error:
            opened.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [folder.path] * 8
    assert (os.listdir(folder.path.parent), is_locked(folder.path)) == ([ID], True)
    folder.close(remove=False)
    assert is_locked(folder.path) is False


def test_a_folder_that_cannot_be_made_is_an_error_each_time(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "journals").write_text("in the way")
    folder = ProducerFolder(tmp_path / "base", ID)
    for _ in range(2):
        with pytest.raises(OSError, match="journals"):
            folder.open()
