"""Directories in the reference's FSDP layout, written by two real ranks, become what transformers loads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from learners import write_model
from ranks import gloo, run_on_ranks
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from aster import merge
from aster.errors import DataError

_FILE = "model.safetensors"


def _write(rank: int, world_size: int, model: str, out: str) -> None:
    """What each rank of the reference saves: every tensor sharded on dim 0, tied ones twice, a few left plain."""
    gloo(f"{out}.store", rank, world_size)
    meshes = {
        "shards": (init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",)), [Shard(0)]),
        "replicas": (init_device_mesh("cpu", (2, 1), mesh_dim_names=("ddp", "fsdp")), [Replicate(), Shard(0)]),
    }
    state = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    assert "lm_head.weight" in state
    for kind, (mesh, placements) in meshes.items():
        saved = {
            name: tensor if name.endswith("q_norm.weight") else distribute_tensor(tensor, mesh, placements)
            for name, tensor in state.items()
        }
        assert isinstance(saved["model.norm.weight"], DTensor)
        torch.save(saved, Path(out) / kind / f"model_world_size_{world_size}_rank_{rank}.pt")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """`tied/shards`, `tied/replicas`, `untied/...`; and the models themselves as `tied/model`, `untied/model`."""
    root = tmp_path_factory.mktemp("reference")
    for which in ("tied", "untied"):
        # 97 entries and a width of 63: neither can be halved
        model = write_model(root / which / "model", tied=which == "tied", intermediate_size=63)
        for kind in ("shards", "replicas"):
            files = root / which / kind / "huggingface"
            files.mkdir(parents=True)
            for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
                shutil.copy(model / name, files / name)
        run_on_ranks(_write, 2, str(model), str(root / which))
    return root


@pytest.mark.parametrize("which", ["tied", "untied"])
@pytest.mark.parametrize("kind", ["shards", "replicas"])
def test_merging_is_bit_equal_and_loads_in_transformers(written, which, kind, tmp_path, capsys):
    local = written / which / kind
    argv = ["--backend", "fsdp", "--local_dir", str(local), "--target_dir", str(tmp_path / "out")]
    assert merge.main([*argv, "--dtype", "float32"]) == 0
    assert str(local) in capsys.readouterr().out
    merged, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(local.parent / "model" / _FILE)
    assert merged.keys() == original.keys()
    assert ("lm_head.weight" in merged) == (which == "untied")
    assert all(torch.equal(merged[name], original[name]) for name in original)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, original[name]) for name, p in loaded.named_parameters())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (which == "tied")
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_the_default_is_bf16_and_a_global_step_directory_is_found_into(written, tmp_path):
    shutil.copytree(written / "tied" / "shards", tmp_path / "global_step_7" / "actor")
    assert merge.merge(tmp_path / "global_step_7", tmp_path / "out", dtype="bfloat16").name == "actor"
    merged, original = load_file(tmp_path / "out" / _FILE), load_file(written / "tied" / "model" / _FILE)
    assert all(torch.equal(merged[name], original[name].bfloat16()) for name in original)


def test_what_is_incomplete_or_of_two_saves_is_named(written, tmp_path):
    def broken() -> Path:
        path = tmp_path / "broken"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(written / "tied" / "shards", path)
        return path

    path = broken()
    (path / "model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(DataError, match=r"lacks model_world_size_2_rank_1\.pt"):
        merge.merge(path, tmp_path / "out", dtype="float32")
    path = broken()
    shutil.copy(path / "model_world_size_2_rank_0.pt", path / "model_world_size_4_rank_0.pt")
    with pytest.raises(DataError, match=r"world sizes \[2, 4\]"):
        merge.merge(path, tmp_path / "out", dtype="float32")
    path = broken()
    shutil.copy(path / "model_world_size_2_rank_0.pt", path / "model_world_size_2_rank_1.pt")
    with pytest.raises(DataError, match=r"shards of .* make .*the files are not of one save"):
        merge.merge(path, tmp_path / "out", dtype="float32")
    path = broken()
    shutil.rmtree(path / "huggingface")
    with pytest.raises(DataError, match=r"huggingface/config\.json is missing"):
        merge.merge(path, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


def _plain(written: Path, path: Path, cut: Callable[[str, torch.Tensor], Sequence[torch.Tensor]]) -> Path:
    """The untied model as files without a DTensor: what each rank holds of a tensor is what `cut` says."""
    shutil.copytree(written / "untied" / "shards" / "huggingface", path / "huggingface")
    state = {name: cut(name, tensor) for name, tensor in load_file(written / "untied" / "model" / _FILE).items()}
    for rank in range(2):
        torch.save({name: p[rank].clone() for name, p in state.items()}, path / f"model_world_size_2_rank_{rank}.pt")
    return path


def _halves(name: str, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return tensor.tensor_split(2)


@pytest.mark.parametrize("first", [None, 2, 0, 1000], ids=["halves", "uneven", "all on rank 1", "all on rank 0"])
def test_plain_tensors_are_the_shards_that_the_model_s_shapes_make_of_them(written, first, tmp_path):
    """The norms are all ones, so that their halves are equal; one of them each rank holds whole."""

    def cut(name: str, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        if name == "model.norm.weight":
            return tensor, tensor
        return tensor.tensor_split(2 if first is None else [first])

    merge.merge(_plain(written, tmp_path / "plain", cut), tmp_path / "out", dtype="float32")
    merged, original = load_file(tmp_path / "out" / _FILE), load_file(written / "untied" / "model" / _FILE)
    assert merged["model.embed_tokens.weight"].shape[0] == 97
    assert merged.keys() == original.keys()
    assert all(torch.equal(merged[name], original[name]) for name in original)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            lambda t: (t[:40], t[49:]),
            r"the shards of model\.embed_tokens\.weight make \(40, .* config.json says \(97, ",
        ),
        (
            lambda t: (t[:49], t[49:, :5]),
            r"embed_tokens\.weight make \(49, \d+\) \+ \(48, 5\), config\.json says \(97, ",
        ),
        (lambda t: (t, t + 1), r"ranks 0 and 1 do not hold the same model\.embed_tokens\.weight"),
        (lambda t: (t, t[:49]), r"embed_tokens\.weight make \(97, \d+\) \+ \(49, \d+\), config\.json says \(97, "),
    ],
)
def test_plain_tensors_that_make_no_whole_are_named(written, part, message, tmp_path):
    def cut(name: str, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return part(tensor) if name == "model.embed_tokens.weight" else _halves(name, tensor)

    with pytest.raises(DataError, match=message):
        merge.merge(_plain(written, tmp_path / "plain", cut), tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


def test_plain_tensors_of_an_unknown_model_are_refused(written, tmp_path):
    path = _plain(written, tmp_path / "plain", _halves)
    (path / "huggingface" / "config.json").write_text('{"model_type": "nobody_has_it"}')
    with pytest.raises(DataError, match=r"holds plain tensors, and .*config\.json does not tell"):
        merge.merge(path, tmp_path / "out", dtype="float32")


def test_a_tied_head_that_differs_is_refused(written, tmp_path):
    shutil.copytree(written / "untied" / "shards", tmp_path / "odd")
    shutil.copytree(written / "tied" / "shards" / "huggingface", tmp_path / "odd" / "huggingface", dirs_exist_ok=True)
    with pytest.raises(DataError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, but the two differ"):
        merge.merge(tmp_path / "odd", tmp_path / "out", dtype="float32")


def test_a_file_that_would_run_code_is_refused_before_it_does(written, tmp_path):
    class Command:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it_ran"),)

    shutil.copytree(written / "tied" / "shards", tmp_path / "evil")
    torch.save({"x": Command()}, tmp_path / "evil" / "model_world_size_2_rank_1.pt")
    with pytest.raises(DataError, match=r"rank_1\.pt cannot be read as a state dict of tensors"):
        merge.merge(tmp_path / "evil", tmp_path / "out", dtype="float32")
    assert not (tmp_path / "it_ran").exists()
