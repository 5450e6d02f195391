"""How ranks that no torch launched agree on a run: in a table of their job at this node's agent (rpc Meet).

The agent keeps the table, for the ranks of its node; one that delivers everything to a hub (`--store`) has
the hub keep it, for the ranks of all nodes. What the job is called comes from the launcher. gRPC is imported
when there is an agent to ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackagent.client import channel, imports
from trackagent.client.broadcast import Link, Store, Unclear
from trackagent.client.config import ClientConfig
from trackagent.client.errors import ConfigError, IdentityError
from trackagent.client.naming import NodeHubs
from trackagent.client.ranks import Ranks, spans_nodes
from trackagent.client.trust import check_socket

if TYPE_CHECKING:
    from trackagent.protos.v1.agent_pb2_grpc import AgentStub

CALL_TIMEOUT_S = 10.0
# The agent's own limit is 250 characters.
MAX_JOB_CHARACTERS = 200
JOB_VARIABLE = "TRACKAGENT_JOB_ID"
# A new one for each mpirun; Open MPI 5, and before.
_OPENMPI = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")


def job_id(environ: Mapping[str, str]) -> str:
    """By which name all ranks of this job, and no other job, can meet; "" where nobody says. A restart that
    keeps it is the next attempt. ConfigError for a name that is too long."""
    if given := environ.get(JOB_VARIABLE, ""):
        if len(given) > MAX_JOB_CHARACTERS or not given.isprintable():
            raise ConfigError(
                f"{JOB_VARIABLE} is {given[:80]!r}: give at most {MAX_JOB_CHARACTERS} printable characters"
            )
        return f"job {given}"
    openmpi = next((f"mpirun {environ[name]}" for name in _OPENMPI if environ.get(name)), "")
    job, step = environ.get("SLURM_JOB_ID"), environ.get("SLURM_STEP_ID")
    slurm = ""
    if job and step:
        slurm = " ".join(
            filter(None, ["slurm", environ.get("SLURM_CLUSTER_NAME"), f"{job}.{step}"])
        )
    # mpirun starts its daemons with srun, and their step reaches the ranks; srun says PMIX_NAMESPACE as well.
    names = (openmpi, slurm) if environ.get("OMPI_COMM_WORLD_RANK") else (slurm, openmpi)
    return next(filter(None, names), "")[:MAX_JOB_CHARACTERS]


def find_meeting(
    config: ClientConfig, ranks: Ranks, environ: Mapping[str, str]
) -> tuple[Link | None, str]:
    """The way to the table of this job's ranks; without one, why."""
    job = job_id(environ)
    if not job:
        return (
            None,
            f"no launcher names the job (set {JOB_VARIABLE} to the same text for every rank)",
        )
    if channel.is_lost():
        return None, "this process was forked from one that had loaded gRPC (start ranks by exec)"
    return MeetLink(config, job, spans_nodes(ranks, environ)), ""


class MeetLink:
    """The table of one job, through the agent at `config.agent`. spans: whether the job's ranks are on more
    than one node, as far as anybody says."""

    standing = True

    def __init__(self, config: ClientConfig, job: str, spans: bool | None) -> None:
        self._config = config
        self._job = job
        self._spans = spans
        self._channel: Any = None
        self.name = f"the agent at {config.agent} (`trackagent start`)"

    def open(self) -> Store | None:
        """IdentityError where the ranks of other nodes cannot come here, or nobody may be asked here."""
        address = self._config.agent
        try:
            check_socket(Path(address.removeprefix("unix:")), self._config.agent_owners())
            offer = NodeHubs(self._config).offer(0.0)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise IdentityError(f"the agent at {address} is not asked: {error.strerror}") from None
        except ConfigError as error:
            raise IdentityError(
                f"the agent at {address} is not asked: its hub.json: {error}"
            ) from None
        if offer is None or channel.is_short_of_descriptors():
            return None
        if not offer.store:
            if self._spans:
                raise IdentityError(
                    "the ranks are on several nodes and have nothing in common by which to agree on a run: "
                    "start every node's agent with `trackagent start --store HOST:PORT`, so that they meet "
                    "at that hub, or start the ranks with torchrun, or set TRACKAGENT_RUN_ID to the same 32 "
                    "hex digits for every rank"
                )
            self.name = (
                f"the agent at {address}, where ranks of this node meet (those of other nodes only where "
                f"every agent has the same --store), in the job {self._job!r}"
            )
        else:
            self.name = f"the agent at {address} and its hub, in the job {self._job!r}"
        with imports.whole():
            from trackagent.protos.v1 import agent_pb2_grpc

            # An agent that is started again is found again at once.
            self._channel = channel.open_channel(
                address, initial_reconnect_backoff_ms=100, min_reconnect_backoff_ms=100,
                max_reconnect_backoff_ms=1000,
            )  # fmt: skip
            return MeetStore(agent_pb2_grpc.AgentStub(self._channel), self._job)

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()


class MeetStore:
    """A table as a Store. Calls are bounded by CALL_TIMEOUT_S, and Unclear where the agent, or its hub, does
    not answer."""

    def __init__(self, stub: AgentStub, job: str) -> None:
        self._stub = stub
        self._job = job

    def add(self, key: str, amount: int, /) -> int:
        value = self._meet("ADD", key, amount=amount)
        return int(value or b"0")

    def set(self, key: str, value: str, /) -> None:
        self._meet("SET", key, value=value.encode())

    def get(self, key: str, /) -> bytes:
        value = self._meet("GET", key)
        if value is None:
            raise Unclear(f"nothing stands at {key}")  # any more
        return value

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        fields = {"expected": expected.encode(), "value": desired.encode()}
        return self._meet("COMPARE_SET", key, **fields) or b""

    def _meet(self, operation: str, key: str, **fields: Any) -> bytes | None:
        """What stands at the key afterwards."""
        import grpc

        from trackagent.protos.v1 import agent_pb2

        request = agent_pb2.MeetRequest(job=self._job, operation=operation, key=key, **fields)
        cut_off = (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.CANCELLED,
        )
        try:
            response = self._stub.Meet(request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            said = error.details() or error.code().name
            if error.code() in cut_off:
                raise Unclear(said) from None
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                said = "it is older than this client: install the same trackagent on both sides"
            raise RuntimeError(said) from None
        except ValueError as error:  # the channel is closed
            raise RuntimeError(str(error)) from None
        return bytes(response.value) if response.found else None
