"""What an agent can be told, and the one place in this package that reads TRACKAGENT_* variables and the
configuration file.

A setting comes from, first found: a flag, the environment (TRACKAGENT_<NAME>; the folders: TRACKAGENT_DIR
and TRACKAGENT_STATE), the configuration file, its default. The file is TOML with the field names below as
keys; docs/config.sample.toml lists them all.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trackagent.agent.addresses import hub_address
from trackagent.agent.collect.table import ALL, NONE, intervals
from trackagent.agent.errors import ConfigError
from trackagent.agent.health.settings import RULES, Thresholds
from trackagent.client.config import (
    MAX_SOCKET_PATH_BYTES,
    SOCKET_NAME,
    config_file,
    default_directory,
    default_state_directory,
    read_config_file,
)
from trackagent.client.errors import ConfigError as ClientConfigError
from trackagent.client.identity import node_name

LOG_LEVELS = ("debug", "info", "warning", "error")
SPOOL_NAME = "spool.db"
STORE_NAME = "store.db"
OWNERS_NAME = "owners.db"
ROUTES_NAME = "routes.db"
TOKENS_NAME = "tokens.db"
POLICIES_NAME = "policies.json"
WAY_NAME = "way"
DATABASES = (SPOOL_NAME, STORE_NAME, OWNERS_NAME, TOKENS_NAME, ROUTES_NAME)
HUB_NAME = "hub"
# In `directory`: where ranks learn that this agent takes what other nodes forward.
HUB_FILE_NAME = "hub.json"
LOCK_NAME = "agent.lock"
_LOCALHOST = "127.0.0.1"
DEAD_LETTERS_NAME = "dead-letters"
QUARANTINE_NAME = "quarantine"
NODE_NAME = re.compile(r"[!-~]{1,253}")


@dataclass(frozen=True, kw_only=True)
class AgentConfig(Thresholds):
    """Checked at construction, without touching files or network."""

    directory: Path
    """Folder of the socket and of the journals; in memory, the same for agent and training processes."""

    state_directory: Path
    """Folder of spool, store and overflow journals; on a local disk."""

    spool_bytes: int = 4 * 1024 * 1024 * 1024
    """Journal bytes kept for sinks that are behind; beyond it the ranks are asked to keep theirs."""

    dead_letter_bytes: int = 1024 * 1024 * 1024
    """Batches kept aside that a sink has rejected; beyond it a rejected batch stays in the spool, and what
    is behind it waits."""

    quarantine_bytes: int = 4 * 1024 * 1024 * 1024
    """Damaged files set aside, on the disk and in memory together; beyond it the oldest are deleted."""

    uncommitted_bytes: int = 64 * 1024 * 1024
    """Received bytes in memory that await their commit; beyond it nothing more is read from the ranks."""

    max_batch_bytes: int = 2 * 1024 * 1024
    """Largest piece of a journal that a rank may send at once."""

    max_streams: int = 1024
    """Ranks that may be connected at the same time."""

    group: str | None = None
    """Unix group that may use the socket too; None: only the user who runs the agent."""

    deliver_interval_s: float = 0.5
    """How long a received record may wait before it is delivered to the sinks; while more arrive, up to 0.2 s
    longer, for a commit that can be shared."""

    drain_timeout_s: float = 20.0
    """How long an agent that is told to stop goes on delivering; the rest waits in its spool."""

    gone_after_s: float = 3600.0
    """How long a rank that has not ended may have neither connection nor journal; then it is killed."""

    listen: str = ""
    """HOST:PORT where other nodes may deliver, over TLS: 0.0.0.0:7717, or :7717 for all addresses. Empty:
    nothing listens beyond this node."""

    advertise: str = ""
    """HOST[:PORT] under which other nodes reach `listen`; empty: ranks find out."""

    store: str = ""
    """HOST:PORT of the hub that everything is delivered to; empty: this node's store, or the run's hub."""

    token_file: Path | None = None
    """The cluster's token, for its user alone: who knows it may deliver any run, and is the hub."""

    tls_cert: Path | None = None
    """This agent's certificate by the cluster's CA, PEM, with what leads to the CA behind it."""

    tls_key: Path | None = None
    """Its key, PEM without a password, for its user alone."""

    tls_ca: Path | None = None
    """Certificates of the cluster's CA, PEM: who has one by it is the hub, and may deliver any run."""

    forward_interval_s: float = 1.0
    """How long a record may wait before it is forwarded to another node."""

    keep_all_ranks: int = 64
    """Runs of at most this many ranks keep every rank's points, where ranks define nothing else; of larger
    ones reductions are kept, and the points of the ranks that hold the least and the greatest value of a
    step."""

    keep_node_ranks: int = 1024
    """Runs of at most this many ranks keep what is reduced over each of their nodes, too."""

    linger_s: float = 30.0
    """How long a hub that is told to stop waits for the ranks of other nodes."""

    node: str = ""
    """The name of this node, the one that its ranks log under: the host's."""

    collect: str = ALL
    """What is sampled: all, none, or collectors with commas between, an interval of their own behind them:
    `system,gpu=5`."""

    sample_interval_s: float = 1.0
    """How often."""

    prometheus: str = ""
    """HOST:PORT of this node alone where Prometheus may read how the agent is doing and what it sampled last:
    127.0.0.1:9464; port 0 is any that is free. Empty: nowhere."""

    health: str = ALL
    """What is told of runs and the node when it goes wrong: all, none, or rules with commas between."""

    hook_command: str = ""
    """What /bin/sh runs at each event, with the event as JSON on its standard input."""

    hook_url: str = field(default="", repr=False)
    """Where each event is sent by POST, as JSON that Slack's webhooks take. It may be a secret."""

    hook_interval_s: float = 10.0
    """After some events at once, how long until the next message; what happens meanwhile goes with it."""

    log_level: str = "info"
    """How much the agent says: debug, info, warning or error."""

    def __post_init__(self) -> None:
        for name in ("directory", "state_directory"):
            if not getattr(self, name).is_absolute():
                raise ConfigError(f"{name} is {getattr(self, name)}: give an absolute path")
        if self.directory == self.state_directory:
            raise ConfigError(f"directory and state_directory are both {self.directory}: give two")
        if (length := len(os.fsencode(self.socket_path))) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"the socket path {self.socket_path} has {length} bytes, the system allows "
                f"{MAX_SOCKET_PATH_BYTES}: give a shorter directory"
            )
        for name, low, high in (
            ("spool_bytes", 16 * 1024 * 1024, 1 << 50),
            ("dead_letter_bytes", 1024 * 1024, 1 << 50),
            ("quarantine_bytes", 1024 * 1024, 1 << 50),
            ("uncommitted_bytes", 1024 * 1024, 1 << 40),
            ("max_batch_bytes", 1024 * 1024, 64 * 1024 * 1024),
            ("max_streams", 1, 65_536),
            ("deliver_interval_s", 0.001, 3_600),
            ("gone_after_s", 1, 365 * 86_400),
            ("drain_timeout_s", 0, 86_400),
            ("forward_interval_s", 0.01, 3_600),
            ("keep_all_ranks", 0, 1 << 24),
            ("keep_node_ranks", 0, 1 << 24),
            ("linger_s", 0, 86_400),
            ("sample_interval_s", 1, 3_600),
            ("hook_interval_s", 0.1, 86_400),
            ("hang_s", 1, 365 * 86_400),
            ("hang_steps", 1, 1_000_000),
            ("straggler_ratio", 0, 1),
            ("spike_factor", 1, 1_000_000),
            ("spike_window", 10, 10_000),
            ("spike_patience", 1, 1_000),
            ("memory_warning", 0, 1),
            ("memory_error", 0, 1),
            ("disk_error", 0, 1),
            ("busy_percent", 0, 100),
            ("throttled_s", 0, 86_400),
            ("silent_s", 1, 365 * 86_400),
        ):
            # Written so that NaN is refused too.
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} is {getattr(self, name)}: give {low} to {high}")
        if self.uncommitted_bytes < self.max_batch_bytes:
            raise ConfigError(
                f"uncommitted_bytes is {self.uncommitted_bytes}: give at least max_batch_bytes, "
                f"{self.max_batch_bytes}"
            )
        if self.spool_bytes < 4 * self.max_batch_bytes:
            raise ConfigError(
                f"spool_bytes is {self.spool_bytes}: give at least 4 times max_batch_bytes, "
                f"{4 * self.max_batch_bytes}"
            )
        if self.group == "":
            raise ConfigError("group is empty: give the name of a unix group")
        if self.node and not NODE_NAME.fullmatch(self.node):
            raise ConfigError(
                f"node is {self.node!r:.300}: give 1 to 253 visible ASCII characters without blanks"
            )
        self._check_hub()
        try:
            intervals(self.collect, self.sample_interval_s)
        except ValueError as error:
            raise ConfigError(f"collect is {self.collect!r:.300}: {error}") from None
        try:
            if self.prometheus:
                loopback_address(self.prometheus)
        except ValueError as error:
            raise ConfigError(f"prometheus is {self.prometheus!r:.300}: {error}") from None
        try:
            self.health_rules()
        except ValueError as error:
            raise ConfigError(f"health is {self.health!r:.300}: {error}") from None
        if self.hook_url and not _is_web_address(self.hook_url):
            # Without its value, which may be a secret.
            raise ConfigError(
                "hook_url is no address: give one that begins with https:// or http://"
            )
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"log_level is {self.log_level!r}: give {', '.join(LOG_LEVELS)}")

    def _check_hub(self) -> None:
        for name in ("listen", "advertise", "store"):
            text = getattr(self, name)
            try:
                if text:
                    hub_address(text, anywhere=name == "listen")
            except ValueError as error:
                raise ConfigError(f"{name} is {text!r:.300}: {error}") from None
        if self.advertise and not self.listen:
            raise ConfigError("advertise is set, but nothing listens: give listen too")
        for one, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
            if getattr(self, one) and not getattr(self, other):
                raise ConfigError(f"{one} is set without {other}: give both")
        if self.store and not self.has_credentials:
            raise ConfigError(
                "store is set without what tells its hub from another, and this agent from a stranger: give "
                "token_file, or tls_ca, tls_cert and tls_key"
            )

    def health_rules(self) -> frozenset[str]:
        """The rules that `health` asks for. ValueError says what is wrong."""
        if self.health.strip() in (ALL, NONE):
            return frozenset(RULES if self.health.strip() == ALL else ())
        asked = [name.strip() for name in self.health.split(",")]
        for name in asked:
            if name not in RULES:
                raise ValueError(
                    f"there is no rule {name!r}: give all, none, or {', '.join(RULES)}"
                )
        return frozenset(asked)

    @property
    def has_credentials(self) -> bool:
        """Whether a hub can be told from another, and this agent from a stranger."""
        return bool(self.token_file or (self.tls_ca and self.tls_cert))

    @property
    def stopping_s(self) -> float:
        """How long an agent that is told to stop may take, beside what ends at once."""
        return self.drain_timeout_s + (self.linger_s if self.listen else 0.0)

    @property
    def socket_path(self) -> Path:
        """Where the agent of `directory` listens."""
        return self.directory / SOCKET_NAME

    @property
    def inner_socket_path(self) -> Path:
        """Where the service listens when a gate does so at `socket_path` (gate.py); no longer than that."""
        return self.directory / "private" / "s"

    @property
    def inner_hub_path(self) -> Path:
        """Where the hub's service listens, for the port of other nodes (listener.py)."""
        return self.directory / "private" / "h"

    @property
    def owners_path(self) -> Path:
        """Whose each run is, where a group is served."""
        return self.state_directory / OWNERS_NAME

    @property
    def tokens_path(self) -> Path:
        """Which run tokens this agent takes, where others deliver to it."""
        return self.state_directory / TOKENS_NAME

    @property
    def hub_path(self) -> Path:
        """The folder of the key and the certificate that this agent has made for itself."""
        return self.state_directory / HUB_NAME

    @property
    def hub_file_path(self) -> Path:
        """Where ranks learn how other nodes reach this agent."""
        return self.directory / HUB_FILE_NAME

    @property
    def routes_path(self) -> Path:
        """Where the runs go that other agents take."""
        return self.state_directory / ROUTES_NAME

    @property
    def store_path(self) -> Path:
        """The embedded store."""
        return self.state_directory / STORE_NAME

    @property
    def way_path(self) -> Path:
        """The file that says where everything goes that no rank has named a hub for."""
        return self.state_directory / WAY_NAME

    @property
    def policies_path(self) -> Path:
        """What is kept of each rank's points, as ranks have defined it."""
        return self.state_directory / POLICIES_NAME

    @property
    def dead_letters_path(self) -> Path:
        """The folder of what sinks have rejected."""
        return self.state_directory / DEAD_LETTERS_NAME

    @property
    def quarantine_path(self) -> Path:
        """The folder of what cannot be read."""
        return self.state_directory / QUARANTINE_NAME

    @property
    def lock_path(self) -> Path:
        """The file that a running agent holds an flock on; its content is JSON: pid, started_ns, version."""
        return self.directory / LOCK_NAME


def load(
    flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None
) -> tuple[AgentConfig, dict[str, str]]:
    """The configuration in effect, and for each field where its value came from: "flag --spool-bytes",
    "environment TRACKAGENT_SPOOL_BYTES", "file /path" or "default".

    flags: field name → value, None for a flag that was not given. file: the file that the user named; None
    stands for TRACKAGENT_CONFIG, else config.toml in the user's configuration folder where it exists.
    ConfigError names the flag, variable or key that is wrong."""
    values: dict[str, Any] = {
        "directory": default_directory(_without(environ, "TRACKAGENT_DIR")),
        "node": node_name(environ),
    }
    nowhere = ""
    try:
        values["state_directory"] = default_state_directory(_without(environ, "TRACKAGENT_STATE"))
    except ClientConfigError as error:
        nowhere = str(error)
    origins = {field.name: "default" for field in fields(AgentConfig)}
    path = file.absolute() if file is not None else config_file(environ)
    given = {name: value for name, value in flags.items() if value is not None}
    layers: tuple[tuple[Mapping[str, Any], Callable[[str], str]], ...] = (
        (_from_file(path) if path else {}, lambda _: f"file {path}"),
        (_from_environment(environ), lambda name: f"environment {variable(name)}"),
        (given, lambda name: f"flag {flag(name)}"),
    )
    for layer, origin in layers:
        for name, value in layer.items():
            values[name] = _converted(name, value, origin(name))
            origins[name] = origin(name)
    if "state_directory" not in values:
        raise ConfigError(nowhere)
    try:
        return AgentConfig(**values), origins
    except ConfigError as error:
        # The field that is wrong stands first in the message; add who set it.
        where = origins.get(str(error).partition(" ")[0], "default")
        raise ConfigError(f"{error} (from {where})") from None


def variable(name: str) -> str:
    """The environment variable of a field."""
    return {"directory": "TRACKAGENT_DIR", "state_directory": "TRACKAGENT_STATE"}.get(
        name, f"TRACKAGENT_{name.upper()}"
    )


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return {"directory": "--dir", "state_directory": "--state", "linger_s": "--linger"}.get(
        name, f"--{name.replace('_', '-')}"
    )


def loopback_address(text: str) -> tuple[str, int]:
    """IP address and port of HOST:PORT; ValueError says what is wrong, also where others could reach it."""
    import ipaddress  # not needed otherwise

    host, _, port = text.rpartition(":")
    example = "such as 127.0.0.1:9464"
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ValueError(f"give HOST:PORT, {example}")
    try:
        address = ipaddress.ip_address(_LOCALHOST if host == "localhost" else host.strip("[]"))
    except ValueError:
        raise ValueError(f"give an IP address or localhost before the port, {example}") from None
    if not address.is_loopback:
        raise ValueError(
            f"give an address of this node alone, {example}, since what is read there is neither "
            "encrypted nor authenticated; to read it from elsewhere, put a proxy before it that is"
        )
    return str(address), int(port)


def _without(environ: Mapping[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key != name}


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    names = [field.name for field in fields(AgentConfig)]
    return {name: text for name in names if (text := environ.get(variable(name)))}


def _from_file(path: Path) -> dict[str, Any]:
    """The agent's keys; the table [client] is the training processes'."""
    try:
        values = read_config_file(path)
    except ClientConfigError as error:
        raise ConfigError(str(error)) from None
    values.pop("client", None)
    known = [field.name for field in fields(AgentConfig)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)
            raise ConfigError(f"unknown key {key!r} in {path}: did you mean {near[0]}?")
        if key in _FILES and isinstance(values[key], str) and values[key]:
            values[key] = path.parent / Path(values[key]).expanduser()
    return values


def _converted(name: str, value: Any, origin: str) -> Any:
    """`value` in the type of the field `name`; ConfigError names `origin` when it has another. Numbers may
    be texts, except in a file, where TOML has numbers."""
    annotation = str(next(field.type for field in fields(AgentConfig) if field.name == name))
    what, accepted, convert = _KINDS[annotation]
    texts = () if origin.startswith("file ") else (str,)
    try:
        if isinstance(value, bool) or not isinstance(value, (*accepted, *texts)):
            raise ValueError
        return convert(value)
    except ValueError:
        raise ConfigError(f"{name} is {value!r}: give {what} (from {origin})") from None


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        whole = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
    return whole and "@" not in parts.netloc and bool(re.fullmatch(r"https?://[!-~]+", url))


def _path(value: str | Path) -> Path:
    # An empty path would be the current folder, which an unset shell variable does not mean.
    if not str(value):
        raise ValueError
    return Path(value).absolute()


# Relative to the configuration file where that names them.
_FILES = ("token_file", "tls_cert", "tls_key", "tls_ca")
# Annotation of a field → what to call it, the types it may be given in, conversion.
_KINDS: dict[str, tuple[str, tuple[type, ...], Callable[[Any], Any]]] = {
    "Path": ("a path", (str, Path), _path),
    "Path | None": ("a path", (str, Path), _path),
    "int": ("a whole number", (int,), int),
    "float": ("a number", (int, float), float),
    "str": ("a text", (str,), str),
    "str | None": ("a text", (str,), str),
}
