"""The sender: brings what the journal holds to the agent, beside the training loop.

One daemon thread pumps published bytes, as they are, into a gRPC stream, prepares what log calls
will need next, and connects again, for ever, when the stream breaks. A second one, for as long as a
stream lasts, reads the acknowledgements. gRPC is imported here, on the sender's thread, at the
first connection.

Everything is at-least-once: after a break the agent says what it has, and the rest is sent again.
"""

from __future__ import annotations

import logging
import random
import resource
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from trackagent.client import channel, imports
from trackagent.client.config import ClientConfig
from trackagent.client.hub import Hub
from trackagent.client.journal import Journal
from trackagent.client.trust import check_socket

if TYPE_CHECKING:
    from trackagent.protos.v1 import agent_pb2

logger = logging.getLogger("trackagent")

PROTOCOL_VERSION = 1
# In the metadata of a Push call: the id of the producer whose stream it is.
PRODUCER_KEY = "trackagent-producer-bin"
MAX_IN_FLIGHT_BYTES = 16 * 1024 * 1024
MAX_SCHEMAS_BYTES = 1024 * 1024
CALL_TIMEOUT_S = 10.0
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0
# An agent may start a moment after the ranks: no reason to warn.
GRACE_S = 5.0


class Sender:
    """Delivers one journal to one agent.

    `housekeep` is called on the sender's thread every flush interval. `wake` never blocks and may
    be called from anywhere, signal handlers included; the rest is for the thread that owns the run.
    """

    def __init__(
        self, producer: Mapping[str, Any], config: ClientConfig, housekeep: Callable[[], None]
    ) -> None:
        self._producer = producer
        self._config = config
        self._agent_owners = config.agent_owners()
        self._housekeep = housekeep
        self._journal: Journal
        self._awake = threading.Lock()
        self._awake.acquire()
        # Between the sender's two threads; no log call ever takes it.
        self._turn = threading.Lock()
        self._draining = False
        self._stopping = False
        self._given_up = False
        self.ended = (
            False  # by the agent's word: it knows that the producer has ended, and has everything
        )
        self._done = threading.Event()
        self._stream: _Stream | None = None
        self._started = time.monotonic()
        self._warned = ""
        self._backoff_s = 0.0
        self._next_attempt = 0.0
        self._thread = threading.Thread(target=self._run, name="trackagent-sender", daemon=True)

    def start(self, journal: Journal) -> None:
        """Begins to deliver `journal`."""
        self._journal = journal
        self._thread.start()

    def wake(self) -> None:
        """Makes the sender look at the journal now."""
        # A raw lock as a binary semaphore: releasing it is one atomic call, so it may interrupt itself.
        try:
            self._awake.release()
        except RuntimeError:
            pass  # awake already

    def drain(self, deadline: float) -> bool:
        """Delivers what is published, until time.monotonic() is `deadline` or no agent answers, then stops.

        Returns whether all was acknowledged.
        """
        self._draining = True
        self._next_attempt = 0.0
        self.wake()
        self._done.wait(max(0.0, deadline - time.monotonic()))
        self._stopping = True
        self.wake()
        self._thread.join(max(0.2, min(1.0, deadline - time.monotonic())))
        places = self._journal.places()  # first: the thread may still be at work
        delivered = self._journal.delivered
        if not delivered:
            logger.warning(
                "not everything was delivered before the end: the rest is kept in %s and delivered by the "
                "next agent on this node (`trackagent start`)",
                " and ".join(map(str, places)),
            )
        return delivered

    # --- the sender's thread

    def _run(self) -> None:
        while not self._stopping:
            # Until woken, or the next multiple of the interval. All ranks of a node thus send at the same
            # moments: the agent commits them together, and what they take from training they take at once.
            interval_s = self._config.flush_interval_s
            self._awake.acquire(timeout=interval_s - time.time() % interval_s)
            try:
                self._journal.prepare()
                self._housekeep()
                if self._stream is not None and self._stream.broken:
                    # An agent that takes nothing is not to be asked again and again.
                    self._back_off(fresh=self._stream.progressed)
                    self._close_stream()
                due = self._stream is None and time.monotonic() >= self._next_attempt
                if due and not self._connect():
                    self._back_off()
                if self._stream is not None:
                    self._pump(self._stream)
            except Exception as error:  # noqa: BLE001 - the sender retries for ever
                # Whatever it was, the journal has the data; a new stream starts from what the agent knows.
                self._warn(f"sending failed ({error!r}); trying again")
                self._close_stream()
                self._back_off()
            ending = self._draining and not self._done.is_set()
            if ending and (self._given_up or self._finished()):
                self._done.set()
        self._close_stream()

    def _back_off(self, *, fresh: bool = False) -> None:
        """Puts the next attempt off, each time for longer; `fresh`: not at all, things went well."""
        longest = FIRST_BACKOFF_S if self._draining else MAX_BACKOFF_S
        self._backoff_s = 0.0 if fresh else min(max(2 * self._backoff_s, FIRST_BACKOFF_S), longest)
        self._next_attempt = time.monotonic() + self._backoff_s * random.uniform(0.5, 1.0)

    def _finished(self) -> bool:
        with self._turn:
            if not self._journal.delivered or self._stream is None:
                return self._journal.delivered
            answer = self._stream.close_run(self._journal.ends())
            self.ended = answer is True
            return answer is not False

    def _connect(self) -> bool:
        """Opens a stream; False, and a warning at the first time, when no agent answers."""
        address = self._config.agent
        try:
            check_socket(Path(address.removeprefix("unix:")), self._agent_owners)
        except FileNotFoundError:
            return self._nobody_answers(f"no agent listens at {address}")
        except OSError as error:
            self._warn(
                f"nothing is sent to {address}: {error.strerror}; records are kept in "
                f"{self._config.directory} or {self._config.state_directory} (if it is the agent of a user "
                "whom you trust: name them in TRACKAGENT_AGENT_USER)"
            )
            self._given_up = self._draining
            return False
        if channel.is_short_of_descriptors():
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            self._warn(
                f"nothing is sent to {address}: of the {limit} files that this process may have open, "
                f"fewer than {channel.NEEDED_DESCRIPTORS} are left (raise `ulimit -n`); it is tried again, "
                f"and records are kept in {self._config.directory} or {self._config.state_directory}"
            )
            self._given_up = self._draining
            return False
        with imports.whole():
            grpc = channel.grpc_module()
            # Which imports the protocol, and grpc the rest of itself.
            stream = _Stream(address, self._producer, self._acknowledged, self.wake)
        try:
            with self._turn:
                schemas = self._journal.schemas(MAX_SCHEMAS_BYTES)
                committed = stream.open(self._journal.held(), schemas)
                self._journal.rewind(committed)
        except grpc.RpcError as error:
            stream.close()
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return self._nobody_answers(f"no agent answers at {address}")
            self._warn(f"the agent at {address} refuses this process: {error.details()}")
            self._given_up = self._draining
            return False
        except BaseException:
            stream.close()
            raise
        self._stream = stream
        return True

    def _nobody_answers(self, problem: str) -> bool:
        if self._draining:
            self._given_up = True
        elif time.monotonic() - self._started > GRACE_S:
            self._warn(
                f"{problem}: records are kept in {self._config.directory} and delivered when one starts; "
                "run `trackagent start` on this node"
            )
        return False

    def _pump(self, stream: _Stream) -> None:
        with self._turn:
            if self._journal.in_flight >= MAX_IN_FLIGHT_BYTES:
                return
            for batch in self._journal.unsent(stream.max_batch_bytes):
                stream.push(batch.lane, batch.first_offset, batch.journal_bytes)
                if self._journal.in_flight >= MAX_IN_FLIGHT_BYTES:
                    break

    def _acknowledged(self, stream: _Stream, lane: int, offset: int) -> None:
        """On the stream's reader thread."""
        with self._turn:
            if stream is self._stream:
                self._journal.acknowledge(lane, offset)
                stream.progressed = True
                self._warned = ""
                more = self._draining or self._journal.in_flight >= MAX_IN_FLIGHT_BYTES // 2
            else:
                more = False
        if more:
            self.wake()

    def _close_stream(self) -> None:
        with self._turn:
            stream, self._stream = self._stream, None
        if stream is not None:
            if stream.problem:
                self._warn(f"the agent ended the connection: {stream.problem}")
            stream.close()

    def _warn(self, message: str) -> None:
        """Once until the next success or another problem."""
        if message != self._warned:
            self._warned = message
            logger.warning("%s", message)


class _Stream:
    """One connection: OpenRun, then Push until it breaks."""

    def __init__(
        self,
        address: str,
        producer: Mapping[str, Any],
        acknowledged: Callable[[_Stream, int, int], None],
        wake: Callable[[], None],
    ) -> None:

        from trackagent.protos.v1 import agent_pb2, agent_pb2_grpc

        self._pb = agent_pb2
        self._producer_id = bytes.fromhex(producer["producer_id"])
        self._producer = producer
        self._acknowledged = acknowledged
        self._wake = wake
        self._requests: SimpleQueue[agent_pb2.PushRequest | None] = SimpleQueue()
        self._reader: threading.Thread | None = None
        self.max_batch_bytes = 0
        self.broken = False
        self.progressed = False
        self.problem = ""
        self._channel = channel.open_channel(address)
        self._stub = agent_pb2_grpc.AgentStub(self._channel)

    def open(self, held: Mapping[int, int], schemas: Sequence[bytes]) -> dict[int, int]:
        """Announces the producer; what the agent has, by lane. grpc.RpcError when it does not
        answer or refuses."""
        fields = dict(self._producer, producer_id=self._producer_id)
        hub = None
        if "hub" in fields:
            named = Hub.parse(fields.pop("hub"))
            hub = self._pb.HubAddress(address=named.address, pin=named.pin, token=named.token)
        response = self._stub.OpenRun(
            self._pb.OpenRunRequest(
                protocol_version=PROTOCOL_VERSION,
                producer=self._pb.Producer(**fields),
                held=self._offsets(held),
                schemas=schemas,
                hub=hub,
            ),
            timeout=CALL_TIMEOUT_S,
        )
        self.max_batch_bytes = response.max_batch_bytes
        # Said at once: a rank that logs nothing for hours is connected too.
        who = ((PRODUCER_KEY, self._producer_id),)
        responses = self._stub.Push(iter(self._requests.get, None), metadata=who)
        self._reader = threading.Thread(
            target=self._read, args=(responses,), name="trackagent-acknowledgements", daemon=True
        )
        self._reader.start()
        return {known.lane: known.offset for known in response.committed}

    def push(self, lane: int, first_offset: int, journal_bytes: bytes) -> None:
        """Queues a batch; the stream takes what it can."""
        self._requests.put(
            self._pb.PushRequest(
                producer_id=self._producer_id,
                lane=lane,
                first_offset=first_offset,
                journal_bytes=journal_bytes,
            )
        )

    def close_run(self, ends: Mapping[int, int]) -> bool | None:
        """Tells the agent that the producer is done; whether it has everything, None without an answer."""
        import grpc

        request = self._pb.CloseRunRequest(producer_id=self._producer_id, ends=self._offsets(ends))
        try:
            return bool(self._stub.CloseRun(request, timeout=CALL_TIMEOUT_S).complete)
        except grpc.RpcError:
            return None

    def close(self) -> None:
        self._requests.put(None)
        self._channel.close()
        if self._reader is not None:
            self._reader.join(1.0)

    def _read(self, responses: Any) -> None:
        import grpc

        try:
            for response in responses:
                self._acknowledged(self, response.lane, response.offset)
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                self.problem = error.details() or str(error.code())
        finally:
            self.broken = True
            self._wake()

    def _offsets(self, offsets: Mapping[int, int]) -> list[agent_pb2.LaneOffset]:
        return [self._pb.LaneOffset(lane=lane, offset=offset) for lane, offset in offsets.items()]
