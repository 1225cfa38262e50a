"""One learner rank on CUDA over NCCL, against the same model in fp32 on the CPU by plain transformers.

Needs torch with CUDA and transformers; neither Ray nor vLLM. Run with `pytest tests/gpu/test_learner_gpu.py`.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from learners import (
    accumulate,
    gradients,
    hf_log_probs,
    learner_on,
    one_row,
    recipe,
    relative_gap,
    some_samples,
    train,
    weights,
    write_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from actors.attention import KERNELS, Packing
from aster.algo.losses import policy_loss
from aster.algo.packing import denominators, padding_row
from aster.config import AlgoConfig
from aster.types import Sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

FLASH = pytest.param(
    "flash", marks=pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
)
ATTENTIONS = ["sdpa", "varlen", "flex", FLASH]
CUDA = {"cluster": {"device": "cuda"}}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    # head_dim 64: what the flash kernels accept
    return write_model(
        tmp_path_factory.mktemp("gpu") / "model",
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        head_dim=64,
    )


@pytest.fixture(scope="module")
def reference(model_dir):
    """(samples, log-probs aligned with ids, loss, gradient by name) in fp32 on the CPU."""
    samples = some_samples(12, longest=120)
    hf = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    parts, log_probs = [], []
    for s in samples:
        current = hf_log_probs(hf, s)
        log_probs.append(np.where(s.mask[1:], current.detach().numpy(), 0.0))
        on = torch.tensor(s.mask[1:])
        losses, _ = policy_loss(
            current[on],
            old_N=torch.tensor(s.old_logprobs[1:])[on],
            behaviour_N=torch.tensor(s.behaviour_logprobs[1:])[on],
            advantages_N=torch.full((int(on.sum()),), s.advantage),
            algo=AlgoConfig(),
        )
        parts.append(losses.sum())
    loss = torch.stack(parts).sum() / denominators(samples)[0]
    loss.backward()
    return samples, log_probs, loss.item(), {n: p.grad.numpy() for n, p in hf.named_parameters()}


def test_fp32_on_cuda_equals_the_cpu(model_dir, reference):
    samples, log_probs, loss, grads = reference
    with learner_on(model_dir, recipe(**CUDA)) as learner:
        assert learner.device.type == "cuda"
        assert all(p.device.type == "cuda" for p in learner.model.parameters().values())
        row = one_row(samples)
        ours = learner.log_probs(row).logprobs
        assert row.sample_index == tuple(range(len(samples)))
        expected = np.concatenate([[*value, 0.0] for value in log_probs])
        np.testing.assert_allclose(ours, expected, atol=2e-4)
        stats = accumulate(learner, samples, row_tokens=300)
        assert stats.loss == pytest.approx(loss, rel=1e-4)
        assert relative_gap(gradients(learner), grads) < 1e-3


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_stays_near_the_fp32_reference(model_dir, reference, attention, checkpointing):
    samples, log_probs, loss, grads = reference
    bf16 = {"compute_dtype": "bfloat16", "attention": attention, "gradient_checkpointing": checkpointing}
    with learner_on(model_dir, recipe(model=bf16, learner={"logprob_chunk_tokens": 64}, **CUDA)) as learner:
        gap = np.abs(
            learner.log_probs(one_row(samples)).logprobs - np.concatenate([[*value, 0.0] for value in log_probs])
        )
        assert gap.mean() < 0.05
        assert gap.max() < 0.6
        stats = accumulate(learner, samples, row_tokens=300)
        assert stats.loss == pytest.approx(loss, abs=0.1 * max(1.0, abs(loss)))
        ours = gradients(learner)
        flat_ours = np.concatenate([ours[n].ravel() for n in grads])
        flat = np.concatenate([g.ravel() for g in grads.values()])
        cosine = flat_ours @ flat / (np.linalg.norm(flat_ours) * np.linalg.norm(flat))
        assert cosine > 0.98
        _, optim = train(learner, samples)
        assert np.isfinite(optim.grad_norm)
        assert not optim.skipped
        assert {p.dtype for p in learner.model.parameters().values()} == {torch.float32}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("window", [None, 100])
def test_a_kernel_agrees_with_sdpa_in_fp32_and_so_do_its_gradients(attention, window):
    """bf16 in, fp32 judge with a written-out mask on the same bf16 numbers; three rows of other lengths in a row."""
    if attention == "sdpa" and window:
        pytest.skip("sdpa has no window")
    for lengths in ([37, 5, 130, 1, 129, 700], [256], [500, 41, 128]):
        generator = torch.Generator().manual_seed(0)
        shapes = [(sum(lengths), h, 64) for h in (8, 2, 2, 8)]
        *heads, upstream = (torch.randn(s, generator=generator).to("cuda", torch.bfloat16) for s in shapes)
        heads = [x.requires_grad_() for x in heads]
        exact = [x.detach().float().requires_grad_() for x in heads]
        boundaries = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
        packing = Packing(lengths=lengths, boundaries=boundaries, kernel=attention)
        out = KERNELS[attention](*heads, packing, scale=0.125, window=window)
        segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()
        back = torch.arange(len(segment), device="cuda")
        back = back[:, None] - back
        allowed = (segment[:, None] == segment) & (back >= 0) & (back < (window or len(segment)))
        q, k, v = (x.transpose(0, 1)[None] for x in exact)
        judge = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, scale=0.125, enable_gqa=True
        )[0].transpose(0, 1)
        torch.testing.assert_close(out.float(), judge, rtol=2e-2, atol=2e-2)
        ours = torch.autograd.grad(out, heads, upstream)
        theirs = torch.autograd.grad(judge, exact, upstream.float())
        for a, b in zip(ours, theirs, strict=True):
            assert (a.float() - b).norm() < 1e-2 * b.norm()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_packing_does_not_leak_between_segments(model_dir, reference, attention):
    """A segment's log-probs do not move when its neighbours change (bf16)."""
    samples = reference[0]
    section = {"compute_dtype": "bfloat16", "attention": attention}
    with learner_on(model_dir, recipe(model=section, **CUDA)) as learner:
        row = one_row(samples)
        other = copy.deepcopy(row)
        last = row.segment_ids == row.segment_ids.max()
        other.input_ids[~last] = (other.input_ids[~last] + 1) % 97
        before, after = learner.log_probs(row).logprobs, learner.log_probs(other).logprobs
        np.testing.assert_array_equal(before[last], after[last])
        assert not np.array_equal(before[~last], after[~last])


def test_checkpoints_and_exports_round_trip_on_cuda(model_dir, tmp_path):
    samples = some_samples()
    bf16 = {"compute_dtype": "bfloat16"}
    with learner_on(model_dir, recipe(model=bf16, **CUDA)) as learner:
        train(learner, samples)
        learner.save(str(tmp_path / "ck"))
        saved = weights(learner)
        learner.save_hf(str(tmp_path / "hf"), dtype="bfloat16")
        train(learner, samples)
        assert learner.load(str(tmp_path / "ck")) == 1
        assert all(torch.equal(t, saved[n]) for n, t in weights(learner).items())
        wire = dict(learner.model.named_full_tensors("bfloat16"))
        assert all(t.device.type == "cuda" for t in wire.values())
    for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
        assert torch.equal(tensor, wire[name].cpu()), name
        assert torch.equal(tensor, saved[name].bfloat16()), name
    with learner_on(model_dir, recipe(cluster={"device": "cpu"})) as on_cpu:  # the checkpoint knows no device
        on_cpu.load(str(tmp_path / "ck"))
        assert all(torch.equal(t, saved[n]) for n, t in weights(on_cpu).items())


def test_a_long_row_needs_no_square_of_memory(model_dir):
    """32k tokens in one segment: a dense mask alone would take 1 GiB, logits in fp32 another 12 MiB per 1k rows."""
    rng = np.random.default_rng(0)
    n = 32_768
    old = rng.normal(-4.5, 0.3, n).astype(np.float32)
    sample = Sample(rng.integers(0, 97, n).astype(np.int32), np.ones(n, bool), 1.0, 0, old, old)
    bf16 = {"compute_dtype": "bfloat16", "gradient_checkpointing": True}
    with learner_on(model_dir, recipe(model=bf16, **CUDA)) as learner:
        accumulate(learner, some_samples())
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        stats = accumulate(learner, [sample], row_tokens=n)
        assert np.isfinite(stats.loss)
        assert torch.cuda.max_memory_allocated() - before < 900 << 20


def test_a_padding_row_gives_zero_gradients_on_cuda(model_dir):
    with learner_on(model_dir, recipe(model={"compute_dtype": "bfloat16"}, **CUDA)) as learner:
        learner.forward_backward(padding_row(), num_loss_tokens=3, num_groups=1)
        assert all((g == 0).all() for g in gradients(learner).values())


def test_offloaded_masters_train_and_publish_like_resident_ones(model_dir, tmp_path):
    samples = some_samples()
    results = []
    for offload in (False, True):
        with learner_on(model_dir, recipe(learner={"offload_optimizer": offload}, **CUDA)) as learner:
            assert {p.device.type for p in learner.model.parameters().values()} == {"cpu" if offload else "cuda"}
            train(learner, samples)
            learner.save(str(tmp_path / "ck"))
            _, optim = train(learner, samples)
            learner.load(str(tmp_path / "ck"))
            _, again = train(learner, samples)
            assert again.grad_norm == pytest.approx(optim.grad_norm, rel=1e-5)
            wire = dict(learner.model.named_full_tensors("bfloat16"))
            assert {t.device.type for t in wire.values()} == {"cuda"}
            results.append((weights(learner), optim.grad_norm))
    (resident, norm), (offloaded, norm_too) = results
    assert norm_too == pytest.approx(norm, rel=1e-4)
    for name, tensor in resident.items():  # one AdamW is a CUDA kernel, the other the CPU's
        torch.testing.assert_close(offloaded[name], tensor, rtol=0, atol=2e-4)


def test_adapters_train_in_bf16_and_leave_merged(model_dir, tmp_path):
    samples = some_samples()
    sections = {"lora": {"rank": 8}, "model": {"compute_dtype": "bfloat16"}, **CUDA}
    with learner_on(model_dir, recipe("sft", **sections)) as learner:
        assert {p.dtype for p in learner.model.parameters().values()} == {torch.bfloat16}
        first, _ = train(learner, samples)
        for _ in range(20):
            last, _ = train(learner, samples)
        assert last.loss < 0.7 * first.loss
        ours = learner.log_probs(one_row(samples)).logprobs
        learner.save_hf(str(tmp_path / "hf"), dtype="float32")
    with learner_on(tmp_path / "hf", recipe("sft", model={"compute_dtype": "bfloat16"}, **CUDA)) as merged:
        assert np.abs(merged.log_probs(one_row(samples)).logprobs - ours).mean() < 0.1


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_ligers_kernels_give_the_same_log_probs_and_gradients(model_dir, reference):
    samples, log_probs, loss, grads = reference
    with learner_on(model_dir, recipe(model={"liger": True}, **CUDA)) as learner:
        expected = np.concatenate([[*value, 0.0] for value in log_probs])
        np.testing.assert_allclose(learner.log_probs(one_row(samples)).logprobs, expected, atol=5e-4)
        assert accumulate(learner, samples, row_tokens=300).loss == pytest.approx(loss, rel=1e-3)
        assert relative_gap(gradients(learner), grads) < 5e-3
