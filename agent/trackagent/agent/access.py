"""What each user may do where an agent serves a group: write into their own runs, and see their own ranks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from trackagent.agent.gate import Gate
from trackagent.agent.owners import NotYours, Owners
from trackagent.protos.v1 import agent_pb2

Sight = Callable[[bytes], bool]
"""Whether a caller may see a producer, by its id; may wait, and raise what Owners raises."""


@dataclass(frozen=True)
class Access:
    """Who is who by the gate, and what is whose by the owners. `peer` is a caller as gRPC names it."""

    gate: Gate
    owners: Owners

    def user(self, peer: str) -> int:
        """The calling user. NotYours for a caller who did not come through the gate."""
        uid = self.gate.user_of(peer)
        if uid is None:
            raise NotYours("this socket is the agent's own: connect to the one beside it")
        return uid

    def guest(self, peer: str) -> int | None:
        """The calling user, None for the one who runs the agent, and for one who is not known."""
        uid = self.gate.user_of(peer)
        return None if uid == os.geteuid() else uid

    async def open(self, peer: str, run_id: str, producer_id: bytes) -> None:
        """The caller opens a producer of a run. NotYours when either is another user's."""
        await asyncio.to_thread(self.owners.claim, run_id, producer_id, self.user(peer))

    def claim_own(self, run_id: str, producer_id: bytes) -> None:
        """A journal of the agent's user is to be read. NotYours when it names another user's run."""
        self.owners.claim(run_id, producer_id, os.geteuid())

    async def check(self, peer: str, producer_id: bytes) -> None:
        """NotYours when the caller has not opened this producer."""
        if not await asyncio.to_thread(self.owners.is_of, producer_id, self.user(peer)):
            raise NotYours("this producer was not opened by this user: call OpenRun first")

    async def own_job(self, peer: str, request: agent_pb2.MeetRequest) -> None:
        """Makes the job one of the caller's, whoever else gives one of theirs the same name. NotYours for
        nobody known."""
        user = self.user(peer)
        if request.job:
            request.job = f"{user}:{request.job}"

    def sight(self, peer: str) -> Sight | None:
        """Which producers the caller may see, None for one who may see all. NotYours for nobody known."""
        uid = self.user(peer)
        return None if uid in (os.geteuid(), 0) else partial(self.owners.is_of, uid=uid)


def hide_status(status: agent_pb2.StatusResponse) -> None:
    """Leaves what a member may see beside their own ranks: how the agent is doing, and no folder, error or
    loss of others."""
    for name in ("state_directory", "lost_records", "lost_since_start", "quarantine"):
        status.ClearField(name)
    status.lost_unknown = "only the user who runs the agent may see it"
    for sink in status.sinks:
        sink.ClearField("error")


def hide_node(node: agent_pb2.NodeResponse) -> None:
    """The same beside their own runs."""
    for collector in node.collectors:
        if collector.state != "off":
            collector.ClearField("reason")
