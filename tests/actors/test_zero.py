"""DeepSpeed against FSDP2: the same losses, gradients, steps and checkpoints, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from learners import one_row, recipe, some_samples, write_model
from ranks import gloo, run_on_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.learner import Learner
from actors.zero import ZeroLearner
from aster.agent.chat import ChatRenderer
from aster.agent.tokenization import ChatTemplate
from aster.algo.packing import denominators, pack
from aster.config import SftConfig
from aster.data.base_corpus import base_conversations
from aster.data.conversations import Messages, to_samples
from aster.data.templates import STATIC_TEMPLATE
from aster.errors import AsterError, ConfigError
from aster.prepare import write_tiny_model
from aster.sft import epoch_batches
from aster.types import OptimStats, StepStats

VARIANTS = {
    "fsdp2": {"backend": "fsdp2"},
    "zero2": {"backend": "deepspeed_zero2"},
    "zero3": {"backend": "deepspeed_zero3"},
    "zero2_offload": {"backend": "deepspeed_zero2", "offload_optimizer": True},
    "zero3_offload": {"backend": "deepspeed_zero3", "offload_optimizer": True},
}
# fp32 on a CPU; what differs is the order of sums. Relative to the largest element of each tensor.
TOLERANCE = 1e-5
CURVE_TOLERANCE = 1e-5  # of every loss of a run; 4e-7 was measured over ten steps


def _learner(rank: int, world_size: int, path: str, variant: str, **sections: Any) -> Learner:
    learner = {"world_size": world_size, "logprob_chunk_tokens": 16, **VARIANTS[variant]}
    made = recipe("sft", **{"learner": {**learner, "step_timeout_s": 60}, "optim": {"lr": 1e-2}, **sections})
    kind = Learner if variant == "fsdp2" else ZeroLearner
    # the group is there already, and outlives the learners: nobody needs the store
    store = dist.HashStore()
    return kind(made, model_path=path, total_steps=10, rank=rank, world_size=world_size, store=store)


def _train(learner: Learner, seed: int) -> tuple[StepStats, OptimStats]:
    """One step over 11 samples in several rows per rank; an odd count, so that one rank gets a row of padding."""
    samples = some_samples(11, seed=seed)
    tokens, groups = denominators(samples)
    stats = StepStats()
    for rows in pack(samples, row_tokens=64, dp_size=learner.world_size):
        stats += learner.forward_backward(rows[learner.rank], num_loss_tokens=tokens, num_groups=groups)
    return stats, learner.optim_step()


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.model.named_full_tensors("float32")}


def _equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _variants(world_size: int) -> list[str]:
    """One rank has nothing to offload that two have not."""
    return [name for name in VARIANTS if world_size > 1 or "offload" not in name]


def _run(rank: int, world_size: int, model: str, out: str) -> None:
    gloo(f"{out}/store", rank, world_size)
    row = one_row(some_samples(5))
    for variant in _variants(world_size):
        root = Path(out, variant)
        learner = _learner(rank, world_size, model, variant)
        start = _weights(learner)
        if rank == 0:
            assert _equal(start, load_file(Path(model) / "model.safetensors")), "masters are those of the directory"
        scores = learner.log_probs(row)
        stats, optim = _train(learner, 0)
        learner.save(str(root / "after_1"))
        steps = [_train(learner, seed) for seed in (1, 2)]
        end = _weights(learner)

        # a gradient that is not finite changes nothing and is forgotten
        plain = learner._backward
        learner._backward = lambda loss, to=plain: to(loss * float("nan"))
        assert _train(learner, 3)[1].skipped
        learner._backward = plain
        assert _equal(_weights(learner), end)
        assert (learner.steps, learner.applied, learner.skipped_in_a_row) == (4, 3, 1)
        assert not _train(learner, 3)[1].skipped
        assert learner.skipped_in_a_row == 0

        # resuming is bit-equal
        assert learner.load(str(root / "after_1")) == 1
        again = [_train(learner, seed) for seed in (1, 2)]
        for (s, o), (s_again, o_again) in zip(steps, again, strict=True):
            assert (s.loss, o.grad_norm, o.lr) == (s_again.loss, o_again.grad_norm, o_again.lr)
        assert _equal(_weights(learner), end)
        learner.save_hf(str(root / "hf"), dtype="float32")

        # and a run may change its backend: what FSDP2 saved after step 1 ends where it ended
        assert learner.load(str(Path(out, "fsdp2", "after_1"))) == 1
        moved = [_train(learner, seed)[0].loss for seed in (1, 2)]
        with pytest.raises(AsterError, match="without forward_backward"):
            learner.optim_step()
        learner.close()
        (root / f"{rank}.json").write_text(
            json.dumps(
                {
                    "loss": stats.loss,
                    "entropy": stats.entropy_sum,
                    "norm": optim.grad_norm,
                    "losses": [s.loss for s, _ in steps],
                    "moved": moved,
                    "log_probs": scores.logprobs.tolist(),
                }
            )
        )


def _run_bf16(rank: int, world_size: int, model: str, out: str) -> None:
    gloo(f"{out}/store", rank, world_size)
    losses, rotary = {}, {}
    for variant in ("fsdp2", "zero2", "zero3"):
        learner = _learner(rank, world_size, model, variant, model={"compute_dtype": "bfloat16"})
        if rank == 0:
            assert _equal(_weights(learner), load_file(Path(model) / "model.safetensors")), "masters are not rounded"
        policy = learner.model.policy if variant == "fsdp2" else learner.model.policy.module
        rotary[variant] = dict(policy.named_buffers())
        losses[variant] = [_train(learner, seed)[0].loss for seed in (0, 0, 0, 0)]
        learner.close()
    for variant in ("zero2", "zero3"):
        assert _equal(rotary[variant], rotary["fsdp2"])
        assert {b.dtype for b in rotary[variant].values()} == {torch.float32}
        assert losses[variant] == pytest.approx(losses["fsdp2"], rel=1e-2), variant  # bf16 has 8 bits
        assert losses[variant][-1] < losses[variant][0]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    # a vocabulary and a width that two ranks cannot halve evenly
    return write_model(tmp_path_factory.mktemp("zero") / "model", intermediate_size=63)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("world_size", [1, 2])
def test_deepspeed_trains_like_fsdp2(model_dir, world_size, tmp_path):
    for variant in _variants(world_size):
        (tmp_path / variant).mkdir()
    run_on_ranks(_run, world_size, str(model_dir), str(tmp_path), timeout_s=280)
    shapes = {name: tensor.shape for name, tensor in load_file(model_dir / "model.safetensors").items()}
    assert "lm_head.weight" not in shapes

    def gradients(variant: str) -> dict[str, torch.Tensor]:
        """exp_avg after one step is (1 - beta1) times the clipped gradient."""
        into = {f"optim.{name}.exp_avg": torch.empty(shape) for name, shape in shapes.items()}
        dcp.load(into, checkpoint_id=str(tmp_path / variant / "after_1"), no_dist=True)
        return into

    def told(variant: str) -> list[dict[str, Any]]:
        return [json.loads((tmp_path / variant / f"{rank}.json").read_text()) for rank in range(world_size)]

    expected, reference = gradients("fsdp2"), told("fsdp2")
    assert reference[0]["norm"] > 1.0, "the clip must act"
    for variant in _variants(world_size):
        for name, ours in gradients(variant).items():
            gap = (ours - expected[name]).abs().max() / expected[name].abs().max()
            assert gap < TOLERANCE, (variant, name)
        for ours, theirs in zip(told(variant), reference, strict=True):
            assert ours["norm"] == pytest.approx(theirs["norm"], rel=TOLERANCE)
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE)
            assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=TOLERANCE)
            assert ours["log_probs"] == pytest.approx(theirs["log_probs"], abs=5e-6)
            # later steps: Adam divides by small second moments and enlarges what little differs
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
            assert ours["moved"] == pytest.approx(theirs["losses"], rel=1e-4)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / variant / "hf")
        assert {name for name, _ in loaded.named_parameters()} == shapes.keys()


def test_bf16_keeps_exact_masters_and_rotary_tables(model_dir, tmp_path):
    run_on_ranks(_run_bf16, 1, str(model_dir), str(tmp_path))


def _curve(rank: int, world_size: int, model: str, out: str) -> None:
    """A whole SFT run per backend, as `aster sft` makes it: its conversations, batches, packing and schedule."""
    gloo(f"{out}/store", rank, world_size)
    renderer = ChatRenderer.from_model_dir(model)
    samples, dropped = to_samples(_conversations(), renderer, max_length=400)
    assert dropped == 0
    schedule = {"lr": 5e-3, "min_lr": 5e-4, "schedule": "cosine_with_min_lr", "warmup_ratio": 0.1}
    for variant in ("fsdp2", "zero3"):
        learner = _learner(rank, world_size, model, variant, optim=schedule)
        plan = [b for e in range(2) for b in epoch_batches(samples, SftConfig(batch_size=16, seed=7), epoch=e)]
        losses, rates = [], []
        for batch in plan:
            tokens, groups = denominators(batch)
            stats = StepStats()
            for rows in pack(batch, row_tokens=600, dp_size=world_size):
                stats += learner.forward_backward(rows[rank], num_loss_tokens=tokens, num_groups=groups)
            losses.append(stats.loss)
            rates.append(learner.optim_step().lr)
        learner.close()
        Path(out, f"{variant}.{rank}.json").write_text(json.dumps({"losses": losses, "rates": rates}))


def _conversations() -> list[Messages]:
    return base_conversations(echoes=40, drills=40, seed=0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_sft_run_has_the_same_loss_curve_on_zero3_and_fsdp2(tmp_path):
    template = ChatTemplate(STATIC_TEMPLATE, special_tokens={})
    texts = [template.render(c, tools=None, add_generation_prompt=False) for c in _conversations()]
    write_tiny_model(tmp_path / "model", texts, seed=0)
    run_on_ranks(_curve, 2, str(tmp_path / "model"), str(tmp_path))

    def told(variant: str) -> dict[str, list[float]]:
        by_rank = [json.loads((tmp_path / f"{variant}.{rank}.json").read_text()) for rank in range(2)]
        # a rank's loss is its share of the batch's, whose denominator counts both
        losses = [sum(pair) for pair in zip(*(r["losses"] for r in by_rank), strict=True)]
        return {"losses": losses, "rates": by_rank[0]["rates"]}

    fsdp2, zero3 = told("fsdp2"), told("zero3")
    assert len(fsdp2["losses"]) == 10
    assert fsdp2["rates"] == zero3["rates"]
    # one step of warm-up; the last of nine after it is at 8/9: 5e-4 + 4.5e-3 * (1 + cos 160 degrees) / 2
    assert (fsdp2["rates"][0], fsdp2["rates"][-1]) == (pytest.approx(5e-3), pytest.approx(6.357e-4, rel=1e-4))
    assert zero3["losses"] == pytest.approx(fsdp2["losses"], rel=CURVE_TOLERANCE)
    assert fsdp2["losses"][-1] < 0.8 * fsdp2["losses"][0], "it must learn, or any two runs agree"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"learner": {"backend": "fsdp2"}}, "is not for ZeroLearner: it takes deepspeed_zero2 or deepspeed_zero3"),
        ({"learner": {"backend": "deepspeed_zero2"}, "model": {"attention": "flash"}}, "attention=flash needs CUDA"),
    ],
)
def test_what_it_cannot_do_is_a_config_error(model_dir, section, words):
    with pytest.raises(ConfigError, match=words):
        ZeroLearner(recipe("sft", **section), model_path=str(model_dir), total_steps=1)
