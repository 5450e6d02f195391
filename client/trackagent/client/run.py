"""A run as one process sees it: what `init()` returns, and what the module's functions act on."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from time import time_ns
from types import TracebackType
from typing import TYPE_CHECKING, Any
from zlib import crc32

from trackagent.client import device, record, reductions, values
from trackagent.client.config import SOCKET_NAME, ClientConfig
from trackagent.client.errors import (
    ConfigError,
    JournalError,
    TooManyCalls,
    TrackagentError,
    ValueRefused,
)
from trackagent.client.exits import ending_of
from trackagent.client.instrument import Timer
from trackagent.client.journal import Journal, Lane
from trackagent.client.record import Kind
from trackagent.client.refusals import Refusals
from trackagent.client.sender import Sender
from trackagent.client.torchmemory import TorchMemory

if TYPE_CHECKING:
    from trackagent.client.identity import Identity

logger = logging.getLogger("trackagent")

LEVELS = ("info", "warning", "error")
STATUSES = ("finished", "failed", "killed")

# What log() itself may run into, a full memory included; see _is_a_handlers.
_OUR_ERRORS = (
    OSError,
    MemoryError,
    TrackagentError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    struct.error,
)

# How often finish() looks whether the agent has taken a journal that has no sender.
POLL_S = 0.05
# How often it looks whether the last values have come from devices.
DEVICE_POLL_S = 0.005

# Types that cannot be on a device; numpy's scalars are added when numpy is seen.
_plain_types: set[type] = {float, int, bool}


class Run:
    """One producer: this process's part of a run. Made by `trackagent.client.init`, which states
    the arguments.

    All methods may be called from any thread and from signal handlers. `log` and the other logging methods do
    no I/O, hold no lock, and raise nothing unless strict; what they refuse is counted by reason, shown in the
    run, and warned of once.

    As a context manager the run finishes at the end of the block, as failed when an exception leaves it.
    """

    _take: Callable[[], Lane]
    _opening: threading.RLock
    _is_opening: bool

    def __init__(
        self,
        *,
        config: ClientConfig,
        who: Identity,
        experiment: str,
        run_name: str = "",
        groups: Mapping[str, str] | None = None,
        strict: bool = False,
        on_finish: Callable[[float], None] = lambda deadline: None,
        rings: device.Rings = device.rings,
        torch_memory: TorchMemory | None = None,
    ) -> None:
        self.id = who.run_id
        self.attempt = who.attempt
        self.rank = who.rank
        self.world_size = who.world_size
        self.experiment = experiment
        self.name = run_name
        self.status = "running"
        self._delivered = False
        self._config = config
        self._who = who
        self._groups = dict(groups or {})
        self._strict = strict
        self._on_finish = on_finish
        self._rings = rings
        self._torch_memory = torch_memory or TorchMemory()
        self._last_step = -1
        self._params: dict[str, str] = {}
        self._warned: set[tuple[str, str]] = set()
        self._is_plain = _plain_types.issuperset
        self._open(forked=False)
        _open_runs.add(self)

    def _open(self, *, forked: bool) -> None:
        """Begins a producer: a journal, and the thread that delivers it."""
        self._refusals = Refusals()
        self._warnings: deque[str] = deque(maxlen=100)
        self._finishing = threading.Lock()
        who = self._who
        producer = {
            "producer_id": os.urandom(16).hex(),
            "run_id": who.run_id,
            "attempt": who.attempt,
            "rank": who.rank,
            "local_rank": who.local_rank,
            "world_size": who.world_size,
            "node": who.node,
            "pid": os.getpid(),
            # A clock that was never set may stand before 1970, which no identity may.
            "start_time_ns": max(0, time_ns()),
            "experiment": self.experiment,
            "run_name": self.name,
            "forked": forked,
            "job_time_ns": max(0, who.job_time_ns),
            "groups": self._groups,
        }
        if who.hub is not None:
            producer["hub"] = who.hub.text()
        # gRPC does not survive a fork: such a process only writes its journal, and the agent reads that.
        if forked or _grpc_is_lost:
            producer["sender"] = False
            self._sender = None
        else:
            self._sender = Sender(producer, self._config, self._housekeep)
        self._journal = Journal(
            producer,
            directory=self._config.directory,
            state_directory=self._config.state_directory,
            segment_bytes=self._config.segment_bytes,
            memory_bytes=self._config.memory_bytes,
            journal_bytes=self._config.journal_bytes,
            wake=self._sender.wake if self._sender else None,
        )
        self._looking = threading.Lock()
        self._in_flight = device.InFlight(self._rings, self._sender.wake if self._sender else None)
        self._forked_without_journal = False
        self._take = self._journal.take
        if self._sender:
            self._sender.start(self._journal)

    # --- logging

    def log(
        self,
        metrics: Mapping[str, Any],
        step: int | None = None,
        timestamp: Any = None,
        weight: Any = None,
    ) -> None:
        """Records `metrics` at `step`; safe from `kill -9` when this returns.

        Values: anything `float()` takes, numpy scalars, tensors of one element; NaN and infinities are kept.
        Those of tensors on a GPU follow in a record of their own, with the same step and time, once the GPU
        has computed them; on the current stream the tensors may be overwritten or freed at once. step: any
        whole number of 64 bits; None: one after this process's last step.
        timestamp: seconds since 1970 or a datetime; None: now. weight: how much these values count in means
        over ranks, such as the tokens that they were computed from; None: 1. What a signal handler of yours
        raises while this runs leaves it, as it leaves any function; the record may then be there or not.
        (While a value's own code is asked for the number, it cannot be told from what that raises: the value
        is refused.)
        """
        if weight is not None:
            metrics = _weighed(metrics, weight)
        try:
            lane = self._take()
        except IndexError:
            return self._log_without_lane(metrics, step, timestamp)
        try:
            state = lane.state
            segment = state.segment
            pack, size, head = segment.schemas[tuple(metrics)]
            numbers = metrics.values()
            start = segment.position
            end = start + size
            if step is None:
                step = self._last_step + 1
            if (
                end > segment.limit
                or not self._is_plain(map(type, numbers))
                or type(step) is not int
                or timestamp is not None
            ):
                raise LookupError
            body = pack(head, step, time_ns(), *numbers)
            # All of the record first, then, as one store, the word that publishes it.
            segment.map[start + 8 : end] = body
            segment.words[start >> 3] = size | crc32(body) << 32
            segment.position = end
            state.records += 1
            self._last_step = step
        except Exception as error:
            # No code but ours ran, except that of a signal handler: what that raises is not for us.
            if type(metrics) is dict and error.__traceback__ and error.__traceback__.tb_next:
                raise
            self._log_slowly(lane, metrics, step, timestamp)
        finally:
            lane.give_back(lane)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Records parameters: nested mappings become dotted keys, values are kept as `str()` shows
        them (at most 6000 characters). A parameter is set once: a different value later is
        refused."""
        texts, refused = self._texts("param", params)
        for key in list(texts):
            if self._params.setdefault(key, texts[key]) != texts[key]:
                other = texts.pop(key)
                problem = (
                    f"the param {key!r} is {self._params[key][:60]!r} and cannot become "
                    f"{other[:60]!r}: log what changes as a metric or a tag"
                )
                refused.append((key, ValueRefused("param changed", problem)))
        self._write_texts(Kind.PARAMS, texts, refused)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Sets tags, which later calls may change; keys and values as for params."""
        texts, refused = self._texts("tag", tags)
        self._write_texts(Kind.TAGS, texts, refused)

    def define(
        self, pattern: str, *, reduce: str = "mean", keep: str | None = None, every: int = 1
    ) -> None:
        """Says how values of the keys that match `pattern` ("train/*") are reduced across ranks, and what is
        kept of each rank's own. Call it on every rank, before the first log().

        reduce: what is shown first, mean, sum, min or max; sums are not weighted. none: nothing is reduced.
        keep: each rank's own points, all, those of the ranks with the least and the greatest value of a step
        (extremes), or none; None: all in small runs, else extremes. every: own points are kept at steps that
        this number divides. Of several patterns that match a key, the one with the most letters that are no
        wildcards counts; of a pattern that is defined again, what was said last."""
        try:
            name, text = reductions.definition(pattern, reduce, keep, every)
        except Exception as error:
            self._refuse([("define", error)])
        else:
            self._write_texts(Kind.TAGS, {name: text}, [])

    def event(self, message: str, level: str = "info", step: int | None = None) -> None:
        """Records that something happened. level: info, warning or error; message: at most 6000
        characters."""
        try:
            if level not in LEVELS:
                raise ValueRefused(
                    "bad level", f"the level {level!r} is none of {', '.join(LEVELS)}"
                )
            number = record.NO_STEP if step is None else values.to_step(step)
            text, _ = values.to_text(message)
            self._write(Kind.EVENT, {"level": level, "message": text}, step=number)
        except Exception as error:
            self._refuse([("event", error)])

    def timer(self, name: str) -> Timer:
        """Times a block or, as a decorator, a function: logs the seconds under `time/<name>`, at
        the step after the last one logged (the step under way)."""
        return Timer(name, self._log_seconds)

    def finish(self, status: str = "finished", error: str = "") -> bool:
        """Ends this process's part of the run and waits, at most `exit_timeout_s`, until the agent
        has it all.

        status: finished, failed or killed; error: why, in a line. Returns whether everything was
        delivered; what was not stays in the journal, for whichever agent next starts on this node.
        Further calls change nothing and return the same.
        """
        return self._finish(status, error, wait=True)

    def _finish(self, status: str, error: str, *, wait: bool) -> bool:
        """wait: also where there is no sender, and the agent comes by itself."""
        if type(status) is not str or status not in STATUSES:
            problem = f"the status {_shown(status)} is none of {', '.join(STATUSES)}"
            if self._strict:
                raise ConfigError(problem)
            self._warn("bad status", "finish", f"{problem}: the run ends as finished")
            status = "finished"
        try:
            reason, _ = values.to_text(error)
        except Exception:
            reason = "(an error that cannot be shown)"
        if not self._finishing.acquire(blocking=False):
            return self._delivered
        if self._forked_without_journal:
            _open_runs.discard(self)
            # Not the parent's run, of which this process has logged nothing.
            self._forked_without_journal = False
            self._journal.seal(0.0, _FINISHED)
            self.status = status
            self._delivered = True
            return True
        deadline = time.monotonic() + self._config.exit_timeout_s
        self._on_finish(deadline)
        self._wait_for_devices(time.monotonic() + (deadline - time.monotonic()) / 2)
        self.status = status
        self._take = _no_lane
        lane = self._journal.seal(0.5, _FINISHED)
        end_written = False
        try:
            if lane is not None:
                self._give_devices_up(lane)
                self._refusals.write(self._journal, lane, last=True)
                ending = {
                    "status": status,
                    "error": reason,
                    "records": self._journal.records,
                }
                self._journal.write(lane, _encode(Kind.FINISH, ending), last_words=True)
                end_written = True
        except TrackagentError as problem:
            self._warn("journal full", "finish", str(problem))
        if self._sender:
            self._delivered = self._sender.drain(deadline) and end_written
        self._journal.close(remove=self._sender is None or self._sender.ended)
        # Not before: a process that is forked meanwhile has to give the lock up.
        _open_runs.discard(self)
        if self._sender is None and wait and end_written:
            self._delivered = self._taken_by_agent(deadline)
        self._emit_warnings()
        return self._delivered

    def _wait_for_devices(self, until: float) -> None:
        """Until all values have come from devices, or time.monotonic() is `until`."""
        while self._in_flight and time.monotonic() < until:
            with contextlib.suppress(TrackagentError):
                lane = self._lane()
                try:
                    self._journal_landed(lane)
                finally:
                    lane.give_back(lane)
            if self._in_flight:
                time.sleep(DEVICE_POLL_S)

    def _give_devices_up(self, lane: Lane) -> None:
        """At the end, when nobody logs any more: what has not come from devices by now is lost."""
        self._journal_landed(lane)
        for step in self._in_flight.give_up():
            self._lose(
                "not computed in time",
                step,
                "some values were still being computed by a device when the run finished, and are lost: "
                "synchronize with it before finish()",
            )

    def _taken_by_agent(self, deadline: float) -> bool:
        """Waits until the agent has read the closed journal and deleted it; not where no agent listens."""
        while not self._journal.is_gone():
            if time.monotonic() >= deadline or not self._agent_listens():
                return self._journal.is_gone()
            time.sleep(POLL_S)
        return True

    def _agent_listens(self) -> bool:
        """Whether the agent that reads this folder's journals is there."""
        import socket

        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(self._config.directory / SOCKET_NAME))
            except OSError:
                return False
        return True

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish(*ending_of(error))

    # --- off the fast path

    def _another_lane(self) -> Lane:
        """For a call that finds every lane taken: by other threads, by the call that a signal
        handler interrupts, or since this process was forked, or since the run has finished.
        JournalError when there is none."""
        if self._forked_without_journal:
            self._open_in_child()
            return self._lane()
        return self._journal.add_lane()

    def _open_in_child(self) -> None:
        """The first log call in a forked process opens its journal, and calls in other threads wait for
        that. One in a signal handler that interrupts it is refused: it cannot wait for itself."""
        with self._opening:
            if self._forked_without_journal and self._is_opening:
                raise TooManyCalls("a journal is just being opened for this forked process")
            if self._forked_without_journal:
                self._is_opening = True
                try:
                    self._open(forked=True)
                finally:
                    self._is_opening = False

    def _log_without_lane(self, metrics: Any, step: Any, timestamp: Any) -> None:
        try:
            lane = self._another_lane()
        except Exception as error:
            if _is_a_handlers(error):
                raise
            self._refuse([("log", error)], lost_at=self._passed_over(error, step))
            return
        try:
            self._log_slowly(lane, metrics, step, timestamp)
        finally:
            lane.give_back(lane)

    def _log_slowly(self, lane: Lane, metrics: Any, step: Any, timestamp: Any) -> None:
        """A log call with anything the fast path does not handle: new keys, odd values, a full segment."""
        refused: list[tuple[str, Exception]] = []
        number: int | None = None
        lost_at: int | None = None
        try:
            if not isinstance(metrics, Mapping):
                problem = f"log() got {type(metrics).__name__}: give a dict of names and numbers"
                raise ValueRefused("not a dict", problem)
            number = self._last_step + 1 if step is None else values.to_step(step)
            time_ns = values.to_time_ns(timestamp)
            numbers: dict[str, float] = {}
            on_devices: dict[str, Any] = {}
            known = tuple(metrics) in lane.segment.schemas
            for key, value in metrics.items():
                try:
                    if not known:
                        values.check_key(key)
                    if type(value) is not float and values.is_on_gpu(value):
                        on_devices[key] = values.to_copy(key, value)
                    else:
                        numbers[key] = values.to_float(key, value)
                except ValueRefused as error:
                    refused.append((str(key), error))
                else:
                    if type(value).__module__ == "numpy" and not hasattr(value, "__len__"):
                        _plain_types.add(type(value))
            # A weight goes with each of the records that it is for.
            weight = {key: numbers.pop(key) for key in (reductions.WEIGHT_KEY,) if key in numbers}
            if numbers:
                numbers.update(weight)
                self._journal.write_metrics(lane, numbers, step=number, time_ns=time_ns)
                lane.state.records += 1
                self._last_step = number
            if on_devices:
                self._last_step = lost_at = number
                self._in_flight.queue(on_devices, step=number, time_ns=time_ns, beside=weight)
                lost_at = None
                # The sender's thread may be held up for seconds, as by an agent that hangs.
                if self._sender is None or self._in_flight.is_filled(0.75):
                    self._journal_landed(lane, most=4)
        except Exception as error:
            if type(metrics) is dict and _is_a_handlers(error):
                raise
            refused.append(("log", error))
            if lost_at is None:
                lost_at = self._passed_over(error, number)
        self._refuse(refused, lost_at=lost_at)

    def _journal_landed(self, lane: Lane, most: int | None = None) -> None:
        """Writes, in the taken lane, the records whose values have come from devices since the last look:
        looks for all, or for the `most` oldest. Whoever comes second need not wait."""
        if not self._looking.acquire(blocking=False):
            return
        try:
            for one in self._in_flight.landed(most):
                try:
                    self._journal.write_metrics(
                        lane, one.values, step=one.step, time_ns=one.time_ns
                    )
                    lane.state.records += 1
                except TrackagentError as error:
                    self._lose(error.reason, one.step, str(error))
        finally:
            self._looking.release()

    def _read_torch_memory(self) -> dict[str, float]:
        # Without a sender's thread of its own this is a thread of the training's; before the first step, a
        # record would begin the curves at a step of ours.
        if self._sender is None or self._last_step < 0:
            return {}
        try:
            return self._torch_memory.read()
        except Exception as error:
            problem = (
                f"torch cannot say what it has allocated ({error!r}): it is not asked any more"
            )
            self._warn("torch memory", "cuda", problem)
            return {}

    def _journal_torch_memory(self, lane: Lane, memory: dict[str, float]) -> None:
        """At the last step: a step under way that never ends must not look like one that has."""
        if not memory:
            return
        step = self._last_step
        try:
            self._journal.write_metrics(lane, memory, step=step, time_ns=time_ns())
            lane.state.records += 1
        except TrackagentError as error:
            self._lose(error.reason, step, str(error))

    def _lose(self, reason: str, step: int, problem: str) -> None:
        """Counts a record that `log()` took and that did not come."""
        self._refusals.add(reason, step, self._journal.records)
        self._warn(reason, "log", problem)

    def _passed_over(self, error: Exception, step: Any) -> int | None:
        """The step of a call that found no room, None where it has none. It counts as a step all the same:
        what comes after keeps its place beside other ranks, and the curve a hole."""
        if not isinstance(error, JournalError):
            return None
        try:
            self._last_step = self._last_step + 1 if step is None else values.to_step(step)
        except ValueRefused:
            return None
        return self._last_step

    def _log_seconds(self, name: str, seconds: float) -> None:
        """What a timer measured, at the step under way, which it leaves as it is."""
        try:
            key = f"time/{name}"
            lane = self._lane()
            try:
                if (key,) not in lane.segment.schemas:
                    values.check_key(key)
                step, now = self._last_step + 1, time_ns()
                self._journal.write_metrics(lane, {key: seconds}, step=step, time_ns=now)
                lane.state.records += 1
            finally:
                lane.give_back(lane)
        except Exception as error:
            at = self._last_step + 1 if isinstance(error, JournalError) else None
            self._refuse([("timer", error)], lost_at=at)

    def _texts(
        self, what: str, items: Mapping[str, Any]
    ) -> tuple[dict[str, str], list[tuple[str, Exception]]]:
        """Keys and texts of params or tags, and what is refused."""
        texts: dict[str, str] = {}
        refused: list[tuple[str, Exception]] = []
        try:
            if not isinstance(items, Mapping):
                problem = f"{what}s must be a dict, not {type(items).__name__}"
                return texts, [(what, ValueRefused("not a dict", problem))]
            for key, value in values.flatten(items):
                try:
                    texts[values.check_key(key, f"{what} key")], cut = values.to_text(value)
                    if cut:
                        kept = len(texts[key])
                        self._warn(
                            f"{what} cut", key, f"the {what} {key!r} was cut to {kept} characters"
                        )
                except Exception as error:
                    refused.append((key, error))
        except Exception as error:  # the mapping's own, or it contains itself
            refused.append((what, error))
        return texts, refused

    def _write_texts(
        self, kind: Kind, texts: dict[str, str], refused: list[tuple[str, Exception]]
    ) -> None:
        items = list(texts.items())
        # Few enough for any segment but the very smallest, whatever the texts.
        for start in range(0, len(items), 4):
            group = dict(items[start : start + 4])
            try:
                self._write(kind, group)
            except Exception as error:
                refused += [(key, error) for key in group]
        self._refuse(refused)

    def _write(self, kind: Kind, data: Mapping[str, Any], step: int = record.NO_STEP) -> None:
        lane = self._lane()
        try:
            self._journal.write(lane, _encode(kind, data, step))
        finally:
            lane.give_back(lane)

    def _lane(self) -> Lane:
        try:
            return self._take()
        except IndexError:
            return self._another_lane()

    # --- what is refused

    def _refuse(self, refused: list[tuple[str, Exception]], *, lost_at: int | None = None) -> None:
        """Counts each by its reason and warns once of each; raises the first one if strict. lost_at: the step
        of a log call of which, by the last of these, nothing was kept."""
        for name, error in refused:
            known = isinstance(error, TrackagentError)
            reason = error.reason if isinstance(error, TrackagentError) else "error"
            at = lost_at if error is refused[-1][1] else None
            self._refusals.add(reason, at, self._journal.records)
            self._warn(reason, name, str(error) if known else repr(error))
        if refused and self._sender is None:
            # A forked process has no sender's thread that would do these.
            if not self._forked_without_journal:
                self._journal.prepare()
            self._housekeep()
        elif refused and self.status != "running":
            self._emit_warnings()
        if refused and self._strict:
            raise refused[0][1] from None

    def _warn(self, reason: str, name: str, message: str) -> None:
        """Once for each reason and name; written by the sender's thread, since a log handler may block."""
        if (reason, name) not in self._warned and len(self._warned) < 1000:
            self._warned.add((reason, name))
            self._warnings.append(message)

    def _emit_warnings(self) -> None:
        while self._warnings:
            logger.warning("%s", self._warnings.popleft())

    def _housekeep(self) -> None:
        """On the sender's thread, every flush interval."""
        self._emit_warnings()
        memory = self._read_torch_memory()
        if memory or self._in_flight.is_worth_a_look or self._refusals.unwritten:
            try:
                lane = self._take()
            except IndexError:
                return
            try:
                self._journal_landed(lane)
                self._journal_torch_memory(lane, memory)
                # Without room now, the counts are written when there is.
                with contextlib.suppress(TrackagentError):
                    self._refusals.write(self._journal, lane)
            finally:
                lane.give_back(lane)

    def _after_fork_in_child(self) -> None:
        """Gives up the parent's lock and touches nothing else of the parent's. If this process
        logs, it opens a journal of its own."""
        self._take = _no_lane
        self._forked_without_journal = True
        self._is_opening = False
        self._finishing = threading.Lock()
        self._on_finish = lambda deadline: None
        self._opening = threading.RLock()
        # The parent's values come to the parent.
        self._in_flight = device.InFlight(self._rings, None)
        self._journal.abandon_in_child()


_FINISHED = "the run has finished: log before finish(), or call init() again"
_open_runs: weakref.WeakSet[Run] = weakref.WeakSet()
# This process was forked from one that had loaded gRPC, whose threads it lacks.
_grpc_is_lost = False


def _after_fork_in_child() -> None:
    from trackagent.client.history import run_is_inherited  # which init() has imported

    global _grpc_is_lost
    _grpc_is_lost = _grpc_is_lost or "grpc" in sys.modules
    for run in list(_open_runs):
        run._after_fork_in_child()
        run_is_inherited(run.id)


os.register_at_fork(after_in_child=_after_fork_in_child)


def _weighed(metrics: Any, weight: Any) -> Any:
    """The metrics with their weight; one that is none is refused when its number is asked for."""
    try:
        number: Any = reductions.to_weight(weight)
    except ValueRefused as error:
        number = reductions.RefusedWeight(error)
    try:
        return {**metrics, reductions.WEIGHT_KEY: number}
    except Exception as error:
        if _is_a_handlers(error):
            raise
        return metrics  # which log() will refuse


def _is_a_handlers(error: Exception) -> bool:
    """Whether a signal handler raised it: log() itself runs into nothing of that kind. Values, steps and
    times that raise are dealt with where they are converted."""
    return isinstance(error, TimeoutError) or not isinstance(error, _OUR_ERRORS)


def _shown(value: object) -> str:
    try:
        return repr(value)[:60]
    except Exception:
        return f"a {type(value).__name__}"


def _no_lane() -> Lane:
    raise IndexError


def _encode(kind: Kind, data: Mapping[str, Any], step: int = record.NO_STEP) -> bytes:
    return record.encode_json(kind, data, step=step, time_ns=time_ns())
