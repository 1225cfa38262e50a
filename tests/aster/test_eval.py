"""`aster eval` on a pool that answers by rule: what is written, resumed, stopped early and compared."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from aster import eval as evaluation
from aster.checkpoints import checkpoints_of
from aster.cli import main
from aster.config import Recipe
from aster.data.evaluations import read_scores
from aster.data.prompts import write_prompts
from aster.data.trajectories import read_trajectories
from aster.errors import ConfigError, DataError
from aster.eval import Rival, round_sizes
from aster.eval_tables import curve_of
from aster.launch import Rollouts
from aster.types import PromptRow
from tests.fakes import FakePool, row

ROWS = [row(i, source="aime" if i % 2 else "hmmt") for i in range(6)]


class Renderer:
    markers = None

    def decode(self, ids: np.ndarray, /, *, skip_special: bool = False) -> str:
        return " ".join(map(str, ids))


class Bench:
    """A model directory, a benchmark, and engines that are `FakePool`s; counts how often engines start."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.pools: list[FakePool] = []
        self.reward = lambda of, sample: float(sample % 2 == 0)
        (root / "model").mkdir()
        (root / "model/config.json").write_text("{}")
        write_prompts(root / "bench.parquet", ROWS)
        monkeypatch.setattr("aster.launch.rollouts", self.rollouts)
        monkeypatch.setattr("aster.agent.chat.ChatRenderer.from_model_dir", lambda path: Renderer())

    @contextlib.asynccontextmanager
    async def rollouts(self, recipe: Recipe, *, sandboxes: object) -> AsyncIterator[Rollouts]:
        self.pools.append(FakePool([], self.reward))
        yield Rollouts(self.pools[-1], Renderer())  # type: ignore[arg-type]

    def recipe(self, name: str = "e", *overrides: str) -> Recipe:
        own = [f"run.dir={self.root}", f"run.name={name}", f"model.path={self.root / 'model'}", "run.tensorboard=false"]
        return Recipe.load("cpu_eval", [*own, f"data.val_files=[{self.root / 'bench.parquet'}]", *overrides])

    def run(self, recipe: Recipe, **options: object) -> evaluation.EvalResult:
        (result,) = asyncio.run(evaluation.run([recipe], None, **options))  # type: ignore[arg-type]
        return result

    @property
    def sampled(self) -> int:
        return sum(w.group_size for pool in self.pools for w in pool.submitted)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_an_evaluation_writes_scores_hashes_and_token_exact_trajectories(bench: Bench) -> None:
    result = bench.run(bench.recipe("e", "eval.samples=4"))
    assert result.values["val-core/aime/acc/mean@4"] == 0.5
    written = json.loads((bench.root / "e/eval.json").read_text())
    assert written["val-core/hmmt/acc/mean@4/ci_low"] < 0.5
    assert set(written["hashes"]) == {"weights", "data", "settings", "rounds"}
    assert (written["samples"], written["step"], written["verdicts_that_differ"]) == (4, 0, 0)
    assert len(list(read_trajectories(bench.root / "e/trajectories/0.parquet"))) == 24
    assert (bench.root / "e/disagreements/0.jsonl").read_text() == ""
    assert not (bench.root / "e/parts/0").exists()


def test_a_killed_evaluation_goes_on_where_it_was_and_says_so(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = bench.recipe("e", "eval.samples=2")
    seen: list[PromptRow] = []
    answer = bench.reward

    def dies_at_the_fourth(of: PromptRow, sample: int) -> float:
        seen.append(of)
        if len(seen) > 7:
            raise KeyboardInterrupt
        return answer(of, sample)

    bench.reward = dies_at_the_fourth
    with pytest.raises(KeyboardInterrupt):
        bench.run(recipe)
    kept = len(list((bench.root / "e/parts/0/round_0").glob("*.parquet")))
    assert kept == 3
    bench.reward = answer
    before = bench.sampled
    capsys.readouterr()
    result = bench.run(recipe)
    assert bench.sampled - before == 2 * (len(ROWS) - kept), "finished problems are not sampled again"
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "e 6/12 samples  right so far 0.500"
    assert last.startswith("e 12/12 samples  ")
    assert "aime mean@2 0.500 [" in last
    assert [g.row.row_id for g in result.groups] == [r.row_id for r in ROWS]
    assert result.values["val-core/aime/acc/mean@2"] == 0.5


def test_an_unfinished_evaluation_of_another_model_is_refused(bench: Bench) -> None:
    bench.reward = lambda of, sample: 1 / 0
    with pytest.raises(ZeroDivisionError):
        bench.run(bench.recipe())
    (bench.root / "model/config.json").write_text('{"another": "model"}')
    with pytest.raises(ConfigError, match="other weights"):
        bench.run(bench.recipe())


def test_sampling_stops_when_the_difference_is_decided_and_not_before(bench: Bench) -> None:
    bench.reward = lambda of, sample: 0.0
    bench.run(bench.recipe("worse", "eval.samples=16"))
    path = bench.root / "worse"
    rival = Rival(path, read_scores(path), until_decided=True)
    bench.reward = lambda of, sample: 1.0
    better = bench.run(bench.recipe("better", "eval.samples=16"), rival=rival)
    samples = len(better.groups[0].trajectories)
    assert 2 <= samples < 16
    uids = [t.uid for g in better.groups for t in g.trajectories]
    assert len(set(uids)) == len(uids) == samples * len(ROWS)
    against = json.loads((bench.root / "better/eval.json").read_text())["against"]
    assert against["these_problems"]["decided"]
    assert against["paired"]["aime"]["mean"] == 1.0

    bench.reward = lambda of, sample: 0.0
    same = bench.run(bench.recipe("same", "eval.samples=16"), rival=rival)
    assert len(same.groups[0].trajectories) == 16


def test_samples_drawn_until_decided_and_all_at_once_are_never_mixed(bench: Bench) -> None:
    bench.reward = lambda of, sample: 0.0
    bench.run(bench.recipe("worse", "eval.samples=4"))
    rival = Rival(bench.root / "worse", read_scores(bench.root / "worse"), until_decided=True)
    for name, killed, restarted in (("a", rival, None), ("b", None, rival)):
        answers = [1.0] * 9
        bench.reward = lambda of, sample, answers=answers: answers.pop()
        with pytest.raises(IndexError):
            bench.run(bench.recipe(name, "eval.samples=4"), rival=killed)
        bench.reward = lambda of, sample: 1.0
        with pytest.raises(ConfigError, match="other rounds"):
            bench.run(bench.recipe(name, "eval.samples=4"), rival=restarted)
        bench.run(bench.recipe(name, "eval.samples=4"), rival=killed)


def test_a_step_of_the_curve_that_was_decided_early_is_no_full_one(bench: Bench) -> None:
    bench.reward = lambda of, sample: 0.0
    bench.run(bench.recipe("worse", "eval.samples=16"))
    rival = Rival(bench.root / "worse", read_scores(bench.root / "worse"), until_decided=True)
    bench.reward = lambda of, sample: 1.0
    recipe = bench.recipe("curve", "eval.samples=16")

    def samples(rival: Rival | None) -> int:
        return len(bench.run(recipe, step=10, reuse=True, rival=rival).groups[0].trajectories)

    few = samples(rival)
    assert few < 16
    assert samples(None) == 16
    assert samples(rival) == few
    as_good = Rival(
        rival.path, {s: dict.fromkeys(of, [1.0] * 16) for s, of in rival.scores.items()}, until_decided=True
    )
    assert samples(as_good) == 16, "decided against one rival is not decided against another"


def test_every_round_samples_with_seeds_of_its_own(bench: Bench) -> None:
    bench.reward = lambda of, sample: 0.0
    bench.run(bench.recipe("a", "eval.samples=8"))
    rival = Rival(bench.root / "a", read_scores(bench.root / "a"), until_decided=True)
    bench.run(bench.recipe("b", "eval.samples=8"), rival=rival)
    seeds = {w.seed for w in bench.pools[-1].submitted}
    assert len(seeds) == len(round_sizes(8, looking=True)) == 4


def test_the_step_curve_pairs_every_checkpoint_with_the_first(bench: Bench) -> None:
    results = {}
    for step, good in ((0, 1), (10, 3)):
        bench.reward = lambda of, sample, good=good: float(sample < good)
        results[step] = bench.run(bench.recipe("curve", "eval.samples=4"), step=step)
    lines = [line.split(",") for line in curve_of(results).splitlines()]
    assert lines[0][:3] == ["step", "data_source", "mean"]
    assert [(x[0], x[1], x[2], x[7]) for x in lines[1:]] == [
        ("0", "aime", "0.25", "0"),
        ("0", "hmmt", "0.25", "0"),
        ("10", "aime", "0.75", "0.5"),
        ("10", "hmmt", "0.75", "0.5"),
    ]
    assert (bench.root / "curve/val_rollout_data/10.jsonl").is_file()


def test_a_finished_step_is_read_again_only_for_the_same_weights_data_and_settings(bench: Bench) -> None:
    recipe = bench.recipe("curve", "eval.samples=4")
    first = bench.run(recipe, step=10)
    before = bench.sampled
    again = bench.run(recipe, step=10, reuse=True)
    assert bench.sampled == before
    assert {k: v for k, v in again.values.items() if k.startswith("val-core")} == {
        k: v for k, v in first.values.items() if k.startswith("val-core")
    }
    bench.run(recipe, step=20, reuse=True)
    assert bench.sampled == 2 * before
    (bench.root / "model/config.json").write_text('{"another": "model"}')
    bench.run(recipe, step=10, reuse=True)
    assert bench.sampled == 3 * before


@pytest.mark.parametrize(("own", "named"), [("", "huggingface"), ("model", "model")])
def test_all_checkpoints_are_in_one_metrics_file_under_the_recipe_that_was_asked_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, own: str, named: str
) -> None:
    steps = [bench.root / f"rl/checkpoints/global_step_{n}" for n in (3, 20)]
    for path in steps:
        path.mkdir(parents=True)
        (path / "driver.json").write_text(json.dumps({"step": path.name}))

    def merged(source: Path, target: Path, *, dtype: str) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")

    served: list[str] = []
    rollouts = bench.rollouts

    def noting(recipe: Recipe, *, sandboxes: object) -> contextlib.AbstractAsyncContextManager[Rollouts]:
        served.append(recipe.model.path)
        return rollouts(recipe, sandboxes=sandboxes)

    monkeypatch.setattr("aster.merge.merge", merged)
    monkeypatch.setattr("aster.launch.rollouts", noting)
    monkeypatch.setattr("aster.launch.cluster", lambda recipe: contextlib.nullcontext())
    monkeypatch.setattr("aster.launch.sandboxes", lambda recipe: contextlib.nullcontext())
    run = bench.root / "curve"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"run_id": "older", "step": 99, "time": 0.0}) + "\n")
    model = bench.root / own if own else "''"
    command = ["eval", "--recipe", "cpu_eval", "--checkpoint", str(bench.root / "rl"), f"run.dir={bench.root}"]
    command += ["run.name=curve", "run.resume=false", "run.tensorboard=false", "eval.samples=1", f"model.path={model}"]
    assert main([*command, f"data.val_files=[{bench.root / 'bench.parquet'}]"]) == 0

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 20]
    assert len({line["config_hash"] for line in lines}) == len({line["run_id"] for line in lines}) == 1
    assert (run / "metrics.older.jsonl").is_file()
    assert [Path(path).parent.name.startswith("merged-") for path in served] == [True, True]
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["model"]["path"] == str(bench.root / own if own else steps[0] / "huggingface")
    assert Path(written["model"]["path"]).name == named


def test_a_rival_of_other_data_is_refused_before_anything_is_sampled(bench: Bench) -> None:
    with pytest.raises(DataError, match="shares no problem"):
        bench.run(bench.recipe(), rival=Rival(Path("other"), {"aime": {"elsewhere": [1.0]}}))
    assert bench.sampled == 0


def test_checkpoints_are_found_by_step_and_never_two_for_one(tmp_path: Path) -> None:
    for step in (20, 3):
        (tmp_path / f"run/checkpoints/global_step_{step}").mkdir(parents=True)
        (tmp_path / f"run/checkpoints/global_step_{step}/driver.json").write_text("{}")
    (tmp_path / "run/checkpoints/global_step_40").mkdir()  # cut off while it was written
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    steps = checkpoints_of([tmp_path / "hf", tmp_path / "run"])
    assert {n: p.name for n, p in steps.items()} == {0: "hf", 3: "global_step_3", 20: "global_step_20"}
    assert list(steps) == [0, 3, 20]
    with pytest.raises(DataError, match="both stand for step 3"):
        checkpoints_of([tmp_path / "run", tmp_path / "run/checkpoints/global_step_3"])
    with pytest.raises(DataError, match="no model directory"):
        checkpoints_of([tmp_path])


def test_two_finished_evaluations_are_compared_without_any_engine(bench: Bench, capsys) -> None:
    for name, reward in (("a", 0.0), ("b", 1.0)):
        bench.reward = lambda of, sample, reward=reward: reward
        bench.run(bench.recipe(name, "eval.samples=2"))
    started = len(bench.pools)
    assert main(["eval", "--compare", str(bench.root / "a"), str(bench.root / "b")]) == 0
    assert "+1.000" in capsys.readouterr().out
    assert len(bench.pools) == started


def test_the_fault_of_what_was_given_comes_before_the_model_that_was_not(tmp_path: Path, capsys) -> None:
    for given, says in (
        (["data.val_files=[]"], "data.val_files is empty"),
        (["--against", str(tmp_path)], "holds no STEP.jsonl"),
        (["--checkpoint", str(tmp_path)], "no model directory"),
        (["data.val_files=[a.parquet]"], "model.path is empty"),
    ):
        assert main(["eval", *given]) == 1
        assert says in capsys.readouterr().err


def test_until_decided_needs_something_to_compare_with(capsys) -> None:
    assert main(["eval", "--until-decided", "--dry-run"]) == 1
    assert "--against RUN" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--compare", "a", "b", "--rescore", "c"],
        ["--checkpoint", "a", "--compare", "b", "c"],
        ["--rescore", "c", "--checkpoint", "a"],
    ],
)
def test_what_samples_and_what_does_not_are_never_asked_for_together(argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["eval", *argv])
    assert "not allowed with" in capsys.readouterr().err


def test_a_rival_is_for_an_evaluation_that_samples(capsys) -> None:
    assert main(["eval", "--rescore", "a", "--against", "b"]) == 1
    assert "--against b" in capsys.readouterr().err
