"""Joining or starting a Ray cluster, quietly, with the environment that every actor of ours needs."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import ray

from aster.config import ClusterConfig

NAMESPACE = "aster"


def connect(config: ClusterConfig) -> bool:
    """Join the cluster that `config.address` or RAY_ADDRESS names, else start a local one. False: joined before.

    Inside `ray job submit` RAY_ADDRESS is set, so the same command works in both places. A local cluster is started
    without authentication and without dashboard (loopback only, ends with the process); `make cluster-up` starts a
    real one with both.
    """
    if ray.is_initialized():
        return False
    _forget_serve()
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # its log files have everything; a terminal shows progress
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        address=address,
        namespace=NAMESPACE,
        num_cpus=config.num_cpus if address is None else None,
        include_dashboard=False if address is None else None,
        logging_level=logging.WARNING,
        log_to_driver=os.environ.get("ASTER_RAY_LOGS", "0") == "1",
        configure_logging=True,
    )
    return True


def _forget_serve() -> None:
    """Serve keeps its controller's handle when Ray shuts down, and would ask the last cluster's about this one."""
    if (context := sys.modules.get("ray.serve.context")) is not None:
        context._disconnect()


def disconnect() -> None:
    """Leave the cluster; a local one ends with this."""
    if ray.is_initialized():
        ray.shutdown()
