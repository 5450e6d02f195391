"""Run tokens: who knows the one that rank 0 made may deliver to its run, and nobody else."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trackagent.agent.tokens import MAX_TOKENS, TokenTable

RUN, OTHER = "a" * 32, "b" * 32
ONE, TWO = "1" * 32, "2" * 32

Open = Callable[[], TokenTable]


@pytest.fixture
def open_tokens(tmp_path: Path) -> Iterator[Open]:
    """open_tokens(): those of this test's file."""
    made: list[TokenTable] = []

    def opened() -> TokenTable:
        made.append(TokenTable(tmp_path / "tokens.db", tmp_path / "quarantine"))
        return made[-1]

    yield opened
    for one in made:
        one.close()


def test_a_token_is_good_for_its_run_alone(open_tokens: Open) -> None:
    tokens = open_tokens()
    tokens.note(RUN, ONE)
    asked = [(RUN, ONE), (RUN, TWO), (OTHER, ONE), (RUN, ""), (RUN, "é"), ("", ONE), ("x", ONE)]
    assert [tokens.is_good(*one) for one in asked] == [True] + [False] * 6


def test_a_token_is_known_to_the_next_agent(open_tokens: Open) -> None:
    open_tokens().note(RUN, ONE)
    assert open_tokens().is_good(RUN, ONE)


def test_each_start_of_a_run_has_a_token_of_its_own(open_tokens: Open) -> None:
    tokens = open_tokens()
    tokens.note(RUN, ONE)
    assert not tokens.is_good(RUN, TWO)
    tokens.note(RUN, TWO)
    assert (tokens.is_good(RUN, ONE), tokens.is_good(RUN, TWO)) == (True, True)


def test_the_oldest_token_of_a_run_goes_first(open_tokens: Open) -> None:
    tokens = open_tokens()
    made = [f"{number:032x}" for number in range(MAX_TOKENS + 1)]
    for token in made[:-1]:
        tokens.note(RUN, token)
    tokens.note(RUN, made[0])  # said again: the newest now
    tokens.note(RUN, made[-1])
    assert [token for token in made if not tokens.is_good(RUN, token)] == [made[1]]


def test_what_is_asked_again_takes_no_disk(open_tokens: Open) -> None:
    tokens = open_tokens()
    tokens.note(RUN, ONE)
    asked = [(tokens.is_quick(RUN), tokens.is_good(RUN, token)) for token in (ONE, TWO)]
    assert asked == [(False, True), (True, False)]
    tokens.note(RUN, TWO)
    assert tokens.is_good(RUN, TWO)


def test_what_is_no_run_has_no_token(open_tokens: Open) -> None:
    with pytest.raises(ValueError, match="'A' is no run id"):
        open_tokens().note("A", ONE)


def test_the_file_is_private_and_holds_no_token(open_tokens: Open, tmp_path: Path) -> None:
    tokens = open_tokens()
    tokens.note(RUN, ONE)
    tokens.close()
    assert stat.S_IMODE((tmp_path / "tokens.db").stat().st_mode) == 0o600
    content = b"".join(path.read_bytes() for path in tmp_path.glob("tokens.db*"))
    assert RUN.encode() in content
    assert ONE.encode() not in content
    assert bytes.fromhex(ONE) not in content


def test_a_damaged_file_is_set_aside(open_tokens: Open, tmp_path: Path) -> None:
    (tmp_path / "tokens.db").write_bytes(b"no database" * 100)
    tokens = open_tokens()
    assert not tokens.is_good(RUN, ONE)
    tokens.note(RUN, ONE)
    assert tokens.is_good(RUN, ONE)
    assert [path.suffix for path in sorted((tmp_path / "quarantine").iterdir())] == [
        ".db",
        ".reason",
    ]


def test_what_cannot_be_written_is_not_good(open_tokens: Open, tmp_path: Path) -> None:
    tokens = open_tokens()
    with sqlite3.connect(tmp_path / "tokens.db") as database:
        database.execute(
            "CREATE TRIGGER t BEFORE INSERT ON tokens BEGIN SELECT RAISE(FAIL, 'x'); END"
        )
    database.close()
    with pytest.raises(sqlite3.Error):
        tokens.note(RUN, ONE)
    assert not tokens.is_good(RUN, ONE)
