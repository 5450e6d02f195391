"""What an agent with --listen has beside others: a key, tokens, a port for other nodes, and the file in which
the ranks of its node learn how those reach it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sqlite3
import ssl
from functools import partial
from pathlib import Path

import grpc

from trackagent.agent import hubkey, tls
from trackagent.agent.addresses import hub_address, is_wildcard, joined
from trackagent.agent.config import AgentConfig
from trackagent.agent.errors import AgentError
from trackagent.agent.hub import MAX_MESSAGE_BYTES, Hub, Receiving
from trackagent.agent.interceptors import Discreet
from trackagent.agent.listener import Listener, open_port
from trackagent.agent.meeting import Elsewhere, Meetings, Table
from trackagent.agent.refusals import Refusals
from trackagent.agent.server import MAX_CALLS, MAX_METADATA_BYTES
from trackagent.agent.tokens import TokenTable
from trackagent.client.trust import private_folder

logger = logging.getLogger(__name__)

FILE_VERSION = 1
# Connections on which nobody calls are closed after it; who has something to say connects anew.
_IDLE_S = 600
_UNREAD_BYTES = 64 * 1024
# Beside those of the listener: a peer may ask whether a connection still stands.
_PING_S = tls.KEEPALIVE_S // 2


class HubServer:
    """Made before anything is taken: AgentError where the key, the token or the CA's files cannot be used, or
    nothing can listen there.

    pin: who this hub is. tokens: which run tokens are good here."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._token = "" if config.token_file is None else hubkey.read_token(config.token_file)
        if config.tls_cert is not None and config.tls_key is not None:
            key = hubkey.of_files(config.tls_cert, config.tls_key)
        else:
            key = hubkey.own(config.hub_path, config.quarantine_path, self._token)
        self._context: ssl.SSLContext = tls.server_context(key, config.tls_ca)
        self.pin = key.pin
        try:
            self.tokens = TokenTable(config.tokens_path, config.quarantine_path)
        except (OSError, sqlite3.Error) as error:
            raise AgentError(
                f"cannot open {config.tokens_path}, which says who may deliver here: {error}"
            ) from error
        host, port = hub_address(config.listen, anywhere=True)
        try:
            # Whoever comes before it is served waits.
            self._port = open_port(host, port)
        except OSError as error:
            self.tokens.close()
            raise AgentError(
                f"cannot listen at {config.listen}: {error.strerror or error}; give another --listen"
            ) from error
        self._host, port = host, self._port.getsockname()[1]
        # Where it listens, with the port that was free, for people.
        self.address = joined(host or "*", port)
        self._listener: Listener | None = None
        self._server: grpc.aio.Server | None = None
        self._hub: Hub | None = None

    async def start(self, spool: Receiving, table: Table, version: str) -> None:
        """Takes what other nodes forward into the spool. AgentError where it cannot listen."""
        config, refusals = self._config, Refusals()
        inner = config.inner_hub_path
        self._listener = Listener(
            self._port, inner, self._context, refusals, max_connections=config.max_streams
        )
        self._hub = Hub(
            spool,
            self.tokens,
            table,
            refusals,
            self._listener.peer,
            welcome=self._listener.welcome,
            connected=self._listener.hosts,
            cluster_token=self._token,
            version=version,
        )
        try:
            private_folder(inner.parent)
            inner.unlink(missing_ok=True)
            self._server = await _served(self._hub, inner)
        except OSError as error:
            raise AgentError(f"{error}; give another --dir") from error
        self._listener.start()
        if config.store:  # what comes here goes there
            say(config, store=True)
        else:
            address = joined(*_advertised(config, self._host, self._port.getsockname()[1]))
            say(config, address=address, pin=self.pin, cluster=config.has_credentials)
        logger.info("other nodes may deliver at %s (pin %s)", self.address, self.pin)

    async def stop(self, grace_s: float) -> None:
        """Takes no more; calls under way have grace_s to end."""
        if self._server is not None:
            forget(self._config)
            await self._server.stop(grace_s)
        if self._listener is not None:
            await self._listener.stop()
        if self._hub is not None:
            self._hub.close()

    def close(self) -> None:
        self._port.close()
        self.tokens.close()


def say(config: AgentConfig, **said: object) -> None:
    """Writes hub.json for the ranks of this node. The whole of it or nothing; no token stands there."""
    path = config.hub_file_path
    new = path.with_suffix(".new")
    try:
        new.unlink(missing_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "w") as file:
            file.write(json.dumps({"version": FILE_VERSION, **said}) + "\n")
        if config.group is not None:
            shutil.chown(new, group=config.group)
            new.chmod(0o640)
        new.rename(path)
    except (OSError, LookupError) as error:
        raise AgentError(
            f"cannot write {path}, in which ranks look for the hub: {error}"
        ) from error


def table_of(config: AgentConfig) -> Table:
    """Where the ranks of this node meet: here, or at the hub that everything is delivered to. BadKey."""
    if config.store:
        return Elsewhere(partial(tls.store_channel, config), tls.bearer(config))
    return Meetings()


def forget(config: AgentConfig) -> None:
    """Removes what an agent of this folder has said about a hub: none takes anything there any more."""
    with contextlib.suppress(OSError):
        config.hub_file_path.unlink(missing_ok=True)


def _advertised(config: AgentConfig, host: str, port: int) -> tuple[str, int]:
    """Where others find this agent; the host is "" where that is not clear."""
    if config.advertise:
        return hub_address(config.advertise, default_port=port)
    return "" if is_wildcard(host) else host, port


async def _served(hub: Hub, path: Path) -> grpc.aio.Server:
    server = grpc.aio.server(
        interceptors=[Discreet()],
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_concurrent_streams", MAX_CALLS),
            # Of a call that is not read yet gRPC takes no more than this; left alone, it would estimate how
            # much a fast network carries, which may be a whole message.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", _UNREAD_BYTES),
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.max_connection_idle_ms", _IDLE_S * 1000),
            ("grpc.http2.min_ping_interval_without_data_ms", _PING_S * 1000),
        ],
    )
    # Nothing else: what a service of gRPC's own is sent would be read whole, whoever sends it.
    server.add_generic_rpc_handlers((hub.handler(),))
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise OSError(f"cannot listen at unix:{path}: {error}") from error
    await server.start()
    return server
