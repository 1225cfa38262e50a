"""One learner rank on CPU, against plain transformers and plain torch: log-probs, losses, gradients, steps."""

from __future__ import annotations

from dataclasses import replace
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
from transformers import AutoModelForCausalLM

from actors import log_probs
from actors.log_probs import label_log_probs
from aster.algo.losses import policy_loss
from aster.algo.packing import denominators, pack, padding_row, unpack
from aster.config import AlgoConfig
from aster.errors import AsterError, ConfigError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tied")


@pytest.fixture(scope="module")
def untied_dir(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "untied", tied=False)


def _hf(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


# the model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["model_dir", "untied_dir"])
def test_weights_and_rotary_tables_are_those_of_the_directory(which, request):
    path = request.getfixturevalue(which)
    hf = _hf(path)
    with learner_on(path, recipe()) as learner:
        ours = weights(learner)
        assert list(ours) == [name for name, _ in hf.named_parameters()]
        for name, parameter in hf.named_parameters():
            assert torch.equal(ours[name], parameter), name
        buffers = {n.removeprefix("hf."): b for n, b in learner.model.policy.named_buffers()}
        assert buffers.keys() == dict(hf.named_buffers()).keys() != set()
        for name, buffer in hf.named_buffers():
            assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_log_probs_equal_each_sequence_alone(model_dir, temperature):
    samples = some_samples()
    hf = _hf(model_dir)
    with learner_on(model_dir, recipe(sampling={"temperature": temperature})) as learner:
        rows = pack(samples, row_tokens=90, dp_size=1)
        assert max(len(r[0].sample_index) for r in rows) > 2
        packed = unpack([[learner.log_probs(r[0]).logprobs] for r in rows], rows, [len(s) for s in samples])
    with torch.no_grad():
        for sample, ours in zip(samples, packed, strict=True):
            alone = hf_log_probs(hf, sample, temperature=temperature).numpy()
            np.testing.assert_allclose(ours[1:], np.where(sample.mask[1:], alone, 0.0), atol=5e-6)


def test_chunked_log_probs_equal_full_logits_with_gradient_and_entropy(monkeypatch):
    torch.manual_seed(0)
    hidden = torch.randn(23, 16, requires_grad=True)
    head = torch.nn.Linear(16, 50, bias=False)
    labels = torch.randint(0, 50, (23,))
    upstream = torch.randn(23)
    rows_seen = []

    def counting(x, weight, bias):
        rows_seen.append(len(x))
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(log_probs, "linear", counting)

    def run(chunk_tokens):
        logprobs, entropy = label_log_probs(hidden, labels, head, temperature=0.7, chunk_tokens=chunk_tokens)
        assert not entropy.requires_grad
        grads = torch.autograd.grad((logprobs * upstream).sum(), [hidden, head.weight])
        return logprobs, entropy, *grads

    logits = head(hidden) / 0.7
    full = logits.log_softmax(-1)
    expected = full.gather(1, labels[:, None])[:, 0]
    grads = torch.autograd.grad((expected * upstream).sum(), [hidden, head.weight], retain_graph=True)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    for chunk_tokens in (100, 7, 1):
        rows_seen.clear()
        for ours, theirs in zip(run(chunk_tokens), (expected, entropy, *grads), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert max(rows_seen) <= chunk_tokens


@pytest.mark.parametrize("bias", [False, True])
def test_in_bf16_many_chunks_sum_to_as_good_a_gradient_as_one(bias):
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 200, bias=bias, dtype=torch.bfloat16)
    hidden = torch.randn(1152, 32, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 200, (1152,))
    upstream = torch.rand(1152)

    def gradients_in(chunks: int, *, of: torch.nn.Linear, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logprobs, _ = label_log_probs(states, labels, of, temperature=0.7, chunk_tokens=1152 // chunks)
        return torch.autograd.grad((logprobs * upstream).sum(), [states, *of.parameters()])

    exact_head = torch.nn.Linear(32, 200, bias=bias)
    exact_head.load_state_dict(head.state_dict())
    exact = gradients_in(1, of=exact_head, states=hidden.detach().float().requires_grad_())

    def errors(chunks: int) -> list[float]:
        ours = gradients_in(chunks, of=head, states=hidden)
        return [float((a.float() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]

    for many, one in zip(errors(144), errors(1), strict=True):
        assert many < 1.5 * one < 0.01


@pytest.mark.parametrize(("dtype", "gap"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_the_row_is_cut_into_chunks_without_changing_the_gradient(model_dir, dtype, gap):
    samples = some_samples()
    grads = {}
    for chunk in (1024, 5):
        made = recipe(learner={"logprob_chunk_tokens": chunk}, model={"compute_dtype": dtype})
        with learner_on(model_dir, made) as learner:
            accumulate(learner, samples, row_tokens=1000)
            grads[chunk] = gradients(learner)
    assert relative_gap(grads[5], grads[1024]) < gap


def test_recomputation_does_not_change_the_gradient(model_dir):
    samples = some_samples()
    grads = {}
    for on in (True, False):
        with learner_on(model_dir, recipe(model={"gradient_checkpointing": on})) as learner:
            accumulate(learner, samples)
            grads[on] = gradients(learner)
    assert relative_gap(grads[True], grads[False]) < 1e-6


def test_bf16_compute_keeps_fp32_masters_and_moments(model_dir):
    samples = some_samples()
    row = one_row(samples)
    with learner_on(model_dir, recipe()) as exact:
        reference = exact.log_probs(row).logprobs
    with learner_on(model_dir, recipe(model={"compute_dtype": "bfloat16"})) as learner:
        rough = learner.log_probs(row).logprobs
        train(learner, samples)
        assert {p.dtype for p in learner.model.parameters().values()} == {torch.float32}
        assert {t.dtype for t in learner._tensors().values()} == {torch.float32}
    gap = np.abs(rough - reference)
    assert 0 < gap.max() < 0.3
    assert gap.mean() < 0.05


# the loss -----------------------------------------------------------------------------------------------------------


def test_rl_gradient_equals_autograd_through_plain_transformers(model_dir):
    samples = some_samples()
    hf = _hf(model_dir)
    parts = []
    for s in samples:
        on = torch.tensor(s.mask[1:])
        losses, _ = policy_loss(
            hf_log_probs(hf, s)[on],
            old_N=torch.tensor(s.old_logprobs[1:])[on],
            behaviour_N=torch.tensor(s.behaviour_logprobs[1:])[on],
            advantages_N=torch.full((int(on.sum()),), s.advantage),
            algo=AlgoConfig(),
        )
        parts.append(losses.sum())
    expected = torch.stack(parts).sum() / denominators(samples)[0]
    expected.backward()
    with learner_on(model_dir, recipe()) as learner:
        stats = accumulate(learner, samples)
        ours = gradients(learner)
    assert stats.loss == pytest.approx(expected.item(), rel=1e-5)
    assert relative_gap(ours, {n: p.grad.numpy() for n, p in hf.named_parameters()}) < 1e-5


@pytest.mark.parametrize("aggregation", ["token", "group", "seq-mean", "constant"])
def test_loss_and_gradient_do_not_depend_on_packing_or_order(model_dir, aggregation):
    samples = some_samples(11)
    shuffled = [samples[i] for i in np.random.default_rng(5).permutation(len(samples))]
    results = []
    for batch, row_tokens, dp_size in [(samples, 1000, 1), (samples, 1, 1), (shuffled, 60, 1), (samples, 60, 3)]:
        with learner_on(model_dir, recipe(algo={"aggregation": aggregation})) as learner:
            stats = accumulate(learner, batch, row_tokens=row_tokens, dp_size=dp_size)
            results.append((stats, gradients(learner)))
    first_stats, first = results[0]
    for stats, grads in results[1:]:
        assert stats.loss == pytest.approx(first_stats.loss, rel=1e-5)
        assert stats.tokens == first_stats.tokens
        assert stats.entropy_sum == pytest.approx(first_stats.entropy_sum, rel=1e-5)
        assert relative_gap(grads, first) < 1e-5


def test_the_first_update_has_ratio_one_and_clips_nothing(model_dir):
    samples = some_samples()
    rows = pack(samples, row_tokens=64, dp_size=1)
    with learner_on(model_dir, recipe()) as learner:
        old = unpack([[learner.log_probs(r[0]).logprobs] for r in rows], rows, [len(s) for s in samples])
        stats = accumulate(learner, [replace(s, old_logprobs=o) for s, o in zip(samples, old, strict=True)])
        assert stats.tokens == denominators(samples)[0]
        assert stats.padded_tokens == sum(len(s) for s in samples)
        assert stats.clipped_sum == 0
        assert stats.kl_sum == pytest.approx(0.0, abs=1e-3)
        assert 0 < stats.per_token(stats.tis_sum) <= 2.0


def test_without_a_proximal_pass_the_behaviour_policy_is_old(model_dir):
    samples = [replace(s, old_logprobs=None) for s in some_samples()]
    with learner_on(model_dir, recipe(algo={"proximal_pass": False})) as learner:
        stats = accumulate(learner, samples)
        assert stats.per_token(stats.tis_sum) == pytest.approx(1.0)
        ours = gradients(learner)
    with learner_on(model_dir, recipe()) as learner:
        accumulate(learner, [replace(s, old_logprobs=s.behaviour_logprobs) for s in samples])
        assert relative_gap(ours, gradients(learner)) == 0.0


@pytest.mark.parametrize("algo", [{"objective": "gspo", "aggregation": "seq-mean"}, {"kl_coef": 0.5}])
def test_options_do_not_depend_on_packing_either(model_dir, algo):
    samples = [replace(s, reference_logprobs=s.behaviour_logprobs) for s in some_samples(7)]
    results = []
    for row_tokens in (1000, 1):
        with learner_on(model_dir, recipe(algo=algo)) as learner:
            stats = accumulate(learner, samples, row_tokens=row_tokens)
            results.append((stats.loss, gradients(learner)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert relative_gap(results[1][1], results[0][1]) < 1e-5


def test_the_reference_model_stays_what_the_run_began_with(model_dir):
    samples = some_samples()
    row = one_row(samples)
    with learner_on(model_dir, recipe(algo={"kl_coef": 0.1}, optim={"lr": 1e-2})) as learner:
        start = learner.log_probs(row)
        train(learner, [replace(s, reference_logprobs=s.behaviour_logprobs) for s in samples])
        np.testing.assert_array_equal(learner.log_probs(row, reference=True).logprobs, start.logprobs)
        assert np.abs(learner.log_probs(row).logprobs - start.logprobs).max() > 1e-3
    with learner_on(model_dir, recipe()) as learner, pytest.raises(ConfigError, match=r"algo\.kl_coef=0"):
        learner.log_probs(row, reference=True)


def test_the_scores_carry_the_entropy_of_the_sampled_distribution(model_dir):
    samples = some_samples()
    row = one_row(samples)
    with learner_on(model_dir, recipe()) as learner:
        scores = learner.log_probs(row)
        assert accumulate(learner, samples).entropy_sum == pytest.approx(scores.entropies.sum(), rel=1e-5)
        assert (scores.entropies[~row.loss_mask] == 0).all()


def test_log_probs_that_are_absent_are_an_error_not_zeros(model_dir):
    with learner_on(model_dir, recipe()) as learner:
        with pytest.raises(ValueError, match=r"no old_logprobs.*proximal_pass"):
            accumulate(learner, [replace(s, old_logprobs=None) for s in some_samples()])
        with pytest.raises(ValueError, match="not finite"):
            accumulate(learner, [replace(s, behaviour_logprobs=None) for s in some_samples()])


def test_a_padding_row_adds_a_gradient_of_exactly_zero(model_dir):
    with learner_on(model_dir, recipe()) as learner:
        stats = learner.forward_backward(padding_row(), num_loss_tokens=7, num_groups=1)
        assert (stats.loss, stats.tokens, stats.padded_tokens) == (0.0, 0, 1)
        grads = gradients(learner)
        assert grads.keys() == learner.model.parameters().keys()  # all of them: peers reduce equal sizes
        assert all((g == 0).all() for g in grads.values())
        assert learner.log_probs(padding_row()).logprobs.tolist() == [0.0]


def test_sft_learns_the_masked_tokens_at_temperature_one(model_dir):
    samples = [replace(s, old_logprobs=None, behaviour_logprobs=None) for s in some_samples()]
    sft = recipe("sft", sampling={"temperature": 0.6}, optim={"lr": 3e-3})
    hf = _hf(model_dir)
    with torch.no_grad():
        expected = -sum(hf_log_probs(hf, s)[torch.tensor(s.mask[1:])].sum() for s in samples)
    with learner_on(model_dir, sft) as learner:
        first, _ = train(learner, samples)
        assert first.loss == pytest.approx(float(expected) / denominators(samples)[0], rel=1e-5)
        for _ in range(30):
            last, _ = train(learner, samples)
        assert last.loss < 0.3 * first.loss


# the optimizer ------------------------------------------------------------------------------------------------------


def test_three_steps_equal_plain_torch_adamw_with_clipping_and_warm_up(model_dir):
    samples = some_samples()
    hf = _hf(model_dir)
    plain = torch.optim.AdamW(hf.parameters(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    section = {"lr": 1e-3, "beta2": 0.95, "weight_decay": 0.1, "warmup_steps": 2, "max_grad_norm": 0.5}
    with learner_on(model_dir, recipe("sft", optim=section)) as learner:
        for rate in (0.5e-3, 1e-3, 1e-3):
            loss = -sum(hf_log_probs(hf, s)[torch.tensor(s.mask[1:])].sum() for s in samples)
            (loss / denominators(samples)[0]).backward()
            norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), 0.5)
            assert norm > 0.5, "the clip must act"
            plain.param_groups[0]["lr"] = rate
            plain.step()
            plain.zero_grad()
            _, optim = train(learner, samples)
            assert optim.lr == pytest.approx(rate)
            assert optim.grad_norm == pytest.approx(float(norm), rel=1e-5)
            assert not optim.skipped
        ours = weights(learner)
        for name, parameter in hf.named_parameters():
            torch.testing.assert_close(ours[name], parameter.detach(), rtol=0, atol=2e-6)


def test_a_gradient_that_is_not_finite_skips_the_step_and_is_forgotten(model_dir):
    samples = some_samples()
    poisoned = [replace(samples[0], advantage=float("inf")), *samples[1:]]
    with learner_on(model_dir, recipe(optim={"max_skipped_in_a_row": 3})) as learner:
        before = weights(learner)
        _, optim = train(learner, poisoned)
        assert optim.skipped
        assert not np.isfinite(optim.grad_norm)
        assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(learner).values(), strict=True))
        _, optim = train(learner, samples)
        assert not optim.skipped
        assert np.isfinite(optim.grad_norm)
        assert learner.skipped_in_a_row == 0
        assert (learner.steps, learner.applied) == (2, 1)


def test_too_many_skipped_steps_in_a_row_end_the_run(model_dir):
    poisoned = [replace(s, advantage=float("nan")) for s in some_samples()]
    with learner_on(model_dir, recipe(optim={"max_skipped_in_a_row": 2})) as learner:
        assert train(learner, poisoned)[1].skipped
        with pytest.raises(AsterError, match=r"2 optimizer steps in a row.*lower optim\.lr=0\.01"):
            train(learner, poisoned)


def test_a_step_without_gradients_is_refused(model_dir):
    with learner_on(model_dir, recipe()) as learner, pytest.raises(AsterError, match="without forward_backward"):
        learner.optim_step()


def test_a_learner_that_rests_between_two_steps_trains_on_as_if_it_had_not(model_dir):
    """On CPU nothing moves; tests/gpu has the twin that measures the memory."""
    samples = some_samples()
    ended = []
    for rests in (False, True):
        with learner_on(model_dir, recipe()) as learner:
            train(learner, samples)
            if rests:
                learner.rest(optimizer_only=True)
                learner.rest()
                learner.rise()
            train(learner, samples)
            ended.append(weights(learner))
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])
