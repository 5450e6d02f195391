"""What each user may do where an agent serves a group: write into their own runs, and see their own ranks."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from trackagent.agent.gate import Gate
from trackagent.agent.owners import NotYours, Owners
from trackagent.protos.v1 import agent_pb2


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

    async def hide(self, peer: str, status: agent_pb2.StatusResponse) -> None:
        """Leaves in `status` what the caller may see: for one who does not run the agent, their own ranks and
        how the agent is doing, and no folder, error or loss of others."""
        uid = self.user(peer)
        if uid in (os.geteuid(), 0):
            return
        shown = [
            one
            for one in status.producers
            if await asyncio.to_thread(self.owners.is_of, one.producer.producer_id, uid)
        ]
        for name in (
            "producers",
            "state_directory",
            "lost_records",
            "lost_since_start",
            "quarantine",
        ):
            status.ClearField(name)
        status.producers.extend(shown)
        status.lost_unknown = "only the user who runs the agent may see it"
        for sink in status.sinks:
            sink.ClearField("error")

    async def hide_runs(self, peer: str, node: agent_pb2.NodeResponse) -> None:
        """Leaves in `node` what the caller may see: for one who does not run the agent, their own runs, with
        what is said of them, and all that is sampled of the node."""
        uid = self.user(peer)
        if uid in (os.geteuid(), 0):
            return
        await asyncio.to_thread(self._keep_own_runs, uid, node)
        node.ClearField("more_ranks")
        node.ClearField("more_alarms")
        for collector in node.collectors:
            if collector.state != "off":
                collector.ClearField("reason")

    def _keep_own_runs(self, uid: int, node: agent_pb2.NodeResponse) -> None:
        runs = [
            run
            for run in node.runs
            if run.ranks and all(self.owners.is_of(one.producer_id, uid) for one in run.ranks)
        ]
        own = {run.run_id for run in runs}
        alarms = [one for one in node.alarms if one.run_id in own or not one.run_id]
        events = [one for one in node.events if one.run_id in own]
        for name, kept in (("runs", runs), ("alarms", alarms), ("events", events)):
            node.ClearField(name)
            getattr(node, name).extend(kept)
