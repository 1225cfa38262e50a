"""The learner's benchmarks: their arithmetic, and that what ours is compared with computes the same."""

from __future__ import annotations

import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from learners import gradients, learner_on, recipe, relative_gap, write_model
from transformers import Qwen3Config

sys.path.insert(0, str(Path(__file__).parent))

import bench_learner
from learner_work import (
    Cost,
    Head,
    PaddedLoop,
    cost,
    dense_peak,
    forward_flops,
    lengths_of,
    mfu,
    padded_batches,
    samples_of,
    waste,
)

from aster.algo.packing import denominators, pack
from aster.errors import DataError

CPU = torch.device("cpu")


def test_padded_batches_and_packed_rows_have_the_same_gradient(tmp_path):
    path = write_model(tmp_path / "model")
    samples = samples_of([(3, 9), (5, 20), (2, 4), (7, 15)], vocab=97)
    tokens, groups = denominators(samples)
    plain = PaddedLoop(path, device=CPU, dtype="float32", recompute=False, chunk_tokens=8)
    loss = sum(
        plain.forward_backward(batch, num_loss_tokens=tokens)
        for batch in padded_batches(samples, tokens=60, by_length=True)
    )
    theirs = {name: p.grad.numpy() for name, p in plain.model.named_parameters()}
    with learner_on(path, recipe("sft")) as learner:
        rows = [row for [row] in pack(samples, row_tokens=60, dp_size=1)]
        ours = sum(learner.forward_backward(row, num_loss_tokens=tokens, num_groups=groups).loss for row in rows)
        assert ours == pytest.approx(loss, rel=1e-5)
        assert relative_gap(gradients(learner), theirs) < 1e-5


def test_padded_batches_keep_to_the_budget_and_sorting_saves_places():
    samples = samples_of([(2, 8), (1, 1), (2, 8), (1, 1)], vocab=9)
    given, by_length = (padded_batches(samples, tokens=20, by_length=on) for on in (False, True))
    assert [[len(s) for s in batch] for batch in given] == [[10, 2], [10, 2]]
    assert [[len(s) for s in batch] for batch in by_length] == [[10, 10], [2, 2]]
    assert waste(given) == pytest.approx(16 / 40)
    assert waste(by_length) == 0
    assert [len(b) for b in padded_batches(samples, tokens=5, by_length=True)] == [1, 1, 2], "a long one stands alone"


def test_both_heads_give_the_same_log_probs_and_ours_holds_less():
    """In a process of its own: whatever else happens in this one would count as theirs."""
    with get_context("spawn").Pool(1) as pool:
        ours, full = pool.apply(_cost_of_both_heads)
    assert full.peak_bytes > 2 * 320 * 151_936 * 4
    assert ours.peak_bytes < full.peak_bytes / 3
    assert min(ours.seconds, full.seconds) > 0


def _cost_of_both_heads() -> tuple[Cost, Cost]:
    head = Head(rows=320, hidden=16, vocab=151_936, device=CPU, dtype=torch.float32)
    head.ours(chunk_tokens=64)
    with cost(CPU) as ours:
        chunked = head.ours(chunk_tokens=64)
    with cost(CPU) as full:
        torch.testing.assert_close(head.full(), chunked, rtol=0, atol=1e-4)
    return ours, full


def test_flops_by_hand():
    """1 layer, width 4 = 2 heads x 2, 1 key head, MLP 3, vocabulary 5; samples of 1 and 2 tokens, 2 loss tokens."""
    config = Qwen3Config(
        vocab_size=5, hidden_size=4, intermediate_size=3, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=2,
    )  # fmt: skip
    weights = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 3  # q, k and v, o, three of the MLP = 84
    assert forward_flops(config, [1, 2], loss_tokens=2) == 2 * 3 * weights + 2 * (1 + 4) * 4 + 2 * 2 * 4 * 5 == 624
    assert mfu(1e12, 0.01, peak=989e12) == pytest.approx(0.3033, abs=1e-4)
    assert mfu(1e12, 0.01, peak=None) is None
    assert dense_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert dense_peak("NVIDIA H100 PCIe") == 756e12
    assert dense_peak("Some other device") is None


def test_lengths_come_from_a_file_or_a_seed(tmp_path):
    assert lengths_of(None, count=3) == lengths_of(None, count=None)[:3]
    (tmp_path / "a.json").write_text('{"seed": 1, "lengths": [[3, 4], [5, 6]]}')
    assert lengths_of(str(tmp_path / "a.json"), count=1) == [(3, 4)]
    (tmp_path / "b.json").write_text('{"lengths": [3, 4]}')
    with pytest.raises(DataError, match=r"b\.json must hold a list `lengths` of \[prompt tokens, completion tokens\]"):
        lengths_of(str(tmp_path / "b.json"), count=None)
    sample = samples_of([(3, 4)], vocab=50)[0]
    assert np.flatnonzero(sample.mask).tolist() == [3, 4, 5, 6]


def test_the_benchmark_prints_what_it_promises(monkeypatch):
    small = ["--samples", "4", "--rounds", "1", "--row-tokens", "600", "--head-rows", "0"]
    monkeypatch.setattr(bench_learner, "_weight_sync", lambda: {"benchmark": "weight_sync"})
    result = bench_learner.measure(bench_learner.parsed(small))
    assert result["weight_sync"] == {"benchmark": "weight_sync"}
    assert bench_learner.parsed([*small, "--no-weight-sync"]).weight_sync is False
    assert result["tokens"] == sum(map(sum, lengths_of(None, count=4)))
    assert result["targets"].keys() == {"packed_vs_padded", "packed_vs_sorted"}
    assert all(result[kind]["tokens_per_s"] > 0 for kind in ("packed", "padded", "sorted"))
    assert result["mfu"] is None, "no device of the table here"
