"""The pool as a Serve replica: named by its Ray node, healthy while it can start cells.

Killed or replaced (a new deployment drains calls, not sessions), it leaves open sessions to the next replica on the
node, which takes the same name. Whoever removes the service for good ends them first (`close_all`), or the janitor
does.
"""

from __future__ import annotations

from serve.pool import SandboxPool
from serve.settings import PoolSettings

_NODE_CHARACTERS = 12


class SandboxReplica(SandboxPool):
    async def __init__(self, settings: PoolSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        import ray

        super().__init__(settings, node=ray.get_runtime_context().get_node_id()[:_NODE_CHARACTERS])
        await self.start()

    def record_replica_metadata(self) -> dict[str, str]:
        """Read once by the router: the name in the ids that this replica mints."""
        return {"owner": self.owner}

    def record_routing_stats(self) -> dict[str, int]:
        return {"sessions": self.open_sessions}

    async def check_health(self) -> None:
        if problem := self.problem:
            raise RuntimeError(problem)

    async def __del__(self) -> None:
        await self.leave()
