"""Every part of bench-gpu on the device, small: what the CPU twin cannot show is the kernels, NCCL and CUDA IPC.

Needs torch with CUDA and transformers; neither Ray nor vLLM.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from bench_gpu import PARTS, Scale, measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_every_part_measures_something_on_the_device(tmp_path):
    config = Qwen3Config(
        vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    scale = Scale(
        config=config,
        device=torch.device("cuda", 0),
        tokens=(512, 2048),
        longest=512,
        rounds=2,
        head_rows=1024,
        sync_bytes=64 << 20,
        peak=989e12,
        folder=tmp_path,
    )
    result = measure(scale, list(PARTS))
    assert all(0 < figures["mfu"] < 1 for figures in result["step"].values())
    ran = {kernel for kernel, figures in result["attention"].items() if "seconds" in figures}
    assert {"sdpa", "varlen", "flex"} <= ran
    assert result["head"]["ours"]["peak_mib"] < result["head"]["full_logits"]["peak_mib"]
    assert result["precision"]["gap_max"] < 0.6
    assert min(result["sync"]["wire_world_1_s"], result["sync"]["cuda_ipc_s"]) > 0
