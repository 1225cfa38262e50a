from aster.algo.naming import missing_and_unexpected, to_hf


def test_wrapper_markers_and_the_root_go_away():
    assert (
        to_hf("hf.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    )
    assert to_hf("_orig_mod.hf.lm_head.weight") == "lm_head.weight"


def test_a_hugging_face_name_comes_back_as_it_is():
    for name in ("model.embed_tokens.weight", "model.layers.35.self_attn.q_norm.weight", "lm_head.weight"):
        assert to_hf(f"hf.{name}") == name == to_hf(name)


def test_a_tied_alias_is_neither_missing_nor_unexpected():
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    expected = ["model.embed_tokens.weight", "model.norm.weight"]
    assert missing_and_unexpected(expected, expected, tied=tied) == ([], [])
    assert missing_and_unexpected(expected, [*expected, "lm_head.weight"], tied=tied) == ([], [])
    assert missing_and_unexpected(expected, ["model.norm.weight", "x"], tied=tied) == (
        ["model.embed_tokens.weight"],
        ["x"],
    )
