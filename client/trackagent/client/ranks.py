"""Which rank this process is, of how many, and whether they are on more than one node: what launchers say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from trackagent.client.errors import ConfigError

# By these a launcher says how many of the ranks are on this node.
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
# Or, of Slurm, how many nodes the step has, or at least the job.
_NODES = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """What a launcher says about this process."""

    rank: int
    local_rank: int
    world_size: int


def launcher_ranks(environ: Mapping[str, str]) -> Ranks | None:
    """What torchrun (or anything that sets RANK and WORLD_SIZE), mpirun or srun says, in this
    order; None without any. mpirun comes before srun: it starts its daemons with srun, and their
    SLURM_PROCID reaches the ranks."""
    # Batch scripts often export WORLD_SIZE alone and take the rank from srun: only both are an
    # answer.
    if environ.get("RANK") and environ.get("WORLD_SIZE"):
        local = next(
            (
                name
                for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
                if environ.get(name)
            ),
            None,
        )
        return _ranks(environ, "RANK", local, "WORLD_SIZE")
    if environ.get("OMPI_COMM_WORLD_RANK") and environ.get("OMPI_COMM_WORLD_SIZE"):
        return _ranks(
            environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"
        )
    # The batch script itself has SLURM_PROCID 0 and SLURM_NTASKS n, but no step: it is one process.
    if environ.get("SLURM_STEP_ID") and environ.get("SLURM_PROCID"):
        size = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
        if environ.get(size):
            return _ranks(environ, "SLURM_PROCID", "SLURM_LOCALID", size)
    for present, absent, harmless in (("WORLD_SIZE", "RANK", "1"), ("RANK", "WORLD_SIZE", "0")):
        if (text := environ.get(present, "")) not in ("", harmless):
            raise ConfigError(f"{present} is {text!r} but {absent} is not set: set both or neither")
    return None


def ranks_here(group: tuple[int, int] | None, environ: Mapping[str, str]) -> Ranks:
    """This process's ranks; a process group that exists (rank, world size) knows better than
    variables: one Slurm task may have spawned eight ranks."""
    told = launcher_ranks(environ) or Ranks(rank=0, local_rank=0, world_size=1)
    if group is None:
        return told
    rank, world_size = group
    local_rank = whole_number("LOCAL_RANK", environ.get("LOCAL_RANK") or str(told.local_rank))
    return Ranks(rank=rank, local_rank=local_rank, world_size=world_size)


def _ranks(environ: Mapping[str, str], rank: str, local_rank: str | None, world_size: str) -> Ranks:
    ranks = Ranks(
        rank=whole_number(rank, environ[rank]),
        local_rank=whole_number(local_rank, environ.get(local_rank) or "0") if local_rank else 0,
        world_size=whole_number(world_size, environ[world_size], least=1),
    )
    if ranks.rank >= ranks.world_size:
        raise ConfigError(
            f"{rank} is {ranks.rank} but {world_size} is {ranks.world_size}: ranks count from 0"
        )
    return ranks


def spans_nodes(ranks: Ranks, environ: Mapping[str, str]) -> bool | None:
    """Whether the ranks are on more than one node; None where nothing says so."""
    if ranks.world_size == 1:
        return False
    for name in _LOCAL_SIZES:
        if text := environ.get(name):
            return whole_number(name, text, least=1) < ranks.world_size
    for name in _NODES:
        if text := environ.get(name):
            return whole_number(name, text, least=1) > 1
    return None


def whole_number(name: str, text: str, least: int = 0) -> int:
    """The value of the variable `name`; ConfigError when it is not a number from `least` on."""
    # int() alone would accept 1_0 and the digits of other scripts.
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()) or int(text) < least:
        raise ConfigError(f"{name} is {text!r}: give a whole number from {least} on")
    return int(text)
