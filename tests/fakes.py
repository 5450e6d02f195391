"""What several tests share: fresh folders, a real agent process, training scripts, and readers of
what they leave."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import grpc
from click.testing import CliRunner

from trackagent.agent.cli import main
from trackagent.agent.config import STORE_NAME
from trackagent.agent.store import open_reader
from trackagent.agent.store.contract import RunSummary, StoreError
from trackagent.client import record
from trackagent.client.config import SOCKET_NAME
from trackagent.client.segment import HEADER_BYTES, SUFFIX, SegmentHeader, read_header
from trackagent.protos.v1 import agent_pb2, agent_pb2_grpc

T = TypeVar("T")

COMMAND = Path(sysconfig.get_path("scripts")) / "trackagent"
DEADLINE_S = 60.0  # also where much else runs
TORCHRUN_S = 100.0  # each of its processes imports torch, for seconds
POLL_S = 0.02
# What decides a process's identity or settings must come from the test, not from where it is run.
LAUNCHER_VARIABLES = (
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MLFLOW_RUN_ID",
    "RANK",
    "WORLD_SIZE",
)


def wait_until(condition: Callable[[], T], what: str = "", *, timeout_s: float = DEADLINE_S) -> T:
    """The first true value of `condition`; AssertionError, with `what`, when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what or condition}"
        time.sleep(POLL_S)
    return value


def short_folder() -> Path:
    """A fresh folder with a short name: a unix socket's path has at most 107 bytes."""
    memory = Path("/dev/shm")
    base = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix="tka-", dir=base))


class Folders(NamedTuple):
    """TRACKAGENT_DIR and TRACKAGENT_STATE of one node; neither exists at first."""

    directory: Path
    state: Path

    @classmethod
    def under(cls, base: Path) -> Folders:
        return cls(base / "dir", base / "state")

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with these folders and nothing else of trackagent or a launcher."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("TRACKAGENT_") and name not in LAUNCHER_VARIABLES
        }
        return kept | {
            "TRACKAGENT_DIR": str(self.directory),
            "TRACKAGENT_STATE": str(self.state),
            # What a node is doing, and how a run is doing, are no part of most tests.
            "TRACKAGENT_COLLECT": "none",
            "TRACKAGENT_HEALTH": "none",
        }

    @property
    def socket(self) -> Path:
        return self.directory / SOCKET_NAME

    def journals(self) -> list[Path]:
        """The folders of all producers, in memory and on disk."""
        return sorted(
            path
            for base in (self.directory, self.state)
            for path in (base / "journals").glob("*")
            if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
        )


class Point(NamedTuple):
    """One line of `trackagent export`."""

    key: str
    source: str
    step: int
    value: float


class AgentProcess:
    """A real `trackagent start` on `folders`. One at a time; may be started again after its end."""

    def __init__(
        self,
        folders: Folders,
        *flags: str,
        command: Sequence[str] = (str(COMMAND),),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """command, variables: what to start instead of `trackagent`, with what in its environment."""
        self.folders = folders
        self.flags = flags
        self.command = command
        self.variables = variables or {}
        self.output_path = folders.directory.parent / "agent.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"unix:{self.folders.socket}"

    @property
    def output(self) -> str:
        """What the agent has printed, over all its starts."""
        return self.output_path.read_text(errors="replace")

    def launch(self) -> subprocess.Popen[bytes]:
        """Starts it and returns at once."""
        with self.output_path.open("ab") as output:
            process = subprocess.Popen(
                [*self.command, "start", *self.flags],
                env={**self.folders.environment, **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.process = process
        return process

    def start(self) -> AgentProcess:
        """Starts it and returns when it answers."""
        seen = self.output.count("listens at") if self.output_path.exists() else 0
        process = self.launch()

        def answers() -> bool:
            assert process.poll() is None, f"the agent ended:\n{self.output}"
            return self.output.count("listens at") > seen

        wait_until(answers, "the agent listens")
        return self

    def kill(self) -> None:
        """SIGKILL, at whatever instruction it is."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE_S)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE_S)

    # --- what people see

    def run_cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`trackagent <arguments>` for this agent's folders; with `check`, it must succeed.

        In this process: tests look often, and a process of its own takes 0.3 s of processor time to begin.
        """
        done = CliRunner().invoke(main, arguments, env=self.folders.environment)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert not check or done.exit_code == 0, f"{arguments}: {done.exit_code}\n{done.stderr}"
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    def runs(self) -> list[dict[str, Any]]:
        """What `trackagent runs --json` lists; nothing where nothing is stored yet."""
        done = self.run_cli("runs", "--json", check=False)
        found: list[dict[str, Any]] = json.loads(done.stdout) if done.returncode == 0 else []
        return found

    def run(self, run_id: str) -> RunSummary | None:
        """The run as the store has it; None where it is not stored yet."""
        path = self.folders.state / STORE_NAME
        if not path.exists():
            return None
        try:
            with contextlib.closing(open_reader(path)) as reader:
                return reader.run(run_id)
        except StoreError:
            return None

    def shown(self, run_id: str) -> dict[str, Any]:
        """`trackagent show RUN --json`."""
        shown: dict[str, Any] = json.loads(self.run_cli("show", run_id, "--json").stdout)
        return shown

    def exported(self, run_id: str) -> list[Point]:
        """Every stored point of a run, by `trackagent export --format jsonl`, in the order of storing."""
        lines = self.run_cli("export", run_id, "--format", "jsonl").stdout.splitlines()
        points = [json.loads(line) for line in lines]
        return [Point(p["key"], p["source"], p["step"], float(p["value"])) for p in points]

    # --- what to wait for

    def wait_for_status(self, run_id: str, status: str) -> RunSummary:
        """The run, once it is stored with this status and all that its ended processes say they logged."""

        def reached() -> RunSummary | None:
            run = self.run(run_id)
            if run is None or run.status != status:
                return None
            return run if run.records_logged in (None, run.records_stored) else None

        return wait_until(reached, f"run {run_id} is {status}; the agent said:\n{self.output}")

    def wait_for_no_journals(self) -> None:
        """Until every journal on this node has been delivered and deleted."""
        wait_until(lambda: not self.folders.journals(), f"no journal is left:\n{self.output}")

    def wait_for_delivery(self) -> None:
        """Until nothing waits in journals or spool."""
        self.wait_for_no_journals()

        def delivered() -> bool:
            return json.loads(self.run_cli("status", "--json").stdout)["spool"]["batches"] == 0

        wait_until(delivered, f"the spool is empty:\n{self.output}")


def start_script(
    folders: Folders, program: str, *arguments: object, **variables: str
) -> subprocess.Popen[str]:
    """A training process that runs `program` as a script of its own, stdin, stdout and stderr piped."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        env=folders.environment | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def in_a_forked_process(call: Callable[[], T]) -> T:
    """What `call` returns in one. EOFError where it raises there, which stderr tells."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    with receiver:
        pid = os.fork()
        if pid == 0:
            try:
                sender.send(call())
            except BaseException:
                traceback.print_exc()
                raise
            finally:  # never on into the tests
                os._exit(0)
        sender.close()
        assert receiver.poll(DEADLINE_S)
        os.waitpid(pid, 0)
        answer: T = receiver.recv()
        return answer


def next_line(process: subprocess.Popen[str]) -> str:
    """The next line that the process prints; AssertionError, with what it says, when it ends before."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.endswith("\n"), process.communicate(timeout=DEADLINE_S)
    return line.rstrip("\n")


def run_script(
    folders: Folders, program: str, *arguments: object, expect: int | None = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs `program` to its end, which must be with exit status `expect` (None: any)."""
    process = start_script(folders, program, *arguments, **variables)
    try:
        output, errors = process.communicate(timeout=DEADLINE_S)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    assert expect is None or process.returncode == expect, f"{process.returncode}\n{errors}"
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@contextlib.contextmanager
def torchrun(
    folders: Folders, script: Path, *arguments: object, ranks: int = 2, restarts: int = 0
) -> Iterator[subprocess.Popen[str]]:
    """`torchrun` of a script, stdout and stderr piped; ended, with its ranks, after the block."""
    options = (f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "--monitor-interval=0.1")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", *options)
    process = subprocess.Popen(
        [*launcher, str(script), *map(str, arguments)],
        env=folders.environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=TORCHRUN_S)


class Refusal(NamedTuple):
    """How a FakeAgent ends a call."""

    code: grpc.StatusCode
    message: str


class FakeAgent(agent_pb2_grpc.AgentServicer):
    """An agent in this process that keeps what it is sent in memory, and behaves as a test tells it.

    It checks what the protocol promises: a batch goes on where its lane ends, or repeats.
    """

    def __init__(self, socket: Path) -> None:
        self.lanes: dict[int, bytearray] = {}
        self.opened: list[agent_pb2.OpenRunRequest] = []
        self.closed: list[agent_pb2.CloseRunRequest] = []
        self.batches: list[agent_pb2.PushRequest] = []
        self.problems: list[str] = []
        self.max_batch_bytes = 2 * 1024 * 1024
        # What to do, any of them changeable at any time.
        self.refuse_open: Refusal | None = None
        self.refuse_push: Refusal | None = None
        self.refuse_close: Refusal | None = None
        self.acknowledge = True
        self.complete = True
        self.break_after: int | None = (
            None  # batches of a stream; what they hold is kept, and not acknowledged
        )
        self.committed: dict[int, int] | None = None  # what OpenRun says instead of the truth
        self.extra_answers: list[agent_pb2.PushResponse] = []
        self._socket = socket
        self._server: grpc.Server | None = None

    def start(self) -> None:
        """Listens, again if need be."""
        self._socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._socket.unlink(missing_ok=True)
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        agent_pb2_grpc.add_AgentServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{self._socket}")
        self._server.start()

    def stop(self) -> None:
        """Breaks all connections; what was received stays."""
        if self._server is not None:
            self._server.stop(None).wait(DEADLINE_S)
            self._server = None

    @property
    def received(self) -> dict[int, bytes]:
        """By lane, everything, each byte once."""
        return {lane: bytes(data) for lane, data in self.lanes.items() if data}

    def OpenRun(
        self, request: agent_pb2.OpenRunRequest, context: grpc.ServicerContext
    ) -> agent_pb2.OpenRunResponse:
        self.opened.append(request)
        if self.refuse_open is not None:
            context.abort(*self.refuse_open)
        for held in request.held:
            lane = self.lanes.setdefault(held.lane, bytearray())
            lane.extend(bytes(max(0, held.offset - len(lane))))
        known = {lane: len(data) for lane, data in self.lanes.items()}
        known = known if self.committed is None else self.committed
        return agent_pb2.OpenRunResponse(
            agent_version="fake",
            max_batch_bytes=self.max_batch_bytes,
            committed=[agent_pb2.LaneOffset(lane=one, offset=known[one]) for one in known],
        )

    def Push(
        self, requests: Iterator[agent_pb2.PushRequest], context: grpc.ServicerContext
    ) -> Iterator[agent_pb2.PushResponse]:
        for number, request in enumerate(requests, 1):
            if self.refuse_push is not None:
                context.abort(*self.refuse_push)
            self._take(request)
            if self.break_after is not None and number >= self.break_after:
                context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the test")
            while self.extra_answers:
                yield self.extra_answers.pop()
            if self.acknowledge:
                yield agent_pb2.PushResponse(
                    lane=request.lane, offset=len(self.lanes[request.lane])
                )

    def _take(self, request: agent_pb2.PushRequest) -> None:
        self.batches.append(request)
        if len(request.journal_bytes) > self.max_batch_bytes:
            self.problems.append(f"a batch of {len(request.journal_bytes)} bytes")
        if record.scan(request.journal_bytes).end != len(request.journal_bytes):
            self.problems.append("a batch that does not consist of whole records")
        lane = self.lanes.setdefault(request.lane, bytearray())
        if request.first_offset > len(lane):
            self.problems.append(f"a gap at {len(lane)} of lane {request.lane}")
        repeated = len(lane) - request.first_offset
        if lane[request.first_offset :] != request.journal_bytes[:repeated]:
            self.problems.append(f"other bytes at {request.first_offset} of lane {request.lane}")
        lane.extend(request.journal_bytes[repeated:])

    def CloseRun(
        self, request: agent_pb2.CloseRunRequest, context: grpc.ServicerContext
    ) -> agent_pb2.CloseRunResponse:
        self.closed.append(request)
        if self.refuse_close is not None:
            context.abort(*self.refuse_close)
        return agent_pb2.CloseRunResponse(complete=self.complete)


class SegmentFile(NamedTuple):
    """A segment as its bytes say it is."""

    path: Path
    header: SegmentHeader
    records: list[record.Record]


def read_segments(folder: Path) -> list[SegmentFile]:
    """The segments in one producer's folder, without spares, in the order of lane and offset."""
    found = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        data = path.read_bytes()
        if not data:
            continue  # the sender's thread is just making it
        header = read_header(data)
        if header is not None:
            scan = record.scan(data, HEADER_BYTES)
            assert scan.damage == []
            records = [record.decode(data, offset) for offset in scan.offsets]
            found.append(SegmentFile(path, header, records))
    return sorted(found, key=lambda one: (one.header.lane, one.header.base))


class Logged(NamedTuple):
    """One metrics record with its keys."""

    step: int
    values: Mapping[str, float]
    time_ns: int


def logged_records(folders: Folders) -> list[Logged]:
    """All metrics records in the journals of `folders`, in the order of their times."""
    found = []
    for folder in folders.journals():
        for segment in read_segments(folder):
            keys: dict[int, tuple[str, ...]] = {}
            for one in segment.records:
                if one.kind == record.Kind.SCHEMA:
                    keys[one.schema_id] = one.keys
                elif one.kind == record.Kind.METRICS:
                    named = dict(zip(keys[one.schema_id], one.values, strict=True))
                    found.append(Logged(one.step, named, one.time_ns))
                elif one.kind == record.Kind.NAMED:
                    named = dict(zip(one.keys, one.values, strict=True))
                    found.append(Logged(one.step, named, one.time_ns))
    return sorted(found, key=lambda one: one.time_ns)


def said(folders: Folders, kind: record.Kind) -> list[Mapping[str, Any]]:
    """The content of all records of a JSON kind in the journals of `folders`, in the order of their times."""
    found = [
        one
        for folder in folders.journals()
        for segment in read_segments(folder)
        for one in segment.records
        if one.kind == kind
    ]
    return [one.data or {} for one in sorted(found, key=lambda one: one.time_ns)]


def holes(folders: Folders) -> set[int]:
    """The steps that the GAP records in the journals of `folders` name."""
    # A gap that grew is there again, and is known by its reason and the time of its first call.
    gaps = {(gap["reason"], gap["first_time_ns"]): gap for gap in said(folders, record.Kind.GAP)}
    return {
        step for gap in gaps.values() for step in range(gap["first_step"], gap["last_step"] + 1)
    }
