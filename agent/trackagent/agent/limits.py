"""What the agent's process takes of its system, and gives back: open files and memory."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import resource

logger = logging.getLogger(__name__)

# What the agent opens beside one connection a rank: databases, journals, gRPC's own.
OWN_FILES = 64
LARGE_BYTES = 1024 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # in glibc's malloc.h


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
    """From here on blocks of LARGE_BYTES and more are mapped, and unmapped when they are freed. Does nothing
    under another C library than glibc.

    That one raises this size, up to 32 MiB, when such a block is freed, and takes later ones from its heaps,
    one for each thread. What they leave there is soon full of small blocks, so the next finds no room: an
    agent that merges and delivers grows for hours.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        # Fixed as well from now on, and 128 KiB would be a system call for every other array.
        libc.mallopt(_M_TRIM_THRESHOLD, 4 * LARGE_BYTES)
