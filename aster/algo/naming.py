"""Parameter names: the learner's module tree against a Hugging Face checkpoint. Strings only.

The learner wraps the Hugging Face model as `hf` of its own root module, and torch may put markers of its wrappers into
a name. A checkpoint, a weight on the wire and a file on disk know only the Hugging Face name.

    hf.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight   <->   model.layers.0.mlp.up_proj.weight
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

ROOT = "hf."
_MARKERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def to_hf(name: str) -> str:
    """The checkpoint name of a learner parameter. A Hugging Face name comes back as it is."""
    for marker in _MARKERS:
        name = name.replace(marker, "")
    return name.removeprefix(ROOT)


def missing_and_unexpected(
    expected: Iterable[str], found: Iterable[str], *, tied: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Checkpoint names that are absent, and those that nothing asks for.

    `tied` maps an alias to the name it shares storage with (`lm_head.weight` -> `model.embed_tokens.weight`): a
    checkpoint may list the alias as well, which is neither missing nor unexpected.
    """
    wanted, present = set(expected), set(found)
    return sorted(wanted - present - set(tied)), sorted(present - wanted - set(tied))
