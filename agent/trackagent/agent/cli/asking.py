"""Asking whether an agent runs: by its lock, without waiting, and by its own word over the socket."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trackagent.agent.cli import NothingThere
from trackagent.agent.config import AgentConfig
from trackagent.agent.errors import AgentError

if TYPE_CHECKING:
    from trackagent.protos.v1.agent_pb2 import StatusResponse

STATUS_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the lock of a folder, as the lock file says; pid 0 while it is still being written."""

    pid: int
    started_ns: int
    version: str


def lock_holder(config: AgentConfig) -> Holder | None:
    """The agent that holds the lock of config.directory; None when none does."""
    try:
        descriptor = os.open(config.lock_path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AgentError(
            f"cannot read the agent's lock {config.lock_path}: {error.strerror}; "
            "ask as the user who runs the agent"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _parsed(os.read(descriptor, 4096))
    finally:
        # Gives a lock that was free back at once.
        os.close(descriptor)


def _parsed(content: bytes) -> Holder:
    try:
        said = json.loads(content)
        return Holder(int(said["pid"]), int(said["started_ns"]), str(said["version"]))
    except (ValueError, KeyError, TypeError):
        return Holder(0, 0, "")


def ask_status(config: AgentConfig, timeout_s: float = STATUS_TIMEOUT_S) -> StatusResponse:
    """What the agent of config.directory says about itself. NothingThere when none listens; AgentError when
    one does but refuses or takes longer than `timeout_s`."""
    # Imported here: the commands that only read the lock do without grpc.
    import grpc

    from trackagent.protos.v1 import agent_pb2, agent_pb2_grpc

    path = config.socket_path
    if not path.exists():
        raise _none_runs(config)
    options = [("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]
    with grpc.insecure_channel(f"unix:{path}", options=options) as channel:
        try:
            stub = agent_pb2_grpc.AgentStub(channel)
            answer: StatusResponse = stub.Status(agent_pb2.StatusRequest(), timeout=timeout_s)
            return answer
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        raise AgentError(f"the agent at {path} did not answer within {timeout_s:g} s; see its log")
    if code != grpc.StatusCode.UNAVAILABLE:
        raise AgentError(f"the agent at {path} refused to answer: {code.name}: {details}")
    if not os.access(path, os.R_OK | os.W_OK):
        raise AgentError(f"may not use the socket {path}: ask as the user who runs the agent")
    raise _none_runs(config)


def _none_runs(config: AgentConfig) -> NothingThere:
    return NothingThere(f"no agent runs for {config.directory}: start one with `trackagent start`")
