"""Strict affinity: a call goes to the replica that its session id names, or to nobody who could pretend to be it.

An owner that was just lost is waited for, as long as its successor may still take the name and adopt its sessions. One
that does not come back, or was never known, is answered for by any replica, with "gone".
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve.errors import PoolFull
from serve.policy import owner_of

_TRIES = 4
_RETURN_S = 40.0  # Serve starts a dead replica again within seconds; after this, the janitor has what it left


class SessionRouter(RequestRouter):
    """No FIFOMixin: a reply slot of one replica must not be given to a request that belongs to another."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._owners: dict[str, RunningReplica] = {}
        self._missing: dict[str, float] = {}  # owner -> when it was first seen to be gone
        self._sent: Counter[ReplicaID] = Counter()  # new sessions sent since the replica last told its number

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        gone = self._owners
        self._owners = {str(replica.replica_metadata.get("owner", "")): replica for replica in replicas}
        now = time.monotonic()
        missing = {**dict.fromkeys(gone, now), **self._missing}
        self._missing = {
            owner: since for owner, since in missing.items() if owner not in self._owners and now - since < _RETURN_S
        }
        self._sent.clear()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        session_id = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # a full owner is asked again later, not in a spin
            session_id = pending_request.metadata.session_id
        name = owner_of(session_id)
        owner = self._owners.get(name)
        if owner is not None:
            alive = any(replica.replica_id == owner.replica_id for replica in candidate_replicas)
            return [[owner]] if alive else []  # it died, and the list without it has not come yet
        if time.monotonic() - self._missing.get(name, -_RETURN_S) < _RETURN_S:
            return []
        ranked = sorted(candidate_replicas, key=self._load)
        if not session_id and ranked:
            self._sent[ranked[0].replica_id] += 1
        return [[replica] for replica in ranked]

    def _load(self, replica: RunningReplica) -> int:
        return int(replica.routing_stats.get("sessions", 0)) + self._sent[replica.replica_id]


async def ask(handle: DeploymentHandle, *args: object) -> Any:
    """One call. A replica that is full did nothing, so another is asked: the router's numbers are seconds old.

    Raises `PoolFull` after `_TRIES` of them; only creating a session ever meets a full replica.
    """
    for _ in range(_TRIES - 1):
        try:
            return await handle.remote(*args)
        except PoolFull:
            continue
    return await handle.remote(*args)
