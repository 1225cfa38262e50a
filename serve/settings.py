"""What a pool is told: plain values, so that they travel from a config file to a replica."""

from __future__ import annotations

import os

from pydantic import BaseModel, ConfigDict, Field

from serve.cells import BackendName, CellSettings


class PoolSettings(BaseModel):
    """Everything a pool needs to know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: BackendName = "auto"
    image: str = "aster-sandbox:latest"
    runtime: str = "runc"
    max_sessions: int = Field(default=512, ge=1)
    """Open at once, copies counted."""
    sessions_per_cell: int = Field(default=8, ge=1, le=64)
    warm_cells: int = Field(default=1, ge=1)
    warm_sessions: int = Field(default=2, ge=0)
    max_running: int | None = Field(default=None, ge=1)
    """Cells of code that run at once; null = twice the cores."""
    max_waiting: int = Field(default=4096, ge=0)
    queue_timeout_s: float = Field(default=120.0, gt=0)
    create_timeout_s: float = Field(default=60.0, gt=0)
    start_timeout_s: float = Field(default=60.0, gt=0)
    replay_timeout_s: float = Field(default=60.0, ge=0)
    """A session whose cells ran longer than this is not rebuilt after the loss of its cell."""
    memory_bytes: int = Field(default=1 << 30, ge=64 << 20)
    disk_bytes: int = Field(default=64 << 20, ge=1 << 20)
    idle_ttl_s: float = Field(default=40.0, gt=0)
    """A supervisor that hears nothing for so long ends by itself; the pool speaks every 5 s."""
    adoption_s: float = Field(default=40.0, gt=0)
    """What a dead replica left is kept so long for a successor."""
    socket_root: str | None = None
    """Where an owner's directory is: sockets and journals; null = under the temporary directory."""
    mint_key: str = ""
    """Key of the session ids. Without one a successor cannot know its predecessor's ids, and adopts none."""

    @property
    def running_limit(self) -> int:
        """max_running, or twice the cores that this process may use."""
        return self.max_running or 2 * len(os.sched_getaffinity(0))

    def cell_settings(self, *, owner: str) -> CellSettings:
        return CellSettings(
            owner=owner,
            sessions_per_cell=self.sessions_per_cell,
            warm_sessions=self.warm_sessions,
            memory_bytes=self.memory_bytes,
            disk_bytes=self.disk_bytes,
            idle_ttl_s=self.idle_ttl_s,
            image=self.image,
            runtime=self.runtime,
            socket_root=self.socket_root,
        )
