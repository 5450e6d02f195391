"""What a real agent says of a hub in its folder, as rank 0 of a run on two nodes hears it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.fakes import AgentProcess, Folders
from trackagent.client.config import ClientConfig, socket_address
from trackagent.client.hub import Hub
from trackagent.client.naming import NodeHubs
from trackagent.client.ranks import Ranks


def named(folders: Folders) -> tuple[Hub | None, str]:
    """The hub that rank 0 names, and what the user is told; it does not wait for an agent."""
    directory, state = folders
    config = ClientConfig(
        directory=directory, state_directory=state, agent=socket_address(directory)
    )
    seconds = iter(range(0, 1000, 10))
    hubs = NodeHubs(
        config,
        environ={"LOCAL_WORLD_SIZE": "2"},
        host=lambda environ: "node-0",
        sleep=lambda seconds: None,
        clock=lambda: next(seconds),
    )
    return hubs.name(Ranks(rank=0, local_rank=0, world_size=4))


def test_rank_0_names_the_agent_that_listens_and_no_other(
    own_agent: Callable[..., AgentProcess], folders: Folders, tmp_path: Path
) -> None:
    agent = own_agent("--listen", ":0")
    agent.start()
    hub, problem = named(folders)
    assert hub is not None
    assert problem == ""
    assert f"(pin {hub.pin})" in agent.output
    port = hub.address.removeprefix("node-0:")
    assert f"other nodes may deliver at *:{port} " in agent.output
    # What it leaves is stale.
    agent.kill()
    assert (folders.directory / "hub.json").exists()
    hub, problem = named(folders)
    assert hub is None
    assert "no agent answers" in problem
    # Another begins in its folder that takes nothing from others.
    agent.flags = ()
    agent.start()
    hub, problem = named(folders)
    assert hub is None
    assert "takes nothing from the others" in problem
    agent.stop()
    # And one that delivers everything to a hub, which need not be there now.
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    agent.flags = ("--store", "127.0.0.1:1", "--token-file", str(token), "--drain-timeout-s", "0.1")
    agent.start()
    assert named(folders) == (None, "")
    agent.stop()
    assert not (folders.directory / "hub.json").exists()
