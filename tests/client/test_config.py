"""The training process's configuration: precedence and checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from trackagent.client.config import ClientConfig
from trackagent.client.errors import ConfigError


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Nothing set, and a configuration file that TRACKAGENT_CONFIG names."""
    (tmp_path / "config.toml").write_text("")
    return {"HOME": str(tmp_path), "TRACKAGENT_CONFIG": str(tmp_path / "config.toml")}


def write(environ: dict[str, str], text: str) -> None:
    Path(environ["TRACKAGENT_CONFIG"]).write_text(text)


def test_the_agents_socket_lies_in_the_directory(environ: dict[str, str]) -> None:
    config = ClientConfig.load(environ=environ | {"TRACKAGENT_DIR": "/dev/shm/x"})
    assert config.agent == "unix:/dev/shm/x/agent.sock"


def test_an_argument_beats_the_variable(environ: dict[str, str]) -> None:
    config = ClientConfig.load(agent="unix:/a", environ=environ | {"TRACKAGENT_AGENT": "unix:/b"})
    assert config.agent == "unix:/a"


@pytest.mark.parametrize("agent", ["host:50051", "http://x", 5, "unix:relative"])
def test_an_agent_that_is_no_socket_is_named(environ: dict[str, str], agent: str) -> None:
    with pytest.raises(ConfigError, match="give the agent's socket, unix:/path"):
        ClientConfig.load(agent=agent, environ=environ)


def test_a_variable_beats_the_file(environ: dict[str, str]) -> None:
    write(environ, "[client]\nexit_timeout_s = 3\n")
    config = ClientConfig.load(environ=environ | {"TRACKAGENT_EXIT_TIMEOUT_S": "4.5"})
    assert config.exit_timeout_s == 4.5


def test_the_file_beats_the_default(environ: dict[str, str]) -> None:
    write(environ, "[client]\nexit_timeout_s = 3\n")
    assert ClientConfig.load(environ=environ).exit_timeout_s == 3.0


def test_the_folders_are_the_agents(environ: dict[str, str]) -> None:
    write(environ, 'directory = "/dev/shm/here"\nstate_directory = "state"\n')
    config = ClientConfig.load(environ=environ)
    expected = (Path("/dev/shm/here"), Path(environ["HOME"]) / "state")
    assert (config.directory, config.state_directory) == expected


def test_keys_of_the_agent_are_left_to_it(environ: dict[str, str]) -> None:
    write(environ, "spool_bytes = 100000000\n")
    assert ClientConfig.load(environ=environ).segment_bytes == 1024 * 1024


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[client]\nsegments = 1\n", "unknown key 'segments'"),
        ("[client]\nexit_timeout_s = true\n", "exit_timeout_s is True: give a number"),
        ("client = 1\n", "client is no table"),
        ("directory = 1\n", "directory is 1: give a path"),
        ("nonsense", "cannot read the configuration file"),
        ("[client]\nsegment_bytes = 1000\n", "segment_bytes is 1000: give a multiple of 4096"),
        ("[client]\njournal_bytes = 4096\n", "journal_bytes is 4096: give at least 4 segments"),
        ("[client]\nflush_interval_s = nan\n", "flush_interval_s is nan"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(
    environ: dict[str, str], text: str, message: str
) -> None:
    write(environ, text)
    with pytest.raises(ConfigError, match=message):
        ClientConfig.load(environ=environ)


def test_a_variable_that_is_no_number_is_named(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="TRACKAGENT_MEMORY_BYTES is 'much'"):
        ClientConfig.load(environ=environ | {"TRACKAGENT_MEMORY_BYTES": "much"})


def test_a_socket_path_too_long_is_named(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"the socket path /.*x/agent.sock has .* bytes"):
        ClientConfig.load(environ=environ | {"TRACKAGENT_DIR": "/" + "x" * 100})


def test_a_missing_file_that_was_named_is_an_error(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*: no such file"):
        ClientConfig.load(environ=environ | {"TRACKAGENT_CONFIG": "/nowhere/config.toml"})


@pytest.mark.usefixtures("homeless")
def test_without_a_home_the_state_folder_must_be_named() -> None:
    with pytest.raises(ConfigError, match="no home folder: set TRACKAGENT_STATE"):
        ClientConfig.load(environ={})


@pytest.mark.usefixtures("homeless")
def test_without_a_home_a_named_state_folder_will_do() -> None:
    config = ClientConfig.load(environ={"TRACKAGENT_STATE": "/var/lib/x"})
    assert config.state_directory == Path("/var/lib/x")
