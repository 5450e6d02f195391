"""Policies: what is kept of each rank's own points, and what people see first, by key and run.

Ranks define them (client.define); they arrive as tags and are kept here in a file as well, since a spool
gives up what it has delivered. An agent that has lost them goes by the default until ranks define them again:
more or fewer points of single ranks are stored then, and every reduction stays right.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trackagent.agent.store.contract import Batch
from trackagent.client.errors import ValueRefused
from trackagent.client.reductions import DEFINITION, definition

logger = logging.getLogger(__name__)

VERSION = 1
MAX_RUNS = 1000
# Patterns of a run; further ones are not heeded.
MAX_PATTERNS = 256
_MAX_KEYS = 10_000
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
_WILDCARDS = str.maketrans("", "", "*?[]!")


@dataclass(frozen=True, slots=True)
class Policy:
    """One definition. reduce: "mean", "sum", "min", "max" or "none"; keep: "all", "extremes", "none", or
    None: by the number of ranks; every: single ranks' points are kept at steps that it divides."""

    reduce: str = "mean"
    keep: str | None = None
    every: int = 1

    def kept(self, world_size: int, keep_all_ranks: int) -> str:
        """What is kept in a run of so many ranks: "all", "extremes" or "none"."""
        if self.reduce == "none":
            return "all"
        return self.keep or ("all" if world_size <= keep_all_ranks else "extremes")


class Definitions:
    """Those of one run, by pattern. Of several that match a key, the one with the most letters that are no
    wildcards counts, then the later in alphabetical order.

    texts: what defines them; what no client writes is left out."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        said = {one: known for one, text in texts.items() if (known := _definition(one, text))}
        self.texts = {one: text for one, (text, _) in said.items()}
        found = [(one, policy) for one, (_, policy) in said.items()]
        self._patterns = sorted(
            found, key=lambda item: (len(item[0].translate(_WILDCARDS)), item[0]), reverse=True
        )
        self._known: dict[str, Policy] = {}

    def of(self, key: str) -> Policy:
        """The policy of a key."""
        policy = self._known.get(key)
        if policy is None:
            matching = (one for pattern, one in self._patterns if fnmatch.fnmatchcase(key, pattern))
            policy = next(matching, Policy())
            if len(self._known) >= _MAX_KEYS:
                self._known.clear()
            self._known[key] = policy
        return policy

    def unweighted(self, key: str) -> bool:
        """Whether weights do not count: a sum over ranks is one of what they logged."""
        return self.of(key).reduce == "sum"


def defined(tags: Mapping[str, str]) -> Definitions:
    """What a run's tags define."""
    prefix = len(DEFINITION)
    return Definitions({k[prefix:]: v for k, v in tags.items() if k.startswith(DEFINITION)})


class Policies:
    """Those of all runs that an agent hears of, in a file at `path` (None: in memory only). Of any thread."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._runs: dict[str, Definitions] = {}
        self._none = Definitions({})
        if path is not None:
            self._read(path)

    def of(self, run_id: str) -> Definitions:
        return self._runs.get(run_id, self._none)

    def learn(self, batch: Batch) -> None:
        """Takes what the batch's tags define. OSError where it cannot be written: nothing is learnt."""
        tags = [tag for tag in batch.tags if tag.key.startswith(DEFINITION)]
        if not tags:
            return
        new: dict[str, dict[str, str]] = {}
        runs = {info.producer_id: info.run_id for info in batch.producers}
        with self._lock:
            for tag in tags:
                run_id = runs.get(tag.producer_id)
                pattern = tag.key[len(DEFINITION) :]
                known = _definition(pattern, tag.value)
                if run_id is not None and known is not None:
                    texts = new.setdefault(run_id, dict(self.of(run_id).texts))
                    if pattern in texts or len(texts) < MAX_PATTERNS:
                        texts[pattern], _ = known
            changed = {run for run, texts in new.items() if texts != self.of(run).texts}
            if not changed:
                return
            kept = {run: known for run, known in self._runs.items() if run not in changed}
            kept |= {run: Definitions(new[run]) for run in changed}
            kept = dict(list(kept.items())[-MAX_RUNS:])
            if self._path is not None:
                _write(self._path, kept.items())
            self._runs = kept

    def _read(self, path: Path) -> None:
        try:
            said = json.loads(path.read_bytes())
            if said["version"] == VERSION:
                self._runs = {
                    str(run): Definitions({str(one): str(text) for one, text in texts.items()})
                    for run, texts in said["runs"].items()
                }
        except FileNotFoundError:
            return
        except _UNREADABLE as error:
            logger.warning(
                "cannot read %s, which says what is kept of each rank: %s; until ranks define it again, the "
                "default holds",
                path,
                error,
            )


def _write(path: Path, runs: Iterable[tuple[str, Definitions]]) -> None:
    """Whole or not at all."""
    said = {"version": VERSION, "runs": {run: known.texts for run, known in runs}}
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w") as file:
        json.dump(said, file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _definition(pattern: str, text: str) -> tuple[str, Policy] | None:
    """The text as a client writes it, and what it says; None for what no client writes."""
    try:
        said = json.loads(text)
        _, plain = definition(pattern, said["reduce"], said["keep"], said["every"])
        return plain, Policy(said["reduce"], said["keep"], said["every"])
    except (ValueError, TypeError, LookupError, ValueRefused, RecursionError):
        return None
