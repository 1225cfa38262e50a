"""`aster plan` against a compute table for 8, 64 and 1,024 GPUs that was worked out by hand."""

import json
from dataclasses import replace

import pytest

from aster.cli import main
from aster.config import Recipe
from aster.errors import ConfigError, DataError
from aster.plan import workload_of
from aster.planning import GB, GPUS, QWEN3_4B, ModelShape, Plan, Workload, layer_bytes, learner_memory, make_plan

H100, H200 = GPUS["h100-80"], GPUS["h200"]


def work(gpus: int, mean_tokens: float = 10_000, *overrides: str, recipe: str = "rl_stage1_18k") -> Workload:
    return workload_of(Recipe.load(recipe, overrides), gpus=gpus, mean_tokens=mean_tokens, calls=12)


def plan(gpus: int, mean_tokens: float = 10_000, *, gpu=H100) -> Plan:
    return make_plan(QWEN3_4B, gpu, work(gpus, mean_tokens))


def test_the_papers_model_has_the_parameters_and_bytes_of_its_card():
    assert QWEN3_4B.parameters == 4_022_468_096
    assert QWEN3_4B.kv_bytes == 147_456
    assert QWEN3_4B.weight_bytes / GB == pytest.approx(8.04, abs=0.01)
    # 8.04 G + 0.295 M x length
    for length, giga in ((8_000, 10.4), (10_000, 11.0), (16_384, 12.9), (18_432, 13.5), (32_768, 17.7), (94_208, 35.8)):
        assert QWEN3_4B.forward_flops(length) / 1e9 == pytest.approx(giga, abs=0.06)


@pytest.mark.parametrize("gpus", [8, 64, 1024])
@pytest.mark.parametrize(("tokens", "update", "old"), [(10_000, 142, 36), (20_000, 373, 93)])
def test_learner_seconds(gpus, tokens, update, old):
    """The table's figures for 8 GPUs, shared out: its others (18+4, 47+12, 1.1+0.3, 3+0.7) are these, rounded."""
    got = plan(gpus, tokens)
    assert got.update_s == pytest.approx(update * 8 / gpus, rel=0.04)
    assert got.proximal_s == pytest.approx(old * 8 / gpus, rel=0.04)


@pytest.mark.parametrize(
    ("gpus", "tokens", "h100", "h200"),
    [(8, 10_000, 453, 302), (8, 20_000, 1810, 1190), (64, 10_000, 84, 59), (64, 20_000, 268, 187)],
)
def test_decoding_seconds(gpus, tokens, h100, h200):
    assert plan(gpus, tokens).decode_s == pytest.approx(h100, rel=0.01)
    assert plan(gpus, tokens, gpu=H200).decode_s == pytest.approx(h200, rel=0.01)


def test_at_1024_gpus_the_longest_trajectory_decides():
    got = plan(1024)
    assert got.decode_s < got.tail_s
    assert 60 <= got.generate_s <= 95


def test_what_the_kv_cache_admits():
    assert round(plan(8).sequences) == 81
    assert round(make_plan(QWEN3_4B, H200, replace(work(8), trajectories=8 * 512)).sequences) == 156
    for tokens, h100, h200 in ((18_432, 22, 42), (32_768, 12, 24), (94_208, 4, 8)):
        long = replace(work(8), max_tokens=tokens)
        assert round(make_plan(QWEN3_4B, H100, long).full_sequences) == h100
        assert round(make_plan(QWEN3_4B, H200, long).full_sequences) == h200


def test_sandbox_weights_and_disk():
    got = plan(8)
    assert got.tokens == pytest.approx(10.2e6, rel=0.01)
    assert (round(got.calls_per_s), round(got.peak_calls_per_s)) == (27, 81)
    assert got.session_memory / GB == pytest.approx(64, rel=0.02)
    assert got.sync_s == pytest.approx(0.2, rel=0.02)
    assert got.disk_checkpoints / 3 / GB == pytest.approx(48.3, rel=0.01)
    assert got.disk_per_step / 1e6 == pytest.approx(92 + 36, rel=0.01)
    assert got.step_s / 60 == pytest.approx(11, rel=0.05), "405 steps are three days"


@pytest.mark.parametrize(("micro", "hidden", "layer"), [(18_432, 3.4, 1.6), (32_768, 6.0, 2.9), (94_208, 17.4, 8.2)])
def test_learner_memory(micro, hidden, layer):
    """The table counts what a fused layer keeps; plain operations keep more (`layer_bytes`)."""
    parts = learner_memory(QWEN3_4B, replace(work(8), micro_batch_tokens=micro, fused=True))
    assert parts["sharded masters, gradients, Adam"] / GB == pytest.approx(8.04, abs=0.01)
    assert parts["checkpointed hidden states"] / GB == pytest.approx(hidden, abs=0.05)
    assert parts["one layer recomputed"] / GB == pytest.approx(layer, rel=0.03)
    at_64 = learner_memory(QWEN3_4B, work(64))
    assert at_64["sharded masters, gradients, Adam"] / GB == pytest.approx(1.0, abs=0.01)


def test_what_a_layer_keeps_is_what_was_counted_in_its_saved_tensors():
    """H 64, q 64, k 32, F 160: 5,888 bytes a token in fp32, 3,392 in bf16, weights and row sums aside."""
    small = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=160, vocab=97, tied=True)
    assert (layer_bytes(small, 4), layer_bytes(small, 2)) == (5888, 3392)
    assert layer_bytes(small, 2, fused=True) == 2 * (2 * 64 + 2 * 64 + 2 * 32 + 3 * 160)


def test_moments_that_do_not_meet_are_not_added_up():
    at = replace(work(8), micro_batch_tokens=32_768, logprob_chunk_tokens=512)
    parts = learner_memory(QWEN3_4B, at)
    assert "one layer recomputed" in parts
    assert "logits in chunks" not in parts
    wide = learner_memory(QWEN3_4B, replace(at, logprob_chunk_tokens=8192))
    assert wide["logits in chunks"] == 3 * 4 * 8192 * 151_936
    assert "one layer recomputed" not in wide


def test_the_peak_of_a_32k_micro_batch_is_below_30_gb():
    assert sum(learner_memory(QWEN3_4B, replace(work(8), micro_batch_tokens=32_768)).values()) < 30 * GB


def test_without_checkpointing_nothing_is_computed_twice():
    kept = make_plan(QWEN3_4B, H200, work(64, 10_000, "learner.micro_batch_tokens=18432"))
    gone = make_plan(
        QWEN3_4B,
        H200,
        replace(work(64, 10_000, "model.gradient_checkpointing=false"), micro_batch_tokens=10_000, fused=True),
    )
    assert (kept.update_s, gone.update_s) == (4 * kept.proximal_s, 3 * kept.proximal_s)


def test_an_engine_runs_no_more_sequences_than_it_is_allowed():
    few = make_plan(QWEN3_4B, H100, work(8, 10_000, "rollout.max_num_seqs=16"))
    assert (few.sequences, few.full_sequences) == (16, 16)
    # 128 trajectories in 8 waves of 8,500 tokens, each a pass over 8.04 GB and 16 * 5,000 * 147,456 B at 2.01e12 B/s
    assert few.decode_s == pytest.approx(671, rel=0.01)


def test_lora_keeps_gradients_and_moments_of_its_adapters_alone():
    at = work(8, 10_000, "lora.rank=16")
    # a layer: q 2560 + 4096, k and v 2560 + 1024 each, o 4096 + 2560, gate, up and down 2560 + 9728 each
    adapters = 16 * 36 * (6656 + 2 * 3584 + 6656 + 3 * 12_288)
    parts = learner_memory(QWEN3_4B, at)
    assert parts["sharded masters, gradients, Adam"] == 16 * adapters / 8
    assert parts["sharded frozen weights"] / GB == pytest.approx(8.04 / 8, abs=0.01)
    assert parts["gradient of the embedding, whole"] == 0
    got = make_plan(QWEN3_4B, H100, at)
    assert got.disk_checkpoints == 3 * 12 * adapters
    weights_alone = 10.24e6 * 2 * 4.022e9 / (0.4 * 989e12 * 8)
    assert plan(8).update_s - got.update_s == pytest.approx(weights_alone, rel=0.01)
    assert make_plan(QWEN3_4B, H100, work(1, 10_000, "lora.rank=16", "learner.micro_batch_tokens=18432"))
    with pytest.raises(ConfigError, match=r"lora\.targets names wqkv"):
        learner_memory(QWEN3_4B, work(8, 10_000, "lora.rank=16", "lora.targets=[wqkv]"))


def test_a_kl_penalty_costs_a_forward_pass_and_without_lora_a_second_model():
    got = make_plan(QWEN3_4B, H100, work(8, 10_000, "algo.kl_coef=0.01"))
    assert got.reference_s == got.proximal_s > 0
    assert got.step_s == pytest.approx(plan(8).step_s + got.reference_s)
    assert got.learner_memory["sharded reference model in fp32"] / GB == pytest.approx(16.09 / 8, abs=0.01)
    adapters = make_plan(QWEN3_4B, H100, work(8, 10_000, "algo.kl_coef=0.01", "lora.rank=16"))
    assert adapters.reference_s == got.reference_s
    assert "sharded reference model in fp32" not in adapters.learner_memory


def test_what_cannot_fit_is_refused_with_the_sum_and_the_cure():
    with pytest.raises(ConfigError, match=r"learner rank does not fit h100-80: 64\.4 .* GB, and .* 76\.0 .*offload"):
        make_plan(QWEN3_4B, H100, work(1))
    with pytest.raises(ConfigError, match=r"engine GPU does not fit .*KV of one full sequence.*tensor_parallel"):
        make_plan(QWEN3_4B, H100, replace(work(8), max_tokens=500_000))
    assert make_plan(
        QWEN3_4B, H100, work(1, 10_000, "learner.offload_optimizer=true", "learner.micro_batch_tokens=18432")
    )


def test_gpus_beyond_the_kv_heads_hold_copies_of_them():
    """8 KV heads: 16 GPUs hold as much KV each as 8 do, and less of the weights."""
    full = [make_plan(QWEN3_4B, H100, work(64, 10_000, f"rollout.tensor_parallel={n}")).full_sequences for n in (8, 16)]
    # (0.9 * 80 - 4 - 8.04 / TP) GB over 18,432 * 147,456 / 8 bytes
    assert full == [pytest.approx(197.2, abs=0.1), pytest.approx(198.7, abs=0.1)]


@pytest.mark.parametrize(
    ("gpus", "tensor_parallel", "says"),
    [
        (7, 7, r"=7 cannot share out .* 32 attention and 8 key-value heads: use one of 1, 2, 4, 8, 16, 32"),
        (64, 64, r"tensor_parallel=64 cannot share out"),
        (12, 8, r"12 GPUs cannot be split into engines of rollout\.tensor_parallel=8 GPUs: .*multiple of 8"),
        (4, 8, r"4 GPUs cannot be split"),
    ],
)
def test_engines_that_cannot_be_are_refused(gpus, tensor_parallel, says):
    with pytest.raises(ConfigError, match=says):
        make_plan(QWEN3_4B, H100, work(gpus, 10_000, f"rollout.tensor_parallel={tensor_parallel}"))


def test_heads_that_neither_divide_each_other_nor_are_divided_are_refused():
    six = replace(QWEN3_4B, heads=24, kv_heads=6)
    make_plan(six, H100, work(12, 10_000, "rollout.tensor_parallel=12"))
    with pytest.raises(ConfigError, match=r"24 attention and 6 key-value heads: use one of 1, 2, 3, 6, 12, 24"):
        make_plan(six, H100, work(8, 10_000, "rollout.tensor_parallel=4"))


def test_a_model_directory_gives_the_shape(tmp_path):
    config = {
        "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 9728, "vocab_size": 151_936, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelShape.from_config(tmp_path / "config.json") == QWEN3_4B
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="num_attention_heads"):
        ModelShape.from_config(tmp_path / "config.json")


def test_the_command_prints_predictions_and_refuses_nonsense(capsys):
    assert main(["plan", "--recipe", "rl_stage1_18k", "--gpus", "8", "--mean-tokens", "10000"]) == 0
    out = capsys.readouterr().out
    assert "predictions" in out
    assert "453" in out
    assert main(["plan", "--mean-tokens", "99999999"]) == 1
    assert "18432" in capsys.readouterr().err
    for calls in ("nan", "inf", "-1"):
        assert main(["plan", "--calls", calls]) == 1
        assert f"--calls {calls} must be a number" in capsys.readouterr().err
