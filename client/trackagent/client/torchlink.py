"""The ways to a store that torch has: torchrun's own, or the one of the job's process group."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from datetime import timedelta
from importlib import import_module
from typing import Any

from trackagent.client.broadcast import Link, Store
from trackagent.client.ranks import whole_number


def find_link(
    environ: Mapping[str, str],
) -> tuple[Link | None, tuple[int, int] | None, str]:
    """The store of this job's torch; rank and world size of its process group, if there is one;
    and, without a store, why. Imports torch only where the process has it already or torchrun
    started it."""
    elastic = "TORCHELASTIC_RUN_ID" in environ
    if "torch" not in sys.modules and not elastic:
        return None, None, "torch is not imported (import it before client.init())"
    try:
        dist: Any = import_module("torch.distributed")
    except ImportError as error:
        return None, None, f"torch cannot be imported ({error})"
    if not dist.is_available():
        return None, None, "this torch has no torch.distributed"
    group = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else None
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if host and port:
        # With torchrun's own store switched off, rank 0 opens one here with the process group.
        torchruns = elastic and environ.get("TORCHELASTIC_USE_AGENT_STORE", "True") == "True"
        number = whole_number("MASTER_PORT", port)
        return TorchLink(dist, host, number, torchruns, torchruns or group is not None), group, ""
    if group is not None:
        return GroupLink(dist), group, ""
    return None, None, "MASTER_ADDR and MASTER_PORT are not set and there is no process group"


class TorchLink:
    """The TCPStore at MASTER_ADDR:MASTER_PORT."""

    def __init__(self, dist: Any, host: str, port: int, torchruns: bool, standing: bool) -> None:
        whose = "torchrun's store" if torchruns else "the process group's store"
        self.name = f"{whose} at {host}:{port} (MASTER_ADDR:MASTER_PORT)"
        self.standing = standing
        self._torchruns = torchruns
        self._dist = dist
        self._host = host
        self._port = port
        self._had_group = False

    def open(self) -> Store | None:
        # Torch complains at length on stderr when nobody listens; so knock first.
        if not self._listens():
            return None
        try:
            store: Store = self._dist.TCPStore(
                self._host,
                self._port,
                is_master=False,
                timeout=timedelta(seconds=30),
                wait_for_workers=False,  # else it would count as one of the job's workers
            )
        except (RuntimeError, ValueError):
            return None
        return store

    def alive(self) -> bool:
        if self._torchruns:
            return True
        listens = self._listens()
        # Last, as close to the use of the store as can be: torch forgets the group before it frees
        # its store.
        has_group = bool(self._dist.is_initialized())
        self._had_group = self._had_group or has_group
        return listens and has_group == self._had_group

    def close(self) -> None:
        """Connections end with the objects that have them."""

    def _listens(self) -> bool:
        try:
            socket.create_connection((self._host, self._port), timeout=5).close()
        except OSError:
            return False
        return True


class GroupLink:
    """The store of a process group made without MASTER_ADDR, as with init_method="tcp://…"."""

    name = "the process group's store"
    standing = True

    def __init__(self, dist: Any) -> None:
        self._dist = dist

    def open(self) -> Store | None:
        try:
            shared = self._dist.distributed_c10d._get_default_store()
            # Its own connection: torch may block in the shared one while a collective is being set
            # up.
            store: Store = shared.clone()
        except (AttributeError, NotImplementedError, RuntimeError, ValueError):
            return None
        return store

    def alive(self) -> bool:
        return bool(self._dist.is_initialized())

    def close(self) -> None:
        """Its connection ends with the object that has it."""
