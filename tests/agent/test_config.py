"""The agent's configuration: precedence, checks, and the sample file."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from trackagent.agent.addresses import hub_address
from trackagent.agent.config import AgentConfig, flag, load, loopback_address, variable
from trackagent.agent.errors import ConfigError
from trackagent.client.config import ClientConfig

SAMPLE = Path(__file__).parents[2] / "docs" / "config.sample.toml"
FIELDS = [field.name for field in dataclasses.fields(AgentConfig)]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing is set and no configuration file is found."""
    return {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "none")}


def written(folder: Path, text: str) -> Path:
    path = folder / "agent.toml"
    path.write_text(text)
    return path


def test_a_file_beats_the_default(tmp_path: Path, environ: dict[str, str]) -> None:
    config, _ = load({}, environ, written(tmp_path, "max_streams = 7"))
    assert config.max_streams == 7


def test_the_environment_beats_the_file(tmp_path: Path, environ: dict[str, str]) -> None:
    environ["TRACKAGENT_MAX_STREAMS"] = "8"
    config, _ = load({}, environ, written(tmp_path, "max_streams = 7"))
    assert config.max_streams == 8


def test_a_flag_beats_the_environment(environ: dict[str, str]) -> None:
    environ["TRACKAGENT_MAX_STREAMS"] = "8"
    config, _ = load({"max_streams": "9"}, environ)
    assert config.max_streams == 9


def test_a_flag_that_was_not_given_changes_nothing(environ: dict[str, str]) -> None:
    environ["TRACKAGENT_MAX_STREAMS"] = "8"
    config, _ = load({"max_streams": None}, environ)
    assert config.max_streams == 8


def test_an_empty_variable_is_one_that_is_not_set(environ: dict[str, str]) -> None:
    environ["TRACKAGENT_MAX_STREAMS"] = ""
    _, origins = load({}, environ)
    assert origins["max_streams"] == "default"


def test_every_value_says_where_it_comes_from(tmp_path: Path, environ: dict[str, str]) -> None:
    path = written(tmp_path, "max_streams = 7\ngroup = 'ml'")
    environ["TRACKAGENT_STATE"] = str(tmp_path / "state")
    _, origins = load({"log_level": "debug"}, environ, path)
    expected = dict.fromkeys(FIELDS, "default") | {
        "max_streams": f"file {path}",
        "group": f"file {path}",
        "state_directory": "environment TRACKAGENT_STATE",
        "log_level": "flag --log-level",
    }
    assert origins == expected


def test_the_file_can_be_named_by_the_environment(tmp_path: Path, environ: dict[str, str]) -> None:
    environ["TRACKAGENT_CONFIG"] = str(written(tmp_path, "max_streams = 7"))
    config, _ = load({}, environ)
    assert config.max_streams == 7


def test_the_file_of_the_user_is_found(tmp_path: Path, environ: dict[str, str]) -> None:
    del environ["XDG_CONFIG_HOME"]
    folder = tmp_path / ".config" / "trackagent"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("max_streams = 7")
    config, _ = load({}, environ)
    assert config.max_streams == 7


def test_the_folders_are_those_of_the_client(environ: dict[str, str]) -> None:
    from trackagent.client.config import default_directory, default_state_directory

    environ |= {"TRACKAGENT_DIR": "/run/x", "XDG_STATE_HOME": "/var/y"}
    config, _ = load({}, environ)
    assert (config.directory, config.state_directory) == (
        default_directory(environ),
        default_state_directory(environ),
    )


def test_a_folder_in_a_file_is_relative_to_the_file(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    config, _ = load({}, environ, written(tmp_path, "state_directory = 'here'"))
    assert config.state_directory == tmp_path / "here"


def test_an_unknown_key_is_refused_with_the_nearest_known_one(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    path = written(tmp_path, "spol_bytes = 1")
    with pytest.raises(ConfigError) as refused:
        load({}, environ, path)
    assert str(refused.value) == f"unknown key 'spol_bytes' in {path}: did you mean spool_bytes?"


def test_a_missing_file_that_was_named_is_an_error(tmp_path: Path, environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/gone.toml: no such file")):
        load({}, environ, tmp_path / "gone.toml")


def test_a_file_that_is_not_toml_is_named(tmp_path: Path, environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"agent\.toml: .*line 1"):
        load({}, environ, written(tmp_path, "max_streams: 7"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("max_streams", "many"),
        ("max_streams", "0"),
        ("max_batch_bytes", "1000"),
        ("max_batch_bytes", "1e6"),
        ("spool_bytes", "4 GiB"),
        ("deliver_interval_s", "nan"),
        ("drain_timeout_s", "-1"),
        ("log_level", "loud"),
        ("directory", "/" + "x" * 100),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_its_variable(
    environ: dict[str, str], name: str, text: str
) -> None:
    environ[variable(name)] = text
    with pytest.raises(ConfigError, match=variable(name) if name != "directory" else "socket path"):
        load({}, environ)


@pytest.mark.parametrize("text", ["true", "2.5", "'7'", "[7]"])
def test_a_value_of_another_type_is_refused(
    tmp_path: Path, environ: dict[str, str], text: str
) -> None:
    path = written(tmp_path, f"max_streams = {text}")
    with pytest.raises(ConfigError, match=r"max_streams is .*: give a whole number"):
        load({}, environ, path)


def test_the_spool_holds_several_batches(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="at least 4 times max_batch_bytes"):
        load({"spool_bytes": 16 << 20, "max_batch_bytes": 8 << 20}, environ)


def uncommented(text: str) -> str:
    return re.sub(r"^#(?=\w+ = |\[)", "", text, flags=re.MULTILINE)


def test_the_sample_sets_nothing_as_it_stands(environ: dict[str, str]) -> None:
    assert load({}, environ, SAMPLE)[1] == dict.fromkeys(FIELDS, "default")


def test_the_sample_shows_every_setting_once() -> None:
    agent, _, client = SAMPLE.read_text().partition("#[client]")
    shared = {"directory", "state_directory"}
    client_fields = {field.name for field in dataclasses.fields(ClientConfig)} - shared
    assert sorted(re.findall(r"^#(\w+) = ", agent, re.MULTILINE)) == sorted(FIELDS)
    assert sorted(re.findall(r"^#(\w+) = ", client, re.MULTILINE)) == sorted(client_fields)


def test_the_sample_shows_the_defaults(tmp_path: Path, environ: dict[str, str]) -> None:
    path = written(tmp_path, uncommented(SAMPLE.read_text()))
    shown, _ = load({}, environ, path)
    defaults, _ = load({}, environ)
    # Paths differ from user to user, names from host to host, and there is no default group or file.
    mine = {"directory", "state_directory", "node", "group"}
    mine |= {"token_file", "tls_cert", "tls_key", "tls_ca"}
    assert {n: getattr(shown, n) for n in FIELDS if n not in mine} == {
        n: getattr(defaults, n) for n in FIELDS if n not in mine
    }


def test_the_sample_shows_the_clients_defaults(tmp_path: Path, environ: dict[str, str]) -> None:
    path = written(tmp_path, uncommented(SAMPLE.read_text()))
    shown = ClientConfig.load(environ=environ | {"TRACKAGENT_CONFIG": str(path)})
    mine = {"directory", "state_directory", "agent"}
    defaults = ClientConfig.load(environ=environ)
    names = {field.name for field in dataclasses.fields(ClientConfig)} - mine
    assert {n: getattr(shown, n) for n in names} == {n: getattr(defaults, n) for n in names}


def test_the_sample_names_the_variable_of_every_setting() -> None:
    text = SAMPLE.read_text()
    shown = set(re.findall(r"(TRACKAGENT_\w+)[),]", text))
    assert [name for name in FIELDS if variable(name) not in shown] == []


@pytest.mark.parametrize(
    "url",
    ["hooks.slack.com/x", "http://[::1/x", "http://a:9x/", "https://user:pw@host/", "https:///x"],
)
def test_a_webhook_that_is_no_address_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigError, match="hook_url is no address") as refused:
        load({}, {"TRACKAGENT_HOOK_URL": url, "HOME": "/home/x"})
    assert url not in str(refused.value)


def test_messages_of_hooks_have_time_between_them() -> None:
    with pytest.raises(ConfigError, match=r"hook_interval_s is 0\.0: give 0\.1 to 86400"):
        load({}, {"TRACKAGENT_HOOK_INTERVAL_S": "0", "HOME": "/home/x"})


def test_every_setting_has_a_flag() -> None:
    from trackagent.agent.cli.agent import start_command

    flags = {option for parameter in start_command.params for option in parameter.opts}
    assert [name for name in FIELDS if flag(name) not in flags] == [
        "hook_url"  # which may be a secret
    ]


@pytest.mark.usefixtures("homeless")
def test_without_a_home_the_state_folder_must_be_named() -> None:
    with pytest.raises(ConfigError, match="no home folder: set TRACKAGENT_STATE"):
        load({}, {})


@pytest.mark.usefixtures("homeless")
def test_without_a_home_a_named_state_folder_will_do() -> None:
    assert load({}, {"TRACKAGENT_STATE": "/var/lib/x"})[0].state_directory == Path("/var/lib/x")


# --- what is sampled


def test_the_node_is_named_as_its_ranks_name_it(environ: dict[str, str]) -> None:
    assert load({}, environ | {"NODE_NAME": "worker-3"})[0].node == "worker-3"
    environ["TRACKAGENT_NODE"] = "rack-7"
    assert load({}, environ | {"NODE_NAME": "worker-3"})[0].node == "rack-7"


def test_a_node_that_no_rank_could_name_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"node is 'a b': .*environment TRACKAGENT_NODE"):
        load({}, environ | {"TRACKAGENT_NODE": "a b"})


def test_a_collector_that_is_not_there_is_refused_by_name(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"collect is 'sistem': .*did you mean system.*--collect"):
        load({"collect": "sistem"}, environ)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("127.1.2.3:0", ("127.1.2.3", 0)),
        ("localhost:9464", ("127.0.0.1", 9464)),
        ("[::1]:9464", ("::1", 9464)),
    ],
)
def test_an_address_of_this_node_is_taken(text: str, meant: tuple[str, int]) -> None:
    assert loopback_address(text) == meant


@pytest.mark.parametrize("text", ["0.0.0.0:9464", "[::]:9464", "10.0.0.1:9464", "[fe80::1]:9464"])
def test_an_address_that_others_could_reach_is_refused(environ: dict[str, str], text: str) -> None:
    environ["TRACKAGENT_PROMETHEUS"] = text
    with pytest.raises(ConfigError) as refused:
        load({}, environ)
    assert str(refused.value) == (
        f"prometheus is {text!r}: give an address of this node alone, such as 127.0.0.1:9464, since what is "
        "read there is neither encrypted nor authenticated; to read it from elsewhere, put a proxy before it "
        "that is (from environment TRACKAGENT_PROMETHEUS)"
    )


@pytest.mark.parametrize(
    "text", ["9464", "on", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:x", ":9464"]
)
def test_what_is_no_address_is_refused(environ: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=r"^prometheus is .*such as 127\.0\.0\.1:9464"):
        load({"prometheus": text}, environ)


def test_an_empty_address_is_none(tmp_path: Path, environ: dict[str, str]) -> None:
    path = written(tmp_path, "prometheus = '127.0.0.1:9464'")
    config, _ = load({"prometheus": ""}, environ, path)
    assert config.prometheus == ""


# --- other nodes


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("10.0.0.1", ("10.0.0.1", 7717)),
        ("hub.example.org:80", ("hub.example.org", 80)),
        ("[fd00::1]", ("fd00::1", 7717)),
        ("[fd00::1]:0", ("fd00::1", 0)),
    ],
)
def test_a_hubs_address_has_a_port_of_its_own(text: str, meant: tuple[str, int]) -> None:
    assert hub_address(text) == meant


@pytest.mark.parametrize("text", [":7717", ":"])
def test_who_listens_may_leave_the_host_out(text: str) -> None:
    if text == ":7717":
        assert hub_address(text, anywhere=True) == ("", 7717)
    with pytest.raises(ValueError, match="give"):
        hub_address(text)


@pytest.mark.parametrize(
    "text", ["7717", "a:b", "a:65536", "fd00::1", "[a]:1", "a b:1", "https://a:1", "-a:1", "[::1"]
)
@pytest.mark.parametrize("name", ["listen", "store"])
def test_what_is_no_address_of_a_hub_is_refused(
    environ: dict[str, str], name: str, text: str
) -> None:
    environ[variable(name)] = text
    with pytest.raises(ConfigError, match=rf"^{name} is .*\(from environment {variable(name)}\)"):
        load({}, environ)


def test_an_agent_that_delivers_elsewhere_must_know_to_whom(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"^store is set without .*give token_file, or tls_ca"):
        load({"store": "hub:7717"}, environ)
    assert load({"store": "hub:7717", "token_file": "/t"}, environ)[0].token_file == Path("/t")


def test_a_key_without_its_certificate_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"^tls_key is set without tls_cert: give both"):
        load({"tls_key": "/k"}, environ)


def test_an_address_for_others_where_nothing_listens_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"^advertise is set, but nothing listens"):
        load({"advertise": "a"}, environ)


def test_an_empty_name_of_a_token_file_is_not_none(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"^token_file is '': give a path"):
        load({"token_file": ""}, environ)


def test_a_token_file_in_a_file_is_relative_to_the_file(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    config, _ = load({}, environ, written(tmp_path, "token_file = 'token'"))
    assert config.token_file == tmp_path / "token"
