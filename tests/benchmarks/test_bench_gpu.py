"""bench-gpu without its device: every part runs, small, on a CPU; and the command says that it measured nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

sys.path.insert(0, str(Path(__file__).parent))

import bench_gpu
from bench_gpu import PARTS, Scale, measure

CONFIG = Qwen3Config(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    scale = Scale(
        config=CONFIG,
        device=torch.device("cpu"),
        tokens=(48, 96),
        longest=40,
        rounds=1,
        head_rows=64,
        sync_bytes=1 << 20,
        peak=1e12,
        folder=tmp_path_factory.mktemp("model"),
    )
    return measure(scale, list(PARTS))


def test_the_step_reports_speed_mfu_and_the_heads_share_for_each_length(result):
    assert result["step"].keys() == {"48", "96"}
    for figures in result["step"].values():
        assert figures["tokens_per_s"] > 0
        assert 0 < figures["mfu"] < 1
        assert 0 < figures["head_share"] < 1
        assert figures["kernel"] == "sdpa"


def test_kernels_that_cannot_run_here_say_why_and_the_others_are_timed(result):
    assert result["attention"]["sdpa"]["seconds"] > 0
    for kernel in ("flash", "varlen", "flex"):
        assert "needs CUDA" in result["attention"][kernel]["cannot_run"]


def test_both_heads_both_precisions_and_all_variants_of_recomputation_are_there(result):
    assert result["head"].keys() == {"ours", "full_logits"}
    assert 0 < result["precision"]["gap_mean"] <= result["precision"]["gap_max"] < 0.2
    assert result["precision"].keys() == {"float32", "bfloat16", "gap_mean", "gap_max"}
    assert result["checkpointing"].keys() == {"kept", "recomputed", "recomputed, masters in host memory"}
    assert all(figures["tokens_per_s"] > 0 for figures in result["checkpointing"].values())


def test_bytes_go_through_the_wire_and_ipc_needs_a_device(result):
    assert result["sync"].keys() == {"bytes", "wire_world_1_s"}
    assert result["sync"]["wire_world_1_s"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_command_says_so_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    assert bench_gpu.main() == 1
    out = capsys.readouterr()
    assert out.out == ""
    assert "no CUDA device here, and nothing was measured" in out.err


def test_a_shape_that_does_not_fit_is_a_finding():
    def too_large() -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB\nmore")

    assert bench_gpu._or_out_of_memory(too_large) == {"out_of_memory": "CUDA out of memory. Tried to allocate 8 GiB"}
