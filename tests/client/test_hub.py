"""The hub of a run: its text, and what is refused."""

from __future__ import annotations

import pytest

from trackagent.client.broadcast import Word
from trackagent.client.errors import ConfigError
from trackagent.client.hub import Hub, new_token
from trackagent.client.identity import Identity

PIN = "0a" * 32
TOKEN = "1b" * 16


@pytest.mark.parametrize(
    "address",
    ["node-0.cluster:7717", "10.0.0.1:1", "[fd00::1]:65535", "_srv:80", f"{'h' * 253}:7717"],
)
def test_a_hub_is_what_its_text_says(address: str) -> None:
    hub = Hub(address, PIN, TOKEN)
    assert hub.text() == f"{address} {PIN} {TOKEN}"
    assert Hub.parse(hub.text()) == hub


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "`host:port pin token`"),
        (None, "`host:port pin token`"),
        (f"h:1 {PIN}", "`host:port pin token`"),
        (f"h:1 {PIN} {TOKEN} more", "`host:port pin token`"),
        (f"h:1  {PIN} {TOKEN}", "`host:port pin token`"),
        (f"h {PIN} {TOKEN}", "address"),
        (f":1 {PIN} {TOKEN}", "address"),
        (f"h:0 {PIN} {TOKEN}", "address"),
        (f"h:01 {PIN} {TOKEN}", "address"),
        (f"h:65536 {PIN} {TOKEN}", "address"),
        (f"h:\u0661 {PIN} {TOKEN}", "address"),
        (f"fd00::1:7717 {PIN} {TOKEN}", "address"),
        (f"dns:///h:1 {PIN} {TOKEN}", "address"),
        (f"-h:1 {PIN} {TOKEN}", "address"),
        (f"{'h' * 254}:1 {PIN} {TOKEN}", "address"),
        (f"h:1\n {PIN} {TOKEN}", "address"),
        (f"h:1 {PIN[1:]} {TOKEN}", "pin"),
        (f"h:1 {PIN.upper()} {TOKEN}", "pin"),
        (f"h:1 {PIN} {TOKEN}0", "token"),
        (f"h:1 {PIN} {TOKEN}\n", "token"),
    ],
)
def test_anything_else_is_refused_by_its_part(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        Hub.parse(text)
    assert TOKEN not in str(caught.value)


def test_a_hub_can_be_shown_without_its_token() -> None:
    hub = Hub("h:1", PIN, TOKEN)
    assert "h:1" in repr(hub)
    assert TOKEN not in f"{hub!r} {hub}"


def test_who_a_process_is_can_be_shown_without_its_hubs_token() -> None:
    hub = Hub("h:1", PIN, TOKEN)
    who = Identity(
        run_id="a" * 32, attempt=1, rank=0, local_rank=0, world_size=2, node="n", hub=hub
    )
    shown = f"{who} {Word('a' * 32, 1, hub, 'b' * 32)}"
    assert "h:1" in shown
    assert TOKEN not in shown


def test_a_token_is_new_each_time() -> None:
    assert new_token() != new_token()
    assert Hub("h:1", PIN, new_token())
