"""What a training process can set, and the one place in this package that reads settings from the
environment and the configuration file (identity.py reads which run and attempt this is).

The agent uses the same folders and takes their defaults from here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trackagent.client.errors import ConfigError

SOCKET_NAME = "agent.sock"
# sun_path holds 108 bytes with the closing zero (unix(7)).
MAX_SOCKET_PATH_BYTES = 107


def default_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of socket and journals: TRACKAGENT_DIR, or one of this user's in memory
    (/dev/shm), or, where that does not exist, in the system's folder for temporary files."""
    if chosen := environ.get("TRACKAGENT_DIR"):
        return Path(chosen).absolute()
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK):
        base = memory
    else:
        import tempfile  # rarely needed, and slow to import

        base = Path(tempfile.gettempdir())
    return base / f"trackagent-{os.getuid()}"


def default_state_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder on disk of overflow journals, spool, store and artifacts: TRACKAGENT_STATE, or trackagent in
    XDG_STATE_HOME, or ~/.local/state/trackagent."""
    if chosen := environ.get("TRACKAGENT_STATE"):
        return Path(chosen).absolute()
    base = environ.get("XDG_STATE_HOME")
    return (Path(base) if base else _home(environ) / ".local" / "state") / "trackagent"


def _home(environ: Mapping[str, str]) -> Path:
    if home := environ.get("HOME"):
        return Path(home)
    try:
        return Path.home()
    except RuntimeError:  # a user id that nobody has heard of, as in some containers
        raise ConfigError("there is no home folder: set TRACKAGENT_STATE, or HOME") from None


def socket_address(directory: Path) -> str:
    """The gRPC address of the agent that serves `directory`. ConfigError when the path is too long
    for a socket."""
    address = f"unix:{directory / SOCKET_NAME}"
    _check_socket_path(address)
    return address


def _check_socket_path(address: str) -> None:
    path = address.removeprefix("unix:")
    length = len(os.fsencode(path))
    if address.startswith("unix:") and length > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"the socket path {path} has {length} bytes, the system allows "
            f"{MAX_SOCKET_PATH_BYTES}: set TRACKAGENT_DIR to a shorter folder"
        )


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """Checked at construction, without touching files or network."""

    directory: Path
    """Folder of the agent's socket and of the journals; in memory."""

    state_directory: Path
    """Folder on a local disk, for journal segments when `directory` is full."""

    agent: str
    """gRPC address of the agent's socket: unix:/path."""

    agent_user: str = ""
    """User whose agent is trusted beside this user's own and root's: a name or a number; empty: nobody."""

    segment_bytes: int = 1024 * 1024
    """Size of a journal segment file."""

    memory_bytes: int = 64 * 1024 * 1024
    """Journal bytes kept in `directory` for one producer before the next segments go to `state_directory`."""

    journal_bytes: int = 4 * 1024 * 1024 * 1024
    """Journal bytes kept for one producer in all; what is logged beyond it is refused and counted."""

    flush_interval_s: float = 0.175
    """How long a record may wait before it is sent."""

    exit_timeout_s: float = 10.0
    """How long finish() and interpreter exit wait for the agent."""

    identity_timeout_s: float = 300.0
    """How long init() waits for rank 0's word."""

    def __post_init__(self) -> None:
        if not 64 * 1024 <= self.segment_bytes <= 64 * 1024 * 1024 or self.segment_bytes % 4096:
            raise ConfigError(
                f"segment_bytes is {self.segment_bytes}: give a multiple of 4096 from 65536 to 67108864"
            )
        if self.journal_bytes < 4 * self.segment_bytes:
            raise ConfigError(
                f"journal_bytes is {self.journal_bytes}: give at least 4 segments, {4 * self.segment_bytes}"
            )
        if not str(self.agent).startswith("unix:/"):
            raise ConfigError(f"agent is {self.agent!r}: give the agent's socket, unix:/path")
        _check_socket_path(self.agent)
        for name in ("flush_interval_s", "exit_timeout_s", "identity_timeout_s"):
            if not 0 < getattr(self, name) < 86_400:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}: give seconds between 0 and 86400"
                )

    def agent_owners(self) -> frozenset[int]:
        """The ids of the users whose agent is trusted beside this user's own and root's. ConfigError when the
        system does not know them."""
        if not self.agent_user:
            return frozenset()
        if self.agent_user.isdecimal():
            return frozenset([int(self.agent_user)])
        import pwd  # rarely needed

        try:
            return frozenset([pwd.getpwnam(self.agent_user).pw_uid])
        except KeyError:
            raise ConfigError(
                f"agent_user is {self.agent_user!r}, whom this system does not know: give the name or number "
                "of the user who runs the agent (TRACKAGENT_AGENT_USER)"
            ) from None

    @classmethod
    def load(
        cls, *, agent: str | None = None, environ: Mapping[str, str] = os.environ
    ) -> ClientConfig:
        """What is in effect: first found of `agent`, the environment, the configuration file, the default.

        The environment: TRACKAGENT_DIR, TRACKAGENT_STATE, and for the other fields TRACKAGENT_<FIELD IN
        CAPITALS>. The file (see `config_file`): `directory` and `state_directory`, which the agent takes
        too, and the other fields in its table [client]. ConfigError names the variable or key that is
        wrong.
        """
        path = config_file(environ)
        file = read_config_file(path) if path else {}
        table = file.get("client", {})
        settings = [field for field in fields(cls) if field.name not in FOLDERS]
        if not isinstance(table, Mapping):
            raise ConfigError(f"{path}: client is no table: write [client] above its keys")
        if unknown := table.keys() - {field.name for field in settings}:
            raise ConfigError(f"{path}: [client] has the unknown key {min(unknown)!r}")
        values: dict[str, Any] = {}
        for field in settings:
            variable = f"TRACKAGENT_{field.name.upper()}"
            if text := environ.get(variable):
                values[field.name] = _number(text, field.type, variable)
            elif field.name in table:
                values[field.name] = _number(table[field.name], field.type, f"{path}: {field.name}")
        values["directory"] = default_directory(environ)
        values["state_directory"] = default_state_directory(environ)
        for name, variable in FOLDERS.items():
            if name in file and not environ.get(variable):
                values[name] = file[name]
        if agent:
            values["agent"] = agent
        values.setdefault("agent", socket_address(values["directory"]))
        return cls(**values)


# The fields that agent and client share, and their variables.
FOLDERS = {"directory": "TRACKAGENT_DIR", "state_directory": "TRACKAGENT_STATE"}


def config_file(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The configuration file that TRACKAGENT_CONFIG names, or else trackagent/config.toml in the user's
    folder for configurations where it exists, or None.
    """
    if named := environ.get("TRACKAGENT_CONFIG"):
        return Path(named).absolute()
    base = environ.get("XDG_CONFIG_HOME")
    try:
        folder = Path(base) if base else _home(environ) / ".config"
    except ConfigError:
        return None
    path = folder / "trackagent" / "config.toml"
    return path if path.is_file() else None


def read_config_file(path: Path) -> dict[str, Any]:
    """The TOML file's content, its folders as paths: a relative one is meant from where the file lies.

    ConfigError when it cannot be read or is no TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        problem = error.strerror.lower() if error.strerror else str(error)
        raise ConfigError(f"cannot read the configuration file {path}: {problem}") from None
    except ValueError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from None
    for name in FOLDERS.keys() & values.keys():
        if not isinstance(values[name], str) or not values[name]:
            raise ConfigError(f"{name} is {values[name]!r}: give a path (from file {path})")
        values[name] = (path.parent / Path(values[name]).expanduser()).absolute()
    return values


def _number(value: Any, wanted: Any, where: str) -> Any:
    """`value` as the type a field is annotated with."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return {"int": int, "float": float, "str": str}[wanted](value)
    except (ValueError, TypeError):
        raise ConfigError(f"{where} is {value!r}: give a number") from None
