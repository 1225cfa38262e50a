"""The attention kernels against each segment alone, and the silent traps of packing, each shown to be one."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from learners import hf_log_probs, learner_on, one_row, recipe, some_samples, write_model
from transformers import AutoModelForCausalLM

from actors.attention import KERNELS, PACKED, Packing, _without_flash, choose, packed_attention
from aster.errors import ConfigError

LENGTHS = [37, 5, 130, 1, 129, 200]  # cuts inside, at and across blocks of 128


def _packing(lengths: list[int], kernel: str) -> Packing:
    boundaries = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return Packing(lengths=lengths, boundaries=boundaries, kernel=kernel)


def _heads(tokens: int, *, query_heads: int = 4, key_heads: int = 2, size: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, h, size) for h in (query_heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float32).requires_grad_() for shape in shapes]


def _by_hand(q, k, v, *, scale: float, window: int | None = None) -> torch.Tensor:
    """softmax(q k) v of one segment with a written-out mask."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    back = torch.arange(len(q))[:, None] - torch.arange(len(q))
    allowed = (back >= 0) & (back < (window or len(q)))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(("kernel", "window"), [("sdpa", None), ("flex", None), ("flex", 50), ("flex", 128)])
@pytest.mark.parametrize("lengths", [LENGTHS, [256], [3], [128, 128]])
def test_a_kernel_gives_each_segment_what_it_gets_alone(kernel, window, lengths):
    heads = _heads(sum(lengths))
    upstream = torch.randn(heads[0].shape, generator=torch.Generator().manual_seed(1))
    expected = torch.cat(
        [_by_hand(*part, scale=0.3, window=window) for part in zip(*(x.split(lengths) for x in heads), strict=True)]
    )
    given = [x.detach() for x in heads] if kernel == "flex" else heads  # no backward here; tests/gpu has its gradients
    out = KERNELS[kernel](*given, _packing(lengths, kernel), scale=0.3, window=window)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if kernel == "flex":
        return
    ours, theirs = (torch.autograd.grad((x * upstream).sum(), heads) for x in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_block_mask_names_every_allowed_pair_and_skips_blocks_of_other_segments():
    packing = _packing(LENGTHS, "flex")
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    total = len(segment)
    allowed = (segment[:, None] == segment) & (torch.arange(total)[:, None] >= torch.arange(total))
    for window in (None, 60):
        mask = packing.block_mask(window)
        pairs = allowed if window is None else allowed & (torch.arange(total)[:, None] - torch.arange(total) < window)
        padded = torch.nn.functional.pad(pairs, (0, -total % 128, 0, -total % 128))
        blocks = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).any(3).any(1)
        assert torch.equal(mask.to_dense()[0, 0].bool(), blocks)
    assert packing.block_mask(None) is packing.block_mask(None), "one mask per row, not one per layer"
    assert packing.block_mask(None).full_kv_num_blocks is not None
    assert int(_packing([1024], "flex").block_mask(None).full_kv_num_blocks.sum()) == 8 * 7 // 2


def test_flash_is_called_with_the_whole_rows_boundaries(monkeypatch):
    """The package needs a GPU; what we hand to it does not. The stand-in computes what flash-attn documents."""
    seen = {}

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size
    ):
        assert causal
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        seen.update(longest=(max_seqlen_q, max_seqlen_k), window=window_size)
        lengths = cu_seqlens_q.diff().tolist()
        window = None if window_size == (-1, -1) else window_size[0] + 1  # flash counts the tokens before this one
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([_by_hand(*part, scale=softmax_scale, window=window) for part in parts])

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    heads = [x.detach() for x in _heads(sum(LENGTHS))]
    for window in (None, 50):
        ours = KERNELS["flash"](*heads, _packing(LENGTHS, "flash"), scale=0.3, window=window)
        flex = KERNELS["flex"](*heads, _packing(LENGTHS, "flex"), scale=0.3, window=window)
        torch.testing.assert_close(ours, flex, rtol=1e-5, atol=1e-5)
    assert seen == {"longest": (200, 200), "window": (49, 0)}


@pytest.mark.parametrize(
    ("asked", "words"), [({"softcap": 50.0}, r"softcap=50\.0"), ({"s_aux": torch.zeros(4)}, "s_aux")]
)
def test_capped_scores_and_sinks_are_refused(asked, words):
    q, k, v = (x.transpose(0, 1)[None] for x in _heads(8))
    with pytest.raises(ConfigError, match=f"Linear wants {words}.*Qwen's and Llama's"):
        packed_attention(torch.nn.Linear(1, 1), q, k, v, None, packing=_packing([8], "sdpa"), **asked)


def test_a_sample_longer_than_a_sliding_window_is_refused_with_both_numbers():
    heads = torch.zeros(1, 2, 9, 4)
    with pytest.raises(ConfigError, match=r"sample of 6 tokens .* window of 5"):
        packed_attention(
            torch.nn.Module(), heads, heads, heads, None, packing=_packing([3, 6], "sdpa"), sliding_window=5
        )
    short = packed_attention(
        torch.nn.Module(), heads, heads, heads, None, packing=_packing([4, 5], "sdpa"), sliding_window=5
    )
    assert short[0].shape == (1, 9, 2, 4)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "installed", "got"),
    [
        ("auto", CPU, torch.bfloat16, True, "sdpa"),
        ("auto", CUDA, torch.float32, True, "sdpa"),
        ("auto", CUDA, torch.bfloat16, True, "flash"),
        ("auto", CUDA, torch.bfloat16, False, "varlen"),
        ("sdpa", CUDA, torch.bfloat16, True, "sdpa"),
        ("flex", CUDA, torch.float32, False, "flex"),
        ("varlen", CUDA, torch.bfloat16, True, "varlen"),
    ],
)
def test_auto_takes_the_fastest_kernel_that_can_run(asked, device, dtype, installed, got, monkeypatch):
    monkeypatch.setattr("actors.attention._without_flash", lambda: "" if installed else "No module named 'flash_attn'")
    assert choose(asked, device=device, dtype=dtype) == got


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "words"),
    [
        ("flash", CPU, torch.bfloat16, "flash needs CUDA and .* here they are cpu and bfloat16: use auto or sdpa"),
        ("varlen", CUDA, torch.float32, "varlen needs CUDA and .* here they are cuda and float32"),
        ("flex", CPU, torch.float32, "flex needs CUDA, since it has no backward"),
        ("flash", CUDA, torch.bfloat16, r"package \(No module named 'flash_attn'; uv pip install --no-build-isolation"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_with_the_cure(asked, device, dtype, words, monkeypatch):
    monkeypatch.setattr("actors.attention._without_flash", lambda: "No module named 'flash_attn'")
    with pytest.raises(ConfigError, match=words):
        choose(asked, device=device, dtype=dtype)


def test_a_flash_package_that_cannot_be_imported_counts_as_none(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('flash_attn_2_cuda.so: undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    _without_flash.cache_clear()
    try:
        assert choose("auto", device=CUDA, dtype=torch.bfloat16) == "varlen"
        with pytest.raises(ConfigError, match=r"flash-attn package \(flash_attn_2_cuda.so: undefined symbol; uv pip"):
            choose("flash", device=CUDA, dtype=torch.bfloat16)
    finally:
        _without_flash.cache_clear()


# the learner, and what goes wrong without it -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("attention") / "model")


def test_packed_log_probs_equal_each_sequence_alone_with_flex_too(model_dir, monkeypatch):
    samples = some_samples(6)
    hf = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        alone = [np.where(s.mask, [0.0, *hf_log_probs(hf, s).numpy()], 0.0)[1:] for s in samples]
    with learner_on(model_dir, recipe()) as learner:
        monkeypatch.setattr(learner.model, "kernel", "flex")  # a forward is all that it can do here
        row = one_row(samples)
        ours = learner.log_probs(row).logprobs
    expected = np.concatenate([[*alone[i], 0.0] for i in row.sample_index])
    np.testing.assert_allclose(ours, expected, atol=5e-6)


@pytest.mark.parametrize(
    ("trap", "silent"),
    [
        ({"use_cache": True}, True),
        ({"use_cache": False, "attention_mask": "ones"}, True),
        ({"use_cache": False}, False),
    ],
)
def test_transformers_own_packing_leaks_in_silence_unless_called_just_so(model_dir, trap, silent):
    """Why the learner has attention of its own: a default cache or a harmless mask turns off packing unannounced."""
    samples = some_samples(3)
    row = one_row(samples)
    hf = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
    ids = torch.tensor(row.input_ids)[None]
    if trap.get("attention_mask"):
        trap = {**trap, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits = hf(input_ids=ids, position_ids=torch.tensor(row.position_ids)[None], **trap).logits[0]
        last = samples[row.sample_index[-1]]
        alone = hf(input_ids=torch.tensor(last.ids.astype(np.int64))[None], use_cache=False).logits[0]
    gap = float((logits[-len(last) :] - alone).abs().max())
    assert gap > 0.1 if silent else gap < 1e-4


def test_the_learners_attention_refuses_a_mask_and_a_call_without_packing(model_dir):
    """The two traps above cannot happen here: neither is a quiet fallback to attention across segments."""
    hf = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation=PACKED)
    ids = torch.zeros(1, 5, dtype=torch.int64)
    with torch.no_grad(), pytest.raises(TypeError, match="packing"):
        hf(input_ids=ids, use_cache=False)
    heads = torch.zeros(1, 2, 5, 4)
    with pytest.raises(AssertionError, match="no mask"):
        packed_attention(torch.nn.Module(), heads, heads, heads, torch.ones(1, 5), packing=_packing([5], "sdpa"))
