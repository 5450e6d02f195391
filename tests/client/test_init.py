"""What init() refuses, and what it leaves when it fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes import Folders, wait_until
from trackagent import client
from trackagent.client import ConfigError, JournalError, Run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experiment": ""}, "an empty experiment name: give it a name"),
        ({"experiment": None}, "the experiment name None is no text: use a str"),
        (
            {"experiment": "x", "run_name": "a\nb"},
            "the run name 'a\\nb' holds control characters: leave them out",
        ),
        (
            {"experiment": "x", "run_id": "abc"},
            "run_id is 'abc': give 32 hex digits (a UUID, dashes are allowed)",
        ),
    ],
)
def test_a_wrong_argument_is_a_config_error(
    start: Callable[..., Run], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        client.init(**arguments)
    assert str(caught.value) == message
    assert client.current_run() is None


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TRACKAGENT_SEGMENT_BYTES", "lots", "TRACKAGENT_SEGMENT_BYTES is 'lots': give a number"),
        (
            "TRACKAGENT_EXIT_TIMEOUT_S",
            "nan",
            "exit_timeout_s is nan: give seconds between 0 and 86400",
        ),
        ("TRACKAGENT_SEGMENT_BYTES", "4096", "segment_bytes is 4096: give a multiple of 4096"),
        ("TRACKAGENT_JOURNAL_BYTES", "65536", "journal_bytes is 65536: give at least 4 segments"),
        ("TRACKAGENT_RUN_ID", "xyz", "TRACKAGENT_RUN_ID is 'xyz': give 32 hex digits"),
    ],
)
def test_a_wrong_variable_is_a_config_error_that_names_it(
    start: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        start()
    assert str(caught.value).startswith(message)


def test_a_socket_path_that_is_too_long_is_a_config_error_that_names_it(
    start: Callable[..., Run], folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = folders.directory / ("d" * 100)
    monkeypatch.setenv("TRACKAGENT_DIR", str(directory))
    with pytest.raises(ConfigError) as caught:
        start()
    path = directory / "agent.sock"
    assert str(caught.value) == (
        f"the socket path {path} has {len(str(path))} bytes, the system allows 107: "
        "set TRACKAGENT_DIR to a shorter folder"
    )


def test_no_room_for_a_journal_is_a_journal_error(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKAGENT_DIR", "/proc/trackagent")
    monkeypatch.setenv("TRACKAGENT_STATE", "/proc/trackagent")
    with pytest.raises(
        JournalError, match=r"/proc/trackagent.*set TRACKAGENT_DIR and TRACKAGENT_STATE"
    ):
        start()
    assert client.current_run() is None


def test_an_init_that_fails_leaves_no_thread(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKAGENT_DIR", "/proc/trackagent")
    monkeypatch.setenv("TRACKAGENT_STATE", "/proc/trackagent")
    before = set(threading.enumerate())
    with pytest.raises(JournalError):
        start()
    wait_until(lambda: set(threading.enumerate()) <= before)
