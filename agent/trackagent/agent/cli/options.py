"""Options that several commands share, and what they stand for: a configuration, an open store."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from trackagent.agent.cli import NothingThere
from trackagent.agent.config import AgentConfig, flag, load
from trackagent.agent.errors import AgentError

if TYPE_CHECKING:
    from trackagent.agent.store.contract import Reader

# A year: more than any --timeout means.
MOST_SECONDS = 365 * 86_400

Command = TypeVar("Command", bound=Callable[..., Any])

# Field of AgentConfig → what `start`, `run` and `config` show of its option: the value, and its meaning. The
# webhook may be a secret, which process lists would show: it is given in the environment or the file.
FLAGS = {
    "spool_bytes": ("BYTES", "Cap of the spool."),
    "dead_letter_bytes": ("BYTES", "Cap of what sinks have rejected."),
    "quarantine_bytes": ("BYTES", "Cap of damaged files set aside."),
    "uncommitted_bytes": ("BYTES", "Cap of what awaits its commit in memory."),
    "max_batch_bytes": ("BYTES", "Largest piece that a rank may send."),
    "max_streams": ("N", "Ranks connected at once."),
    "group": ("NAME", "Unix group that may use the socket too."),
    "deliver_interval_s": ("SECONDS", "How long a record may wait."),
    "drain_timeout_s": ("SECONDS", "How long to deliver after being told to stop."),
    "gone_after_s": ("SECONDS", "When a rank without a trace is killed."),
    "listen": ("HOST:PORT", "Where other nodes may deliver, over TLS."),
    "advertise": ("HOST[:PORT]", "Under which they reach it."),
    "store": ("HOST:PORT", "Hub that everything is delivered to."),
    "token_file": ("FILE", "The cluster's token (mode 0600)."),
    "tls_cert": ("FILE", "Certificate by the cluster's CA (PEM)."),
    "tls_key": ("FILE", "Its key."),
    "tls_ca": ("FILE", "The CA's certificates."),
    "forward_interval_s": ("SECONDS", "How long a record may wait to be forwarded."),
    "keep_all_ranks": ("N", "Runs of so many ranks keep all points."),
    "keep_node_ranks": ("N", "Runs of so many ranks keep nodes' reductions."),
    "linger_s": ("SECONDS", "How long to wait for other nodes at the end."),
    "node": ("NAME", "Name of this node."),
    "collect": ("NAMES", "What to sample: all, none, or names."),
    "sample_interval_s": ("SECONDS", "How often to sample."),
    "prometheus": ("HOST:PORT", "Where Prometheus may read, such as 127.0.0.1:9464."),
    "health": ("RULES", "What to tell of: all, none, or rules."),
    "hang_s": ("SECONDS", "How long no step may move."),
    "hang_steps": ("N", "And so many of the longest recent step."),
    "straggler_ratio": ("RATIO", "Fastest rank's time by its own."),
    "waiting_timers": ("PATTERNS", "Phases of waiting for others."),
    "spike_keys": ("PATTERNS", "Metrics looked at for spikes."),
    "spike_factor": ("N", "So many medians are a spike."),
    "spike_window": ("N", "Values of the median."),
    "spike_patience": ("N", "High values in a row."),
    "finite_keys": ("PATTERNS", "Metrics that are to be finite."),
    "memory_warning": ("PART", "Of memory in use: a warning."),
    "memory_error": ("PART", "Of memory in use: an error."),
    "disk_error": ("PART", "Of a file system in use."),
    "busy_percent": ("PERCENT", "GPUs that are busy."),
    "throttled_s": ("SECONDS", "How long one may be throttled."),
    "silent_s": ("SECONDS", "How long nothing may come of a node."),
    "hook_command": ("COMMAND", "Run at each event."),
    "hook_interval_s": ("SECONDS", "Between messages, after the first few."),
    "log_level": ("LEVEL", "debug, info, warning or error."),
}


class Seconds(click.FloatRange):
    """A length of time. Refuses what a range lets pass and no clock can wait for: NaN, infinity, ages."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds: float = super().convert(value, param, ctx)
        # Written so that NaN is refused too.
        if not seconds <= MOST_SECONDS:
            self.fail(f"{value} is not a number of seconds up to {MOST_SECONDS}", param, ctx)
        return seconds


def configured(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --dir, --state and --config, and passes the configuration in effect as `config`."""

    @click.option("--dir", "directory", metavar="DIR", help="Folder of socket and journals.")
    @click.option("--state", "state_directory", metavar="DIR", help="Folder of spool and store.")
    @click.option("--config", "file", metavar="FILE", type=Path, help="Configuration file (TOML).")
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        directory: str | None,
        state_directory: str | None,
        file: Path | None,
        **rest: Any,
    ) -> Any:
        flags = {name: rest.pop(name) for name in list(rest) if name in FLAGS}
        flags |= {"directory": directory, "state_directory": state_directory}
        config, origins = load(flags, os.environ, file)
        context = click.get_current_context()
        context.obj = {"origins": origins, "flags": flags, "file": file}
        return command(*args, config=config, **rest)

    return wrapped


def agent_flags(command: Command) -> Command:
    """Adds a flag for every other setting of the agent but the webhook; stands below `configured`."""
    for name, (metavar, meaning) in reversed(FLAGS.items()):
        command = click.option(flag(name), name, metavar=metavar, help=meaning)(command)
    return command


def is_there(path: Path) -> bool:
    """Whether there is anything at `path`. AgentError where this user may not know."""
    try:
        path.stat()
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:
        raise AgentError(
            f"may not look for {path}: ask as the user who runs the agent, or name other folders with "
            "--dir and --state"
        ) from None


def json_option(command: Command) -> Command:
    """Adds --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


@contextmanager
def opened_store(config: AgentConfig) -> Iterator[Reader]:
    """The store of `config` for reading. NothingThere where nothing was stored yet, or for what is asked
    inside and not found; AgentError when the store cannot be read."""
    if not is_there(config.store_path):
        raise NothingThere(
            f"no store in {config.state_directory}: nothing was logged yet, or it lies elsewhere "
            "(--state, TRACKAGENT_STATE)"
        )
    # Not at the top: numpy, which most commands that open no store can do without.
    from trackagent.agent.store import open_reader
    from trackagent.agent.store.contract import NotFound, StoreError

    try:
        reader = open_reader(config.store_path)
        try:
            yield reader
        finally:
            reader.close()
    except NotFound as error:
        raise NothingThere(str(error)) from None
    except StoreError as error:
        raise AgentError(str(error)) from None
