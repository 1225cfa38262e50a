"""What the learner keeps off the device: logits, and on request the optimizer; and kernels that write less."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from learners import learner_on, one_row, recipe, some_samples, train, weights, write_model

from actors.learner import Learner
from actors.liger import apply_liger
from aster.errors import ConfigError

_ROOT = Path(__file__).parents[2]
_CHUNK = 256  # half of the default, so that the full logits need not be larger than a small machine


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("memory") / "model")


def test_offloaded_masters_give_the_same_bits_through_training_resuming_and_publishing(model_dir, tmp_path):
    """On a CPU nothing moves, but it is FSDP's offloading that runs: host masters, host gradients, host AdamW."""
    results = []
    for offload in (False, True):
        path = str(tmp_path / f"{offload}")
        with learner_on(model_dir, recipe(learner={"offload_optimizer": offload})) as learner:
            train(learner, some_samples(seed=0))
            learner.save(path)
            train(learner, some_samples(seed=1))
            learner.load(path)
            _, optim = train(learner, some_samples(seed=1))
            scores = learner.log_probs(one_row(some_samples())).logprobs
            published = {n: t.clone() for n, t in learner.model.named_full_tensors("bfloat16")}
            results.append((weights(learner), published, scores, optim.grad_norm))
    (ours, sent, scores, norm), (theirs, sent_too, scores_too, norm_too) = results
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())
    assert all(torch.equal(t, sent_too[n]) for n, t in sent.items())
    assert np.array_equal(scores, scores_too)
    assert norm == norm_too


def test_the_log_prob_head_needs_at_most_a_quarter_of_what_full_logits_need():
    """Peak of forward and backward above the loaded head, 1024 rows of 151,936 logits, each in its own process."""
    with ThreadPoolExecutor(2) as both:
        full, ours = both.map(_head_peak, ("full", "ours"))
    assert full > 2 * 1024 * 151_936 * 4, "the comparison must hold logits and their gradient, or it proves nothing"
    assert ours <= 0.25 * full, f"{ours / 2**20:.0f} MiB against {full / 2**20:.0f} MiB"
    weight = 64 * 151_936 * 4  # its gradient is made chunk by chunk and added up
    assert ours <= 3 * _CHUNK * 151_936 * 4 + 3 * weight, "what the docstring of learner.logprob_chunk_tokens says"


def _head_peak(kind: str) -> int:
    """Bytes by which the process grew at most. The first pass is small and loads what libraries load late."""
    code = f"""
from pathlib import Path
import torch
from actors.log_probs import label_log_probs
torch.manual_seed(0)
head = torch.nn.Linear(64, 151_936, bias=False)
head.weight.grad = torch.zeros_like(head.weight)
def step(rows):
    hidden = torch.randn(rows, 64, requires_grad=True)
    labels = torch.randint(0, 151_936, (rows,))
    if {kind!r} == "full":
        logits = head(hidden).float()
        logprobs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    else:
        logprobs, _ = label_log_probs(hidden, labels, head, temperature=1.0, chunk_tokens={_CHUNK})
    logprobs.sum().backward()
step(4)
def peak():  # not ru_maxrss: that of a new process begins at what its parent, the tests' own process, has reached
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
before = peak()
step(1024)
print(peak() - before)
"""
    return int(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120, cwd=_ROOT).stdout
    )


# liger --------------------------------------------------------------------------------------------------------------


def test_liger_where_it_cannot_run_is_refused_with_the_cure(model_dir):
    with (
        pytest.raises(ConfigError, match=r"needs CUDA.*set model\.liger=false"),
        learner_on(model_dir, recipe(model={"liger": True})),
    ):
        pass
    with pytest.raises(ConfigError, match=r"needs the liger-kernel package: make setup EXTRA=gpu installs it"):
        apply_liger(SimpleNamespace(), device=torch.device("cuda"))


def test_liger_patches_the_model_but_for_its_losses(monkeypatch):
    """The kernels need a GPU; which of them we ask for does not. The stand-in has the signature of liger's function."""
    asked = {}

    def apply_liger_kernel_to_qwen3(
        rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None
    ):
        names = ("rope", "cross_entropy", "fused_linear_cross_entropy", "rms_norm", "swiglu", "model")
        values = (rope, cross_entropy, fused_linear_cross_entropy, rms_norm, swiglu, model)
        asked.update(zip(names, values, strict=True))

    patches = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"qwen3": apply_liger_kernel_to_qwen3})
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(__spec__=object()))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    hf = SimpleNamespace(config=SimpleNamespace(model_type="qwen3"))
    apply_liger(hf, device=torch.device("cuda"))
    assert asked == {
        "rope": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
        "rms_norm": True,
        "swiglu": True,
        "model": hf,
    }
    hf.config.model_type = "olmo"
    with pytest.raises(ConfigError, match=r"no model of type 'olmo' \(it knows qwen3\)"):
        apply_liger(hf, device=torch.device("cuda"))


def test_a_learner_that_cannot_be_made_leaves_no_process_group_behind(model_dir):
    with pytest.raises(ConfigError):
        Learner(recipe(model={"liger": True}), model_path=str(model_dir), total_steps=1)
    assert not torch.distributed.is_initialized()
