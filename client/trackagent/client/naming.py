"""Which hub a run has, as far as this node can say: rank 0 names it, by what its agent says in hub.json.

An agent that takes what other nodes forward writes hub.json beside its socket:
{"version": 1, "address": "host:port", "pin": "64 hexadecimal digits", "cluster": true}, the host empty where
it listens at all addresses, cluster false where it has nothing by which agents with `--store` know it; one
that delivers everything to another hub: {"version": 1, "store": true}. The file of an agent that does not
answer at its socket is stale, and not heeded.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trackagent.client.config import ClientConfig
from trackagent.client.errors import ConfigError
from trackagent.client.hub import Hub, new_token
from trackagent.client.ranks import Ranks, spans_nodes
from trackagent.client.segment import HEADER_BYTES, SUFFIX, read_header
from trackagent.client.trust import read_trusted

HUB_FILE_NAME = "hub.json"
MAX_FILE_BYTES = 4096
# How long rank 0 waits for its agent, where the run spans nodes: both may have been started together.
AGENT_GRACE_S = 5.0
POLL_S = 0.05
# Of journals on this node, and of the segments of one.
MAX_JOURNALS = 4096
MAX_SEGMENTS = 64

_WILDCARDS = ("", "0.0.0.0", "[::]")
_UNTIL_THEN = (
    "until then each node's records stay with that node's agent, and `trackagent forward --to` delivers them "
    "later"
)


@dataclass(frozen=True, slots=True)
class Offer:
    """What an agent says of itself: where it takes what others forward, and whether also of agents with
    `--store` (cluster); or that it delivers to a `store` itself."""

    address: str = ""
    pin: str = ""
    store: bool = False
    cluster: bool = False


class NodeHubs:
    """identity.Hubs by the agent and the journals of this node."""

    def __init__(
        self,
        config: ClientConfig,
        *,
        environ: Mapping[str, str] = os.environ,
        host: Callable[[Mapping[str, str]], str] | None = None,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._environ = environ
        self._host = host
        self._sleep = sleep
        self._clock = clock
        self._socket = Path(config.agent.removeprefix("unix:"))

    def name(self, ranks: Ranks) -> tuple[Hub | None, str]:
        """As Hubs.name. Where the run surely spans nodes, it waits up to AGENT_GRACE_S for an agent."""
        spans = spans_nodes(ranks, self._environ)
        if spans is False:
            return None, ""
        try:
            offer = self.offer(AGENT_GRACE_S if spans else 0.0)
            if offer is None and spans:
                return None, (
                    f"the run spans nodes and no agent answers at {self._config.agent}, so it has no hub: "
                    "start rank 0's agent before the ranks, with `trackagent start --listen ADDR`; "
                    f"{_UNTIL_THEN}"
                )
            if offer == Offer() and spans:
                return None, (
                    "the run spans nodes and rank 0's agent takes nothing from the others: start it with "
                    f"`trackagent start --listen ADDR`; {_UNTIL_THEN}"
                )
            if offer is None or not offer.address:
                return None, ""
            return self._hub(offer), ""
        except OSError as error:
            problem = error.strerror or str(error)
        except ConfigError as error:
            problem = str(error)
        path = self._socket.with_name(HUB_FILE_NAME)
        return None, f"the run has no hub: {path} is not heeded ({problem}); {_UNTIL_THEN}"

    def unheard(self, ranks: Ranks) -> str:
        """As Hubs.unheard."""
        if not spans_nodes(ranks, self._environ):
            return ""
        with contextlib.suppress(OSError, ConfigError):
            offer = self.offer(0.0) or Offer()
            # Who gave a hub the cluster's token or CA has agents that deliver there without rank 0's word. Of
            # an agent on another node, which may have the same flags, that says nothing.
            if offer.store or (offer.cluster and ranks.rank == ranks.local_rank):
                return ""
        return (
            "the run spans nodes, and not all of its ranks hear of rank 0's hub: start every agent with "
            "`trackagent start --store HOST:PORT`, or call client.init() after init_process_group(); "
            f"{_UNTIL_THEN}"
        )

    def offer(self, wait_s: float) -> Offer | None:
        """What this node's agent says; None where none answers within `wait_s`. ConfigError or OSError for
        what cannot be believed."""
        deadline = self._clock() + wait_s
        while not _answers(self._socket):
            if self._clock() >= deadline:
                return None
            self._sleep(POLL_S)
        path = self._socket.with_name(HUB_FILE_NAME)
        try:
            return _parsed(read_trusted(path, self._config.agent_owners(), MAX_FILE_BYTES))
        except FileNotFoundError:
            return Offer()

    def of(self, run_id: str) -> Hub | None:
        """The hub that the journals of the run's processes on this node name, those of its last attempt."""
        found: tuple[tuple[int, ...], Hub | None] = ((), None)
        for base in (self._config.directory, self._config.state_directory):
            for identity in _identities(base / "journals"):
                with contextlib.suppress(ConfigError, KeyError, TypeError, ValueError):
                    if identity["run_id"] == run_id:
                        names = ("job_time_ns", "attempt", "start_time_ns")
                        order = tuple(int(identity[name]) for name in names)
                        found = max(
                            found, (order, Hub.parse(identity["hub"])), key=lambda one: one[0]
                        )
        return found[1]

    def _hub(self, offer: Offer) -> Hub:
        host, _, port = offer.address.rpartition(":")
        address = offer.address
        if host in _WILDCARDS:
            from trackagent.client import reach  # for rank 0 alone, as what it imports

            address = reach.joined((self._host or reach.reachable_host)(self._environ), port)
        return Hub(address, offer.pin, new_token())


def _answers(path: Path) -> bool:
    """Whether an agent listens at the socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
        except OSError:
            return False
    return True


def _parsed(data: bytes) -> Offer:
    try:
        said = json.loads(data)
        version = said["version"]
        if version == 1 and said.get("store") is True:
            return Offer(store=True)
        address, pin = (said["address"], said["pin"]) if version == 1 else ("", "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError("it is no JSON of an agent's") from None
    if version != 1:
        raise ConfigError(
            f"its version is {version!r:.20}, not 1: install the same trackagent on both sides"
        )
    host, colon, port = str(address).rpartition(":")
    # As if it were to be named: what is wrong is told before anybody relies on it.
    Hub(f"any{colon}{port}" if host in _WILDCARDS else str(address), str(pin), "0" * 32)
    return Offer(str(address), str(pin), cluster=said.get("cluster") is True)


def _identities(journals: Path) -> Iterator[Mapping[str, Any]]:
    """Of each journal that can be read, who writes it."""
    with contextlib.suppress(OSError):
        for folder in islice(journals.iterdir(), MAX_JOURNALS):
            for path in islice(folder.glob(f"*{SUFFIX}"), MAX_SEGMENTS):
                with contextlib.suppress(OSError, ValueError):
                    header = read_header(_head(path))
                    if header is not None:
                        yield header.identity
                        break


def _head(path: Path) -> bytes:
    """The header's bytes; none of what is no file of this user's."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return b""
        return os.pread(descriptor, HEADER_BYTES, 0)
    finally:
        os.close(descriptor)
