"""Recipes: every shipped YAML loads, the paper's numbers are in them, and a bad value is named with its cure."""

import pytest

from aster.config import Recipe, recipe_names
from aster.errors import ConfigError


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_survives_its_own_yaml(name, tmp_path):
    recipe = Recipe.load(name)
    path = tmp_path / "again.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.load(str(path)) == recipe


def test_stage_1_holds_the_numbers_of_the_paper():
    r = Recipe.load("rl_stage1_18k")
    assert (r.rollout.prompts_per_step, r.rollout.group_size, r.trajectories_per_step) == (128, 8, 1024)
    assert (r.algo.mini_batch_prompts, r.updates_per_step) == (64, 2)
    assert (r.algo.clip_low, r.algo.clip_high, r.algo.dual_clip, r.algo.tis_cap) == (0.2, 0.28, 10.0, 2.0)
    assert (r.optim.lr, r.optim.beta1, r.optim.beta2, r.optim.eps, r.optim.weight_decay) == (
        1e-6,
        0.9,
        0.999,
        1e-8,
        0.01,
    )
    assert (r.optim.schedule, r.optim.warmup_ratio, r.optim.max_grad_norm) == ("constant", 0.0, 1.0)
    assert (r.budget.max_prompt_tokens, r.budget.max_response_tokens, r.max_model_len) == (2048, 16384, 18432)
    assert (r.budget.max_tool_calls, r.tool.timeout_s, r.tool.max_response_chars) == (50, 30, None)
    assert (r.sampling.temperature, r.sampling.top_p, r.sampling.top_k) == (1.0, 1.0, -1)
    assert (r.rollout.max_num_seqs, r.rollout.max_num_batched_tokens, r.rollout.gpu_memory_utilization) == (
        1024,
        147456,
        0.9,
    )
    assert r.learner.micro_batch_tokens == 4 * 18432
    assert (r.run.steps, r.data.epochs, r.run.save_every, r.run.val_every, r.data.shuffle_seed) == (405, 3, 10, 10, 1)
    assert (r.eval.samples, r.eval.preset) == (16, "repro")
    assert (r.algo.aggregation, r.algo.reward, r.algo.drop_zero_variance) == ("token", "strict", False)


def test_stage_2_differs_from_stage_1_only_where_the_paper_does():
    one, two = Recipe.load("rl_stage1_18k").flat(), Recipe.load("rl_stage2_32k").flat()
    changed = {k: two[k] for k in two if one.get(k) != two[k] and k not in {"run.name", "description"}}
    assert changed == {
        "run.steps": 234,
        "data.epochs": 6,
        "budget.max_response_tokens": 30720,
        "rollout.max_num_batched_tokens": 131072,
        "learner.micro_batch_tokens": 65536,
    }
    assert Recipe.load("rl_stage2_32k").max_model_len == 32768


def test_sft_and_eval_hold_the_numbers_of_the_paper():
    s, e = Recipe.load("sft"), Recipe.load("eval_90k")
    assert (s.optim.lr, s.optim.min_lr, s.optim.schedule, s.optim.warmup_ratio) == (
        3e-5,
        3e-5,
        "cosine_with_min_lr",
        0.06,
    )
    assert (s.data.epochs, s.sft.batch_size, s.sft.max_length, s.optim.weight_decay) == (6, 128, 32768, 0.0)
    assert (e.budget.max_response_tokens, e.budget.max_tool_calls, e.max_model_len) == (92160, 256, 94208)
    assert (e.eval_sampling().temperature, e.eval_sampling().top_p) == (1.0, 1.0)
    paper = Recipe.load("eval_90k", ["eval.preset=paper"]).eval_sampling()
    assert (paper.temperature, paper.top_p) == (0.6, 0.95)


@pytest.mark.parametrize("name", recipe_names())
def test_a_response_that_is_one_long_turn_has_the_time_it_needs(name):
    """At 20 tokens a second. A limit that cuts it off would count it as lost by us."""
    r = Recipe.load(name)
    for budget in (r.train_budget(), r.eval_budget()):
        limit = r.rollout.generate_timeout_s or budget.trajectory_timeout_s
        assert budget.max_response_tokens / 20 < min(limit, budget.trajectory_timeout_s)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lrr=1e-6", "did you mean 'lr'"),
        ("optimm.lr=1e-6", "did you mean 'optim'"),
        ("optim.lr=fast", "optim.lr='fast'"),
        ("data.train_files=a.parquet", "it must be a list, as in data.train_files=[a.parquet]"),
        ("optim.lr=-1", "greater than 0"),
        ("optim.lr=1e400", "optim.lr='1e400': Input should be a finite number"),
        ("optim.weight_decay=.inf", "finite number"),
        ("run.name=../../x", "run.name='../../x' must be the name of one directory"),
        ("run.name=a/b", "without a slash: where it lies is run.dir=runs"),
        ("run.name=..", "run.name='..' must be"),
        ("run.name=''", "run.name='' must be"),
        ("algo.mini_batch_prompts=60", "128 = 2 x 60 + 8"),
        ("learner.backend=deepspeed_zero3", "use fsdp2 for RL"),
        ("sampling.temperature=0", "groups of equal samples"),
        ("rollout.max_num_batched_tokens=1000", "raise it to 18432"),
        ("rollout.publish_timeout_s=0", "greater than 0"),
        ("run.deterministic=true", "rollout.engines=1"),
        ("run.deterministic=true rollout.max_num_seqs=1 rollout.max_staleness=1", "needs rollout.max_staleness=0"),
        ("rollout.max_staleness=17", "less than or equal to 16"),
        ("optim.min_lr=1", "above optim.lr"),
        ("algo.dual_clip=1.1", "must exceed 1 + clip_high"),
        ("optim.lr", "section.key=value"),
    ],
)
def test_a_bad_override_names_the_value_and_the_cure(override, says):
    with pytest.raises(ConfigError) as caught:
        Recipe.load("rl_stage1_18k", override.split())
    assert says in str(caught.value)


def test_an_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match="did you mean 'rl_stage1_18k'"):
        Recipe.load("rl_stage_1_18k")


def test_a_recipe_that_is_its_own_base_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="its own base"):
        Recipe.load(str(tmp_path / "a.yaml"))


def test_a_base_next_to_the_file_is_found_and_overridden(tmp_path):
    (tmp_path / "parent.yaml").write_text("stage: sft\noptim: {lr: 1e-3, beta2: 0.98}\n")
    (tmp_path / "child.yaml").write_text("base: parent.yaml\noptim: {lr: 2e-3}\n")
    child = Recipe.load(str(tmp_path / "child.yaml"))
    assert (child.optim.lr, child.optim.beta2) == (2e-3, 0.98)


# fmt: off
NOT_SEEN = ["run.name=other", "run.steps=9", "run.save_every=7", "run.wandb_project=p", "cluster.metrics=false",
            "cluster.num_cpus=3", "sandbox.replicas=2", "description=other", "data.epochs=9"]
SEEN = ["optim.lr=1e-5", "sampling.temperature=0.9", "budget.max_response_tokens=1000", "run.seed=5", "model.path=x",
        "data.shuffle_seed=2", "sandbox.memory_bytes=134217728", "learner.world_size=1", "rollout.max_staleness=1"]
# fmt: on


@pytest.mark.parametrize(("changed", "same"), [(x, True) for x in NOT_SEEN] + [(x, False) for x in SEEN])
def test_the_config_hash_sees_what_changes_a_sample_or_an_update_and_nothing_else(changed, same):
    assert (Recipe.load("rl_stage1_18k", [changed]).config_hash == Recipe.load("rl_stage1_18k").config_hash) is same
