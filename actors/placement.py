"""Where a gang goes: one bundle per rank, all or nothing, and a clear word when the cluster cannot hold it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from aster.config import Recipe
from aster.errors import ConfigError

_HOPELESS_S = 20.0  # more than the whole cluster has: wait so long for a node that is still joining, no longer


def cluster_device(recipe: Recipe) -> str:
    """ "cuda" or "cpu": what the recipe says, else CUDA if the cluster has any GPU."""
    if recipe.cluster.device != "auto":
        return recipe.cluster.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


def require_shareable(recipe: Recipe) -> None:
    """Raises `ConfigError` where learners and engines cannot share devices, because there are none."""
    if cluster_device(recipe) == "cpu":
        raise ConfigError(
            "cluster.placement=colocated shares GPUs, and there are none (or cluster.device=cpu): use disaggregated"
        )


def learner_bundles(recipe: Recipe) -> list[dict[str, float]]:
    """One bundle per rank: a core, and a GPU where the learner runs on GPUs."""
    bundle = {"CPU": 1.0, "GPU": 1.0} if cluster_device(recipe) == "cuda" else {"CPU": 1.0}
    return [dict(bundle) for _ in range(recipe.learner.world_size)]


async def reserve(
    bundles: Sequence[Mapping[str, float]], *, name: str, timeout_s: float, strategy: str = "PACK"
) -> PlacementGroup:
    """All bundles at once, or `ConfigError` after `timeout_s` that says what was asked for and what the nodes have.

    A gang that exceeds everything the cluster has gets only a short wait for nodes that are still joining.
    """
    group = placement_group([dict(b) for b in bundles], strategy=strategy, name=name)
    patience = timeout_s if _fits(bundles, ray.cluster_resources()) else min(timeout_s, _HOPELESS_S)
    try:
        placed = await asyncio.to_thread(group.wait, patience)
    except BaseException:
        remove_placement_group(group)
        raise
    if not placed:
        remove_placement_group(group)
        raise ConfigError(_shortage(bundles, name=name, waited_s=patience))
    return group


def release(group: PlacementGroup) -> None:
    """Give the bundles back; kills what still runs in them."""
    remove_placement_group(group)


def in_bundle(group: PlacementGroup, index: int) -> dict[str, Any]:
    """Actor options that put an actor into bundle `index` and let it use all of it."""
    bundle = group.bundle_specs[index]
    return {
        "num_cpus": bundle.get("CPU", 0),
        "num_gpus": bundle.get("GPU", 0),
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
    }


def _total(bundles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = {key for bundle in bundles for key in bundle}
    return {key: sum(bundle.get(key, 0) for bundle in bundles) for key in sorted(keys)}


def _fits(bundles: Sequence[Mapping[str, float]], resources: Mapping[str, float]) -> bool:
    return all(amount <= resources.get(key, 0) for key, amount in _total(bundles).items())


def _shortage(bundles: Sequence[Mapping[str, float]], *, name: str, waited_s: float) -> str:
    asked, free, total = _total(bundles), ray.available_resources(), ray.cluster_resources()
    lines = [
        f"{key}: {amount:g} asked, {free.get(key, 0):g} free of {total.get(key, 0):g} in the cluster"
        for key, amount in asked.items()
    ]
    return (
        f"{name}: {len(bundles)} bundles of {dict(bundles[0])} could not be placed within {waited_s:g} s "
        f"({'; '.join(lines)}). Lower learner.world_size or rollout.engines, free the cluster, add nodes, or on a "
        "local cluster raise cluster.num_cpus"
    )
