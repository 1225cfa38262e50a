"""Adapters against LoRA written by hand on plain transformers; what is trained, saved, published and merged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gang import run_gang
from learners import (
    accumulate,
    hf_log_probs,
    learner_on,
    one_row,
    recipe,
    some_samples,
    train,
    write_model,
)
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from actors.learner import Learner
from actors.persist import merge_checkpoint
from aster.algo.packing import denominators
from aster.errors import ConfigError, DataError

LORA = {"rank": 4, "alpha": 8.0}
SCALE = 2.0  # alpha / rank
LINEARS = 7 * 2  # of two layers


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model_dir(request, tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("lora") / "model", tied=request.param)


def _adapters(learner: Learner) -> dict[str, torch.Tensor]:
    return {n: _full(p.detach()).cpu().clone() for n, p in learner.model.trained().items()}


def _base(learner: Learner) -> dict[str, torch.Tensor]:
    return {n: _full(p.detach()).cpu().clone() for n, p in learner.model.parameters().items()}


def _full(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _perturb(learner: Learner) -> None:
    """b is zero at first, and a has no gradient then; a test of equality must not rest on zeros."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in learner.model.trained().items():
            if name.endswith("lora_b"):
                p.to_local().copy_(torch.randn(p.shape, generator=generator) * 0.1)


def _by_hand(weights: dict[str, torch.Tensor], adapters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W + alpha / rank * B A, in the precision of the arguments."""
    out = dict(weights)
    for name in adapters:
        if name.endswith(".lora_a"):
            stem = name.removesuffix(".lora_a")
            out[f"{stem}.weight"] = (
                out[f"{stem}.weight"] + SCALE * adapters[f"{stem}.lora_b"] @ adapters[f"{stem}.lora_a"]
            )
    return out


def test_gradients_equal_lora_written_by_hand_on_plain_transformers(model_dir):
    samples = some_samples()
    hf = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with learner_on(model_dir, recipe("sft", lora=LORA)) as learner:
        _perturb(learner)
        stats = accumulate(learner, samples)
        adapters = {n: t.requires_grad_() for n, t in _adapters(learner).items()}
        ours = {n: _full(p.grad).clone() for n, p in learner.model.trained().items()}
        assert all(p.grad is None and not p.requires_grad for p in learner.model.parameters().values())
    assert len(adapters) == 2 * LINEARS

    class Merged(torch.nn.Module):
        def forward(self, **kwargs):
            return torch.func.functional_call(hf, _by_hand(dict(hf.named_parameters()), adapters), kwargs=kwargs)

    loss = -sum(hf_log_probs(Merged(), s)[torch.tensor(s.mask[1:])].sum() for s in samples) / denominators(samples)[0]
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    for (name, tensor), grad in zip(adapters.items(), torch.autograd.grad(loss, adapters.values()), strict=True):
        assert grad.abs().max() > 0
        assert (ours[name] - grad).abs().max() < 1e-5 * grad.abs().max(), name
        assert tensor.shape[0 if name.endswith("lora_a") else 1] == 4


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_training_starts_at_the_base_model_and_changes_only_adapters(model_dir, stage):
    samples = some_samples()
    with learner_on(model_dir, recipe(stage)) as plain:
        start = plain.log_probs(one_row(samples)).logprobs
    with learner_on(model_dir, recipe(stage, lora=LORA)) as learner:
        np.testing.assert_array_equal(learner.log_probs(one_row(samples)).logprobs, start)
        base, adapters = _base(learner), _adapters(learner)
        assert all(t.abs().max() > 0 for n, t in adapters.items() if n.endswith("lora_a"))
        first, _ = train(learner, samples)
        for _ in range(5):
            last, _ = train(learner, samples)
        assert stage == "rl" or last.loss < first.loss - 0.1
        assert all(torch.equal(t, base[n]) for n, t in _base(learner).items())
        assert all(not torch.equal(t, adapters[n]) for n, t in _adapters(learner).items())
        assert set(learner.optimizer.state) == set(learner.model.trained().values())
        assert np.abs(learner.log_probs(one_row(samples)).logprobs - start).max() > 1e-3


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_what_is_published_exported_and_merged_is_the_sum_and_the_same_bits(model_dir, tmp_path, compute):
    samples = some_samples()
    model = {"compute_dtype": compute, "gradient_checkpointing": True}
    with learner_on(model_dir, recipe(lora=LORA, model=model)) as learner:
        train(learner, samples)
        train(learner, samples)
        base, adapters = _base(learner), _adapters(learner)
        assert {t.dtype for t in base.values()} == {getattr(torch, compute)}, "no fp32 master of what is frozen"
        assert {t.dtype for t in adapters.values()} == {torch.float32}
        ours = learner.log_probs(one_row(samples)).logprobs
        published = dict(learner.model.named_full_tensors("float32"))
        assert [(m.name, m.shape) for m in learner.weight_metadata()] == [(n, t.shape) for n, t in published.items()]
        learner.save(str(tmp_path / "ck"))
        learner.save_hf(str(tmp_path / "hf"), dtype="float32")
        learner.save_hf(str(tmp_path / "hf16"), dtype="bfloat16")
    assert published.keys() == dict(AutoModelForCausalLM.from_pretrained(model_dir).named_parameters()).keys()
    exact = _by_hand({n: t.double() for n, t in base.items()}, {n: t.double() for n, t in adapters.items()})
    changed = 0
    for name, tensor in published.items():
        assert torch.equal(tensor, exact[name].float()), name
        changed += not torch.equal(tensor, base[name].float())
    assert changed == LINEARS
    for export, dtype in (("hf", "float32"), ("hf16", "bfloat16")):
        exported = load_file(tmp_path / export / "model.safetensors")
        assert all(torch.equal(exported[n], exact[n].to(getattr(torch, dtype))) for n in exact)
        source = str(tmp_path / "hf")  # for its config and tokenizer
        merge_checkpoint(str(tmp_path / "ck"), str(tmp_path / "merged"), source=source, dtype=dtype)
        merged = load_file(tmp_path / "merged" / "model.safetensors")
        assert merged.keys() == exported.keys()
        assert all(torch.equal(merged[n], exported[n]) for n in exported)
    if compute == "float32":
        with learner_on(tmp_path / "merged", recipe(rollout={"dtype": "bfloat16"})) as again:
            assert _base(again).keys() == base.keys()
        with learner_on(tmp_path / "hf", recipe()) as again:
            np.testing.assert_allclose(again.log_probs(one_row(samples)).logprobs, ours, atol=2e-5)


def test_a_checkpoint_holds_adapters_alone_and_resumes_bit_equal(model_dir, tmp_path):
    batches = [some_samples(seed=i) for i in range(4)]
    with learner_on(model_dir, recipe(lora=LORA)) as learner:
        for batch in batches[:2]:
            train(learner, batch)
        learner.save(str(tmp_path / "ck"))
        tail = [train(learner, b) for b in batches[2:]]
        straight = _adapters(learner)
    stored = FileSystemReader(tmp_path / "ck").read_metadata().state_dict_metadata
    expected = {f"model.{n}" for n in straight} | {
        f"optim.{n}.{m}" for n in straight for m in ("exp_avg", "exp_avg_sq")
    }
    assert set(stored) == expected
    with learner_on(model_dir, recipe(lora=LORA)) as learner:
        assert learner.load(str(tmp_path / "ck")) == 2
        again = [train(learner, b) for b in batches[2:]]
        assert all(torch.equal(t, straight[n]) for n, t in _adapters(learner).items())
    for (stats, optim), (stats_again, optim_again) in zip(tail, again, strict=True):
        assert replace(stats, seconds=0) == replace(stats_again, seconds=0)
        assert optim.grad_norm == optim_again.grad_norm


def test_the_reference_of_the_kl_penalty_is_the_model_without_adapters(model_dir):
    samples = [replace(s, reference_logprobs=s.behaviour_logprobs) for s in some_samples()]
    row = one_row(samples)
    with learner_on(model_dir, recipe(lora=LORA, algo={"kl_coef": 0.1})) as learner:
        assert learner.reference is None, "no second copy"
        start = learner.log_probs(row).logprobs
        train(learner, samples)
        np.testing.assert_array_equal(learner.log_probs(row, reference=True).logprobs, start)
        assert np.abs(learner.log_probs(row).logprobs - start).max() > 1e-3, "and only while it is asked for"


def _two_ranks(rank: int, world_size: int, port: int, path: str, checkpoint: str, size: int) -> Any:
    section = {"world_size": world_size, "context_parallel": size}
    learner = Learner(
        recipe(lora=LORA, learner=section),
        model_path=path,
        total_steps=100,
        rank=rank,
        world_size=world_size,
        master=("127.0.0.1", port),
    )
    fresh = _adapters(learner)
    learner.load(checkpoint)
    published = {n: t.clone() for n, t in learner.model.named_full_tensors("float32")}
    samples = some_samples(6)
    accumulate(learner, samples) if size > 1 else _own_rows(learner, samples, rank)
    norm = learner.optim_step().grad_norm
    learner.close()
    return fresh, published, norm


def _own_rows(learner: Learner, samples: Any, rank: int) -> None:
    from aster.algo.packing import pack

    tokens, groups = denominators(samples)
    for ranks in pack(samples, row_tokens=64, dp_size=2):
        learner.forward_backward(ranks[rank], num_loss_tokens=tokens, num_groups=groups)


def test_two_ranks_begin_train_and_publish_like_one(tmp_path):
    path = write_model(tmp_path / "model", intermediate_size=63)  # which two ranks cannot halve
    with learner_on(path, recipe(lora=LORA)) as learner:
        fresh = _adapters(learner)
        train(learner, some_samples())
        learner.save(str(tmp_path / "ck"))
        published = {n: t.clone() for n, t in learner.model.named_full_tensors("float32")}
        norm = train(learner, some_samples(6))[1].grad_norm
    for size in (1, 2):
        ranks = run_gang(2, _two_ranks, str(path), str(tmp_path / "ck"), size, folder=tmp_path / f"gang{size}")
        for theirs, _, their_norm in ranks:
            assert all(torch.equal(t, fresh[n]) for n, t in theirs.items())
            assert their_norm == pytest.approx(norm, rel=1e-5)
        assert all(torch.equal(t, published[n]) for n, t in ranks[0][1].items()), "the same bits from two ranks"
        assert all(t.numel() == 0 for t in ranks[1][1].values())


def test_what_does_not_fit_is_refused(model_dir, tmp_path):
    with (
        pytest.raises(ConfigError, match=r"lora\.targets names wqkv, but .* are down_proj, gate_proj, k_proj"),
        learner_on(model_dir, recipe(lora={"rank": 2, "targets": ["wqkv", "q_proj"]})),
    ):
        pass
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    with learner_on(base, recipe(lora=LORA)) as learner:
        learner.save(str(tmp_path / "ck"))
    other, words = recipe(lora={**LORA, "alpha": 16.0}), r"saved with lora scale=2\.0, this run has 4\.0"
    with learner_on(base, other) as learner, pytest.raises(DataError, match=words):
        learner.load(str(tmp_path / "ck"))
    with learner_on(base, recipe()) as learner, pytest.raises(DataError, match=r"with lora rank=4, this run has 0"):
        learner.load(str(tmp_path / "ck"))
    fewer, words = recipe(lora={**LORA, "targets": ["q_proj"]}), r"has 24 tensors that this model has not .*the lora"
    with learner_on(base, fewer) as learner, pytest.raises(DataError, match=words):
        learner.load(str(tmp_path / "ck"))
    assert json.loads((tmp_path / "ck" / "learner.json").read_text())["lora"]["base"] == str(base.resolve())
    (base / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"their base model cannot be read: .*holds no model\.safetensors"):
        merge_checkpoint(str(tmp_path / "ck"), str(tmp_path / "out"), source=str(model_dir), dtype="float32")
    with pytest.raises(ValueError, match=r"lora\.rank=4 needs learner\.backend=fsdp2"):
        recipe("sft", lora=LORA, learner={"backend": "deepspeed_zero2"})


def test_only_the_layers_that_are_asked_for_get_adapters(model_dir):
    with learner_on(model_dir, recipe(lora={**LORA, "targets": ["q_proj", "v_proj"]})) as learner:
        assert {n.split(".")[-2] for n in learner.model.trained()} == {"q_proj", "v_proj"}
        train(learner, some_samples())
