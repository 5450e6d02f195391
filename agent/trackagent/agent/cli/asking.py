"""Asking whether an agent runs: by its lock, without waiting, and by its own word over the socket."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from trackagent.agent.cli import NothingThere
from trackagent.agent.cli.options import is_there
from trackagent.agent.config import LOCK_NAME, AgentConfig
from trackagent.agent.errors import AgentError

if TYPE_CHECKING:
    from trackagent.protos.v1.agent_pb2 import NodeResponse, StatusResponse
    from trackagent.protos.v1.agent_pb2_grpc import AgentStub

Answer = TypeVar("Answer")

STATUS_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the lock at `path`, as that file says; pid 0 while it does not."""

    path: Path
    pid: int
    started_ns: int
    version: str
    directory: str
    """TRACKAGENT_DIR of that agent."""


def lock_holder(config: AgentConfig) -> Holder | None:
    """The agent of config.directory; None when none runs.

    The lock of the state folder is asked too: that of the folder in memory may be gone under a running
    agent, or have found no room for what it says."""
    holder = _holder(config.lock_path)
    if holder is not None and holder.pid:
        return holder
    other = state_holder(config)
    if other is not None and other.directory == str(config.directory):
        return other
    return holder


def state_holder(config: AgentConfig) -> Holder | None:
    """The agent that uses the state folder, of whatever folder in memory; None when none does."""
    return _holder(config.state_directory / LOCK_NAME)


def _holder(path: Path) -> Holder | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise AgentError(
            f"cannot read the agent's lock {path}: {error.strerror}; "
            "ask as the user who runs the agent"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _parsed(path, os.read(descriptor, 4096))
    finally:
        # Gives a lock that was free back at once.
        os.close(descriptor)


def _parsed(path: Path, content: bytes) -> Holder:
    try:
        said = json.loads(content)
        return Holder(
            path,
            int(said["pid"]),
            int(said["started_ns"]),
            str(said["version"]),
            str(said.get("directory", "")),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return Holder(path, 0, 0, "", "")


def ask_status(config: AgentConfig, timeout_s: float = STATUS_TIMEOUT_S) -> StatusResponse:
    """What the agent of config.directory says about itself. NothingThere when none listens; AgentError when
    one does but refuses or takes longer than `timeout_s`."""
    from trackagent.protos.v1 import agent_pb2

    def ask(stub: AgentStub) -> StatusResponse:
        answer: StatusResponse = stub.Status(agent_pb2.StatusRequest(), timeout=timeout_s)
        return answer

    return _asked(config, timeout_s, ask)


def ask_node(config: AgentConfig, timeout_s: float = STATUS_TIMEOUT_S) -> NodeResponse:
    """What the agent of config.directory says about its node. Errors as of ask_status."""
    from trackagent.protos.v1 import agent_pb2

    def ask(stub: AgentStub) -> NodeResponse:
        answer: NodeResponse = stub.Node(agent_pb2.NodeRequest(), timeout=timeout_s)
        return answer

    return _asked(config, timeout_s, ask)


def _asked(config: AgentConfig, timeout_s: float, ask: Callable[[AgentStub], Answer]) -> Answer:
    # Imported here: the commands that only read the lock do without grpc.
    import grpc

    from trackagent.protos.v1 import agent_pb2_grpc

    path = config.socket_path
    if not is_there(path):
        raise _none_runs(config)
    options = [("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]
    with grpc.insecure_channel(f"unix:{path}", options=options) as channel:
        try:
            return ask(agent_pb2_grpc.AgentStub(channel))
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        raise AgentError(f"the agent at {path} did not answer within {timeout_s:g} s; see its log")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        raise AgentError(
            f"the agent at {path} is older than this command: stop it and start it again"
        )
    if code != grpc.StatusCode.UNAVAILABLE:
        raise AgentError(f"the agent at {path} refused to answer: {code.name}: {details}")
    if not os.access(path, os.R_OK | os.W_OK):
        raise AgentError(f"may not use the socket {path}: ask as the user who runs the agent")
    raise _none_runs(config)


def _none_runs(config: AgentConfig) -> NothingThere:
    holder = lock_holder(config)
    if holder is not None and holder.pid:
        return NothingThere(
            f"the agent (pid {holder.pid}) runs and does not listen at {config.socket_path}: it is starting, "
            "stopping, or its folder was deleted; ask again in a few seconds, or see its log"
        )
    return NothingThere(f"no agent runs for {config.directory}: start one with `trackagent start`")
