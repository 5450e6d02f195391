"""gRPC in a training process: imported late, kept from harming what the process does beside it, and lost by a
fork."""

from __future__ import annotations

import errno
import os
import resource
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc

# Descriptors that must be free before gRPC is imported or connects. It takes 9, beside the few that other
# threads may just be taking (those of a git command are 6); where it finds none, it aborts the process.
NEEDED_DESCRIPTORS = 20

_kept: grpc.Channel | None = None  # never connected, never closed
_lost = False


def grpc_module() -> ModuleType:
    """gRPC, imported; who is called within imports.whole() leaves no fork with half of it."""
    # gRPC prints a line at every fork unless told so before its import.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    import grpc

    # Else it is shut down with its last channel. That waits for gRPC's own threads, up to 10 s, and so does
    # who makes the next channel, with the interpreter's lock held: nothing else runs.
    global _kept
    if _kept is None:
        _kept = grpc.insecure_channel("unix:/nobody")
    return grpc


def open_channel(address: str, **options: int) -> grpc.Channel:
    """A channel of the caller's own to an agent's socket. options: more of gRPC's."""
    # Channels to one address share their back-off unless told not to; here each has its caller's.
    own = {"use_local_subchannel_pool": 1, "enable_http_proxy": 0, **options}
    channel: grpc.Channel = grpc_module().insecure_channel(
        address, [(f"grpc.{name}", value) for name, value in own.items()]
    )
    return channel


def is_short_of_descriptors() -> bool:
    """Whether gRPC must not be let at work for now."""
    # Counted, not tried: to take them for a moment could fail somebody else's open().
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return False
    try:
        return limit - len(os.listdir("/proc/self/fd")) < NEEDED_DESCRIPTORS
    except FileNotFoundError:  # no /proc here
        return False
    except OSError as error:
        return error.errno == errno.EMFILE


def is_lost() -> bool:
    """Whether this process was forked from one that had loaded gRPC, whose threads it lacks."""
    return _lost


def _after_fork_in_child() -> None:
    global _lost
    _lost = _lost or "grpc" in sys.modules


os.register_at_fork(after_in_child=_after_fork_in_child)
