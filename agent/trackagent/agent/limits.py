"""What the agent's process takes of its system, and gives back: open files and memory."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import resource

logger = logging.getLogger(__name__)

# What the agent opens beside one connection a rank: databases, journals, gRPC's own.
OWN_FILES = 64


def allow_files(streams: int, *, each: int) -> None:
    """Takes as many descriptors as this process may have; says so where they are too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # A system may allow less than it says.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft != resource.RLIM_INFINITY and soft < each * streams + OWN_FILES:
        logger.warning(
            "this process may open %d files, so about %d ranks can connect (max_streams is %d): raise "
            "the limit (ulimit -n, LimitNOFILE=) where there are more",
            soft,
            max(0, soft - OWN_FILES) // each,
            streams,
        )


def give_memory_back() -> None:
    """Gives the system the memory that is free in the heaps; nothing under another C library than glibc.

    Its heaps, one for each thread, keep what they had at most, so an agent that merges and delivers grows for
    hours. To map large blocks instead, which go back at once (M_MMAP_THRESHOLD), costs a page fault for each
    4 KiB of every array.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
