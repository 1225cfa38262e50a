"""What a learner reads and what leaves it: model directories, exports, the wire; and what it refuses to start on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from learners import (
    VOCAB,
    learner_on,
    one_row,
    recipe,
    some_samples,
    train,
    weights,
    write_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from actors import persist
from actors.fsdp import _check_architecture
from actors.persist import merge_checkpoint
from aster.errors import ConfigError
from aster.types import Sample


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tied")


@pytest.fixture(scope="module")
def untied_dir(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "untied", tied=False)


# exports --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["model_dir", "untied_dir"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_export_is_bit_equal_and_loads_in_transformers(which, dtype, request, tmp_path):
    path = request.getfixturevalue(which)
    with learner_on(path, recipe()) as learner:
        train(learner, some_samples())
        learner.save_hf(str(tmp_path / "hf"), dtype=dtype)
        learner.save(str(tmp_path / "ck"))
        gathered = {n: t.to(getattr(torch, dtype)) for n, t in weights(learner).items()}
    on_disk = load_file(tmp_path / "hf" / "model.safetensors")
    assert on_disk.keys() == gathered.keys()
    assert ("lm_head.weight" in on_disk) == (which == "untied_dir")
    assert all(torch.equal(on_disk[n], gathered[n]) for n in on_disk)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert str(loaded.dtype).removeprefix("torch.") == dtype
    assert all(torch.equal(p, gathered[n]) for n, p in loaded.named_parameters())
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == (path / "chat_template.jinja").read_text()
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    merge_checkpoint(str(tmp_path / "ck"), str(tmp_path / "merged"), source=str(path), dtype=dtype)
    for file in (tmp_path / "hf").iterdir():
        assert file.read_bytes() == (tmp_path / "merged" / file.name).read_bytes(), file.name


def test_a_large_export_is_cut_into_files_with_an_index(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(persist, "_FILE_BYTES", 20_000)
    with learner_on(model_dir, recipe()) as learner:
        learner.save_hf(str(tmp_path / "hf"))
        ours = weights(learner)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(p, ours[n]) for n, p in loaded.named_parameters())
    with learner_on(tmp_path / "hf", recipe()) as again:  # and our own reader follows the index
        assert all(torch.equal(t, ours[n]) for n, t in weights(again).items())


def test_a_path_that_ends_in_a_slash_replaces_the_model_that_was_there(model_dir, tmp_path):
    checkpoints = [f"{tmp_path}/first/", f"{tmp_path}/second/"]
    with learner_on(model_dir, recipe()) as learner:
        for checkpoint in checkpoints:
            train(learner, some_samples())
            learner.save(checkpoint)
            learner.saved()
        trained = weights(learner)
    for checkpoint in checkpoints:
        merge_checkpoint(checkpoint, f"{tmp_path}/models/merged/", source=str(model_dir), dtype="float32")
    on_disk = load_file(tmp_path / "models" / "merged" / "model.safetensors")
    assert all(torch.equal(on_disk[n], trained[n]) for n in on_disk)
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["merged"]


# weights for the engines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_wire_carries_every_tensor_once_as_announced(model_dir, dtype):
    with learner_on(model_dir, recipe(rollout={"dtype": dtype})) as learner:
        metadata = learner.weight_metadata()
        sent = list(learner.model.named_full_tensors(dtype))
        assert [(m.name, m.shape) for m in metadata] == [(n, tuple(t.shape)) for n, t in sent]
        assert {m.dtype for m in metadata} == {dtype}
        assert "lm_head.weight" not in dict(sent)
        masters = weights(learner)
        assert all(torch.equal(t, masters[n].to(getattr(torch, dtype))) for n, t in sent)


# what cannot be used is said ----------------------------------------------------------------------------------------


def test_a_directory_without_weights_is_refused(model_dir, tmp_path):
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    with (
        pytest.raises(ConfigError, match=r"holds no model\.safetensors \(found: config\.json\)"),
        learner_on(tmp_path, recipe()),
    ):
        pass


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Gemma2Config(), r"attn_logit_softcapping=50\.0"),
        (Gemma2Config(attn_logit_softcapping=None), r"final_logit_softcapping=30\.0"),
        (GraniteConfig(logits_scaling=8.0), r"logits_scaling=8\.0"),
        (CohereConfig(), r"logit_scale=0\.0625"),
        (Qwen3NextConfig(), "layer_types=linear_attention"),
    ],
)
def test_an_architecture_whose_logits_or_attention_we_do_not_compute_is_refused(config, words):
    with pytest.raises(ConfigError, match=rf"model\.path='m'.* has {words}, .*Qwen's and Llama's are supported"):
        _check_architecture(config, Path("m"))


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(),
        Qwen3Config(use_sliding_window=True, sliding_window=64, max_window_layers=2),  # the kernels know windows
        Qwen2Config(),
        LlamaConfig(),  # SmolLM2's too
        MistralConfig(),  # with a window of 4096
        GraniteConfig(logits_scaling=1.0),
        GptOssConfig(),  # its sinks are seen when attention is called
    ],
)
def test_dense_decoders_with_or_without_a_window_pass(config: PreTrainedConfig):
    _check_architecture(config, Path("m"))


def test_a_tensor_that_is_missing_or_has_another_shape_is_named(tmp_path):
    path = write_model(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"1 tensors are in none.*model\.norm\.weight"), learner_on(path, recipe()):
        pass
    save_file({**tensors, "model.norm.weight": torch.cat([norm, norm])}, path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has shape \(64,\)"), learner_on(path, recipe()):
        pass


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"model": {"attention": "flash", "compute_dtype": "float32"}}, "attention=flash needs CUDA"),
        ({"learner": {"backend": "deepspeed_zero2"}}, "is not for Learner: it takes fsdp2"),
    ],
)
def test_what_this_machine_or_class_cannot_do_is_a_config_error(model_dir, section, words):
    with pytest.raises(ConfigError, match=words), learner_on(model_dir, recipe("sft", **section)):
        pass


def test_reading_arrays_that_ray_made_read_only_works(model_dir):
    row = one_row([Sample(ids=np.arange(5, dtype=np.int32) % VOCAB, mask=np.ones(5, bool))])
    for array in (row.input_ids, row.labels, row.loss_mask, row.position_ids):
        array.setflags(write=False)
    with learner_on(model_dir, recipe("sft")) as learner:
        assert np.isfinite(learner.forward_backward(row, num_loss_tokens=4, num_groups=1).loss)
