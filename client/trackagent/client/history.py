"""What a process has decided in earlier calls of init(), and what it tells the processes that it starts.

A process that a rank forks or starts takes no part in the ranks' agreement: it knows by this whose it is.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass, field

from trackagent.client.ranks import Ranks

# What a rank tells the processes that it starts, in their environment; JSON.
RANK_PROCESS = "TRACKAGENT_RANK_PROCESS"
# By these a process that a rank has started tells itself from a rank of its own, or of another job.
_LAUNCHERS_SAY = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "PMIX_NAMESPACE",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
    "TRACKAGENT_JOB_ID",
)
# Frameworks set them in the rank itself, after init(): they count where they were there before.
_SET_LATER = {"MASTER_ADDR", "MASTER_PORT"}


@dataclass(slots=True)
class History:
    """What one process, and those that it was forked or started from, have decided so far. job_times_ns: by
    run, its job's. ranks: what the last of them that was a rank was told; pid: that one's."""

    calls: int = 0
    attempts: dict[str, int] = field(default_factory=dict)
    inherited: set[str] = field(default_factory=set)
    job_times_ns: dict[str, int] = field(default_factory=dict)
    ranks: Ranks | None = None
    pid: int = 0

    def belongs_to(self, ranks: Ranks) -> bool:
        """Whether this process was forked or started by the rank that it takes itself for."""
        return ranks == self.ranks and os.getpid() != self.pid

    def inherit(self, ranks: Ranks, environ: Mapping[str, str]) -> None:
        """In a process that was started by the rank that it takes itself for: what that one has decided."""
        with contextlib.suppress(KeyError, ValueError, TypeError):
            said = json.loads(environ[RANK_PROCESS])
            launcher = _launcher(environ)
            for name in _SET_LATER - said["launcher"].keys():
                launcher.pop(name, None)
            same = said["launcher"] == launcher and Ranks(**said["ranks"]) == ranks
            if same and said["pid"] != os.getpid():
                self.ranks, self.pid = ranks, int(said["pid"])
                self.attempts[said["run_id"]] = int(said["attempts"])
                self.job_times_ns[said["run_id"]] = int(said["job_time_ns"])

    def bequeath(self, run_id: str, environ: MutableMapping[str, str]) -> None:
        """Tells the processes that this one starts whose they are: they have its environment, and would take
        themselves for the rank. Given the run's id, they are of its attempt."""
        if self.ranks is not None and self.pid == os.getpid():
            said = {
                "pid": self.pid,
                "ranks": asdict(self.ranks),
                "launcher": _launcher(environ),
                "run_id": run_id,
                "attempts": self.attempts[run_id] - 1,  # before theirs
                "job_time_ns": self.job_times_ns[run_id],
            }
            environ[RANK_PROCESS] = json.dumps(said)


THIS_PROCESS = History()


def _launcher(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in _LAUNCHERS_SAY if environ.get(name)}


def run_is_inherited(run_id: str, history: History = THIS_PROCESS) -> None:
    """In a process that was forked by a rank of this run: where it begins this run itself, as another rank or
    beside that one, it takes part in the same attempt."""
    if run_id in history.attempts and run_id not in history.inherited:
        history.inherited.add(run_id)
        history.attempts[run_id] -= 1


def run_has_ended(
    run_id: str, environ: MutableMapping[str, str] = os.environ, history: History = THIS_PROCESS
) -> None:
    """What this process starts from now on, and begins the run again, is its next attempt, as this one itself
    would be."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        said = json.loads(environ[RANK_PROCESS])
        if said["run_id"] == run_id and said["pid"] == os.getpid():
            environ[RANK_PROCESS] = json.dumps(said | {"attempts": history.attempts[run_id]})
