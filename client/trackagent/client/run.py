"""A run as one process sees it: what `init()` returns, and what the module's functions act on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from time import time_ns
from types import TracebackType
from typing import TYPE_CHECKING, Any
from zlib import crc32

from trackagent.client import device, given, record, reductions, values
from trackagent.client.config import SOCKET_NAME, ClientConfig
from trackagent.client.errors import (
    ConfigError,
    JournalError,
    TrackagentError,
    ValueRefused,
    is_a_handlers,
)
from trackagent.client.exits import ending_of
from trackagent.client.instrument import Timer
from trackagent.client.journal import Lane
from trackagent.client.producer import Producer, encode, no_lane, open_producers
from trackagent.client.record import Kind
from trackagent.client.torchmemory import TorchMemory

if TYPE_CHECKING:
    from trackagent.client.identity import Identity

logger = logging.getLogger("trackagent")

LEVELS = ("info", "warning", "error")
STATUSES = ("finished", "failed", "killed")

# How often finish() looks whether the agent has taken a journal that has no sender.
POLL_S = 0.05


class Run(Producer):
    """This process's part of a run. Made by `trackagent.client.init`, which states the arguments.

    All methods may be called from any thread and from signal handlers. `log` and the other logging methods do
    no I/O, hold no lock, and raise nothing unless strict; what they refuse is counted by reason, shown in the
    run, and warned of once.

    As a context manager the run finishes at the end of the block, as failed when an exception leaves it.
    """

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
        self._delivered = False
        self._on_finish = on_finish
        self._params: dict[str, str] = {}
        self._is_plain = given.plain_types.issuperset
        super().__init__(
            config=config,
            who=who,
            experiment=experiment,
            run_name=run_name,
            groups=groups,
            strict=strict,
            rings=rings,
            torch_memory=torch_memory,
        )

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
            metrics = given.weighed(metrics, weight)
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
            open_producers.discard(self)
            # Not the parent's run, of which this process has logged nothing.
            self._forked_without_journal = False
            self._journal.seal(0.0, _FINISHED)
            self.status = status
            self._delivered = True
            return True
        deadline = time.monotonic() + self._config.exit_timeout_s
        self._on_finish(deadline)
        self._landing.wait(time.monotonic() + (deadline - time.monotonic()) / 2, self._lane)
        self.status = status
        self._take = no_lane
        lane = self._journal.seal(0.5, _FINISHED)
        end_written = False
        try:
            if lane is not None:
                self._landing.give_up(lane)
                self._refusals.write(self._journal, lane, last=True)
                ending = {
                    "status": status,
                    "error": reason,
                    "records": self._journal.records,
                }
                self._journal.write(lane, encode(Kind.FINISH, ending), last_words=True)
                end_written = True
        except TrackagentError as problem:
            self._warn("journal full", "finish", str(problem))
        if self._sender:
            self._delivered = self._sender.drain(deadline) and end_written
        self._journal.close(remove=self._sender is None or self._sender.ended)
        # Not before: a process that is forked meanwhile has to give the lock up.
        open_producers.discard(self)
        if self._sender is None and wait and end_written:
            self._delivered = self._taken_by_agent(deadline)
        self._emit_warnings()
        return self._delivered

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

    def _after_fork_in_child(self) -> None:
        super()._after_fork_in_child()
        self._on_finish = lambda deadline: None

    # --- off the fast path

    def _log_without_lane(self, metrics: Any, step: Any, timestamp: Any) -> None:
        try:
            lane = self._another_lane()
        except Exception as error:
            if is_a_handlers(error):
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
            known = tuple(metrics) in lane.segment.schemas
            numbers, on_devices = given.parts_of(metrics, refused, known=known)
            # A weight goes with each of the records that it is for.
            weight = {key: numbers.pop(key) for key in (reductions.WEIGHT_KEY,) if key in numbers}
            if numbers:
                numbers.update(weight)
                self._journal.write_metrics(lane, numbers, step=number, time_ns=time_ns)
                lane.state.records += 1
                self._last_step = number
            if on_devices:
                self._last_step = lost_at = number
                self._landing.queue(on_devices, step=number, time_ns=time_ns, beside=weight)
                lost_at = None
                if self._landing.is_for_loggers:
                    self._landing.write(lane, most=4)
        except Exception as error:
            if type(metrics) is dict and is_a_handlers(error):
                raise
            refused.append(("log", error))
            if lost_at is None:
                lost_at = self._passed_over(error, number)
        self._refuse(refused, lost_at=lost_at)

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

    def _texts(self, what: str, items: Mapping[str, Any]) -> tuple[dict[str, str], given.Refused]:
        """Keys and texts of params or tags, and what is refused."""
        texts, cut, refused = given.texts_of(what, items)
        for key in cut:
            kept = len(texts[key])
            self._warn(f"{what} cut", key, f"the {what} {key!r} was cut to {kept} characters")
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


_FINISHED = "the run has finished: log before finish(), or call init() again"


def _shown(value: object) -> str:
    try:
        return repr(value)[:60]
    except Exception:
        return f"a {type(value).__name__}"
