import argparse
import base64
import gzip
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import HOSTILE, make_run

from aster.errors import ConfigError, DataError
from aster.page import trajectories
from aster.page.trajectories import Collector, Source
from aster.report import follow, main

GOLDEN = Path(__file__).parents[1] / "golden" / "filter"


class Page(HTMLParser):
    """Scripts by id, other elements with their attributes; what a browser would see of the markup."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.style = ""
        self._inside = ""
        self.text = path.read_text("utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = f"{tag}:{dict(attrs).get('id', '')}"

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        kind, _, name = self._inside.partition(":")
        if kind == "script":
            self.scripts[name] = self.scripts.get(name, "") + data
        elif kind == "style":
            self.style += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts["data"])

    def unpack(self, name: str) -> list[dict[str, Any]]:
        return json.loads(gzip.decompress(base64.b64decode(self.scripts[name])))

    def details(self, row: dict[str, Any]) -> dict[str, Any]:
        return self.unpack(f"chunk-{row['c']}")[row["i"]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    make_run(root, "stage1", problem=HOSTILE, right=1)
    make_run(root, "stage2", right=2)
    (root / "models").mkdir()
    return root


@pytest.fixture(scope="module")
def page(root: Path) -> Page:
    assert main([str(root)]) == 0
    return Page(root / "report.html")


def test_the_page_loads_nothing_from_anywhere(page: Page) -> None:
    for tag, attrs in page.tags:
        assert tag not in {"img", "iframe", "object", "embed", "audio", "video", "base"}
        for name in ("src", "href", "action", "srcset"):
            target = attrs.get(name)
            assert target is None or target.startswith("#") or target == "data:,", (tag, attrs)
    assert not re.search(r"url\(|@import|@font-face", page.style)
    program = page.scripts[""]
    assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts|\bimport\(", program)
    addresses = set(re.findall(r"https?://[^\s\"'`]+", program + page.style))
    assert addresses == {"http://www.w3.org/2000/svg"}, "the name of the SVG namespace is not an address"


def test_every_trajectory_of_every_step_is_in_the_page(page: Page) -> None:
    rows = page.unpack("rows")
    assert page.data["trajectories_total"] == len([r for r in rows if "rep" not in r]) == 2 * (3 * 6 + 9 * 2)
    train = [r for r in rows if r["run"] == 1 and r["kind"] == "train" and r["step"] == 2]
    assert [(r["id"], r["n"], r["ok"]) for r in train[:3]] == [
        ("row What is 1", i, ok) for i, ok in enumerate((1, 0, 1))
    ]
    assert train[0] | {"c": 0, "i": 0} == {
        "run": 1, "kind": "train", "step": 2, "src": "math", "id": "row What is 1", "n": 0, "ok": 1,
        "cause": "answered", "calls": 1, "tok": train[0]["tok"], "s": 2.0, "pred": "0", "gt": "1", "q": "What is 1+1?",
        "c": 0, "i": 0,
    }  # fmt: skip
    assert page.data["chunks"] == len([name for name in page.scripts if name.startswith("chunk-")])


def test_a_trajectory_comes_apart_into_thought_code_observation_and_answer(page: Page) -> None:
    row = next(r for r in page.unpack("rows") if r["run"] == 1 and r["n"] == 1 and r["kind"] == "val")
    details = page.details(row)
    first, last = details["turns"]
    assert first["think"] == "first thought 1 é🙂"
    assert first["code"].startswith("x = 1\nprint(x)")
    assert (first["obs"], first["s"], first["call_s"]) == ("seen 1 in 0", 1.0, 0.5)
    assert last == {
        "think": "second thought", "text": "The answer is \\boxed{1}.", "s": 0.5, "tok": last["tok"], "end": "stop"
    }  # fmt: skip
    assert details["policy_version"] == 2


def test_text_that_looks_like_markup_stays_text(page: Page) -> None:
    rows = page.unpack("rows")
    hostile = next(r for r in rows if r["run"] == 0 and r["kind"] == "train")
    assert hostile["q"] == HOSTILE
    assert HOSTILE in page.details(hostile)["input"]
    assert page.data["runs"][0]["events"][-1]["message"] == f"few calls {HOSTILE}"
    assert page.text.count("</script>") == len([tag for tag, _ in page.tags if tag == "script"])


def test_series_and_config_of_each_run_are_complete(page: Page) -> None:
    first, second = page.data["runs"]
    assert (first["name"], second["name"], first["stage"], first["steps"]) == ("stage1", "stage2", "rl", 3)
    assert first["series"]["perf/throughput"] == [[1, 2, 3], [10, 20, 30]]
    assert first["series"]["critic/score/mean"][1] == [0.5] * 3
    assert first["config"]["optim.lr"] == 1e-6
    assert second["config"]["optim.lr"] == 2e-6


def test_numbers_that_json_has_not_are_text_in_the_page(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "infinite"
    shutil.copytree(root / "stage1", run)
    config = (run / "config.yaml").read_text().replace("mismatch_alarm_k3: 0.01", "mismatch_alarm_k3: .inf")
    (run / "config.yaml").write_text(config)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "time": 9e9, "actor/grad_norm": "inf"}\n')
    rows = [json.loads(line) | {"mean_logprob": math.nan} for line in (run / "rollout_data/1.jsonl").open()]
    (run / "rollout_data/1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(run)]) == 0
    page = Page(run / "report.html")

    def strictly(text: str) -> Any:
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    [shown] = strictly(page.scripts["data"])["runs"]
    assert shown["config"]["rollout.mismatch_alarm_k3"] == "inf"
    assert shown["series"]["actor/grad_norm"] == [[3], ["inf"]]
    chunk = strictly(gzip.decompress(base64.b64decode(page.scripts["chunk-0"])).decode())
    assert chunk[0]["mean_logprob"] == "nan"


def test_accuracies_are_compared_on_the_same_problems(page: Page) -> None:
    first, second = page.data["accuracy"]
    assert (first["source"], first["metric"], first["versus"], first["problems"]) == ("aime", "mean@2", None, 9)
    assert (first["mean"], second["mean"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    versus = second["versus"]
    assert (versus["run"], versus["step"], versus["problems"]) == ("stage1", 3, 9)
    assert versus["mean"] == pytest.approx(1 / 3)
    half = 2.306 * 0.5 / 3  # Student's t of 8 degrees; three of nine differences are 1, their standard deviation 1/2
    assert (versus["low"], versus["high"]) == (
        pytest.approx(1 / 3 - half, abs=1e-3),
        pytest.approx(1 / 3 + half, abs=1e-3),
    )


def test_a_data_source_may_have_a_slash_in_its_name(tmp_path: Path) -> None:
    run = make_run(tmp_path, "hub", source="openai/gsm8k", steps=1)
    assert main([str(run)]) == 0
    [row] = Page(run / "report.html").data["accuracy"]
    assert (row["source"], row["metric"], row["problems"]) == ("openai/gsm8k", "mean@2", 9)
    assert row["mean"] == pytest.approx(1 / 3)


def test_a_limit_takes_the_same_number_from_every_step(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.html"
    assert main([str(root / "stage1"), "--output", str(out), "--max-trajectories", "10", "--max-chars", "100"]) == 0
    page = Page(out)
    rows = page.unpack("rows")
    shown = [(r["kind"], r["step"]) for r in rows if "rep" not in r]
    assert shown == [("train", s) for s in (1, 1, 2, 2, 3, 3)] + [("val", 3)] * 2
    assert page.data["trajectories_total"] == 36


def test_long_texts_lose_their_middle_and_say_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, "long", problem="begin " + "word " * 100 + "end", steps=1)
    assert main([str(run), "--max-chars", "100"]) == 0
    page = Page(run / "report.html")
    text = page.details(page.unpack("rows")[0])["input"]
    assert text.startswith("user\nbegin word")
    assert text.endswith("end\nassistant\n<think>\n")
    assert "characters are not in this page" in text


def test_the_same_runs_give_the_same_page_but_for_its_date(root: Path, tmp_path: Path) -> None:
    pages = []
    for name in ("a.html", "b.html"):
        main([str(root / "stage2"), "--output", str(tmp_path / name)])
        pages.append(re.sub(r'"made":[\d.]+', "", (tmp_path / name).read_text()))
    assert pages[0] == pages[1]


def test_the_reference_files_are_taken_apart_by_their_markers(tmp_path: Path) -> None:
    run = tmp_path / "ref"
    (run / "rollout_data").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "time": 5, "critic/score/mean": 0.5}\n')
    shutil.copy(GOLDEN / "rollout" / "1.jsonl", run / "rollout_data" / "1.jsonl")
    assert main([str(run)]) == 0
    page = Page(run / "report.html")
    row = page.unpack("rows")[0]
    assert row["q"].startswith("What is $12 + 30$?")
    assert row["ok"] == 1
    first, last = page.details(row)["turns"]
    assert (first["think"], first["code"], first["obs"]) == ("I compute it.", "print(42)", "42")
    assert last["text"] == "The answer is \\boxed{42}."


def test_a_run_that_only_logged_is_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 5, "train/loss": "nan"}\n{"step": 2, "train/los')
    assert main([str(tmp_path)]) == 0
    page = Page(tmp_path / "report.html")
    assert page.data["runs"][0]["series"]["train/loss"] == [[1], ["nan"]]
    assert page.unpack("rows") == []


def test_runs_of_one_name_are_told_apart_by_their_folder(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "rl").mkdir(parents=True)
        (tmp_path / parent / "rl" / "metrics.jsonl").write_text('{"step": 1, "time": 5, "train/loss": 1}\n')
    assert main([str(tmp_path / "a" / "rl"), str(tmp_path / "b" / "rl")]) == 0
    names = [run["name"] for run in Page(tmp_path / "report.html").data["runs"]]
    assert names == ["a/rl", "b/rl"]


def test_what_cannot_be_reported_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match=r"no run in .*: a run directory holds metrics\.jsonl"):
        main([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 5, "train/loss": 1}\n')
    with pytest.raises(ConfigError, match="--max-chars 5"):
        main([str(tmp_path), "--max-chars", "5"])


def test_dry_run_names_what_it_would_read_and_writes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(root / "stage1"), "--dry-run"]) == 0
    assert str(root / "stage1" / "report.html") in capsys.readouterr().out
    assert not (root / "stage1" / "report.html").exists()


# tokens, clocks, what was lost ----------------------------------------------------------------------------------------


def test_dry_run_of_a_followed_run_stops_too(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aster.report.follow", lambda args: pytest.fail("it follows"))
    assert main(["--follow", str(root / "stage1"), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("report.html, again every 30 s")


def test_the_tokens_of_a_trajectory_spell_its_text_and_carry_mask_probability_and_version(page: Page) -> None:
    row = next(r for r in page.unpack("rows") if r["run"] == 1 and r["kind"] == "train" and r["step"] == 2)
    tokens = page.details(row)["tk"]
    assert tokens["text"].startswith("first thought 0 é🙂\n</think>")
    assert sum(tokens["n"]) == len(tokens["text"].encode("utf-16-le")) // 2, "the emoji counts twice, as in JavaScript"
    assert len(tokens["n"]) == sum(tokens["m"]) == row["tok"]
    assert len(tokens["m"]) == 3, "model, observation, model"
    assert set(tokens["lp"]) == {2}, "0.1 nats in units of 0.05"
    assert tokens["v"] == [[1, tokens["m"][0] + tokens["m"][2]]]
    assert "r" not in tokens, "the learner was not asked about this one"
    row = next(r for r in page.unpack("rows") if r["run"] == 1 and r["n"] == 1 and r["step"] == 2)
    asked = page.details(row)["tk"]
    assert asked["r"] == [-20] * len(asked["lp"])


def test_tokens_past_the_limit_of_characters_are_counted(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "short.html"
    assert main([str(root / "stage2"), "--output", str(out), "--max-chars", "100"]) == 0
    page = Page(out)
    row = page.unpack("rows")[0]
    tokens = page.details(row)["tk"]
    assert len(tokens["text"]) <= 100
    assert len(tokens["n"]) + tokens["cut"] == row["tok"]


def test_without_the_tokenizer_the_page_says_what_is_missing_and_an_option_names_one(
    root: Path, tmp_path: Path
) -> None:
    run = tmp_path / "moved"
    shutil.copytree(root / "stage2", run)
    config = (run / "config.yaml").read_text().replace("model-for-tests", "nowhere")
    (run / "config.yaml").write_text(config)
    assert main([str(run)]) == 0
    page = Page(run / "report.html")
    assert "tokenizer.json" in page.details(page.unpack("rows")[0])["no_tk"]
    assert main([str(run), "--tokenizer", str(root / "model-for-tests")]) == 0
    page = Page(run / "report.html")
    assert page.details(page.unpack("rows")[0])["tk"]["text"].startswith("first thought 0")


def test_attempts_that_we_lost_are_rows_with_their_error_and_no_verdict(page: Page) -> None:
    [lost] = [r for r in page.unpack("rows") if "rep" in r and r["run"] == 1]
    assert (lost["step"], lost["cause"], lost["ok"], lost["calls"], lost["n"]) == (1, "sandbox_lost", None, 1, 1)
    details = page.details(lost)
    assert details["error"] == f"node gone {HOSTILE}"
    assert details["turns"][0]["think"].startswith("first thought 1")


def test_a_step_on_the_clock_says_who_waited_for_whom(page: Page) -> None:
    where = page.data["steps"].index([1, "train", 2])
    step = json.loads(gzip.decompress(base64.b64decode(page.scripts[f"step-{where}"])))
    assert [lane[0] for lane in step["learner"]] == ["rollouts", "log-probs", "update", "weights", "rest"]
    assert [lane[2] - lane[1] for lane in step["learner"]] == [5000, 1000, 1500, 250, 250]
    assert 0 <= step["learner"][0][1] < 1000
    assert step["engines"] == ["engine-0", "engine-1"]
    assert len(step["t"]) == 6
    rows = page.unpack("rows")
    engine, began, ended, right, row, generating, calling, scoring = step["t"][0]
    assert (engine, right, ended - began) == (0, 1, 2000)
    assert (generating, calling, scoring) == ([0, 1000, 1500, 2000], [1000, 1500], 250)
    assert (rows[row]["step"], rows[row]["n"], rows[row]["run"]) == (2, 0, 1)
    assert step["said"][0] == "The learner waited 5.0 s for rollouts, 62% of the step's 8.0 s."
    assert step["said"][1] == "A trajectory spent 75% of its time generating, 25% in tools."


# half-written runs, runs that go on -----------------------------------------------------------------------------------


def test_a_run_that_was_torn_apart_is_reported_as_far_as_it_goes(tmp_path: Path) -> None:
    run = make_run(tmp_path, "torn")
    (run / "config.yaml").write_text("run: {name: [")
    metrics = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(metrics[: len(metrics) // 2] + "é".encode()[:1])
    parquet = (run / "trajectories" / "2.parquet").read_bytes()
    (run / "trajectories" / "2.parquet").write_bytes(parquet[: len(parquet) // 2])
    rows = (run / "rollout_data" / "3.jsonl").read_bytes()
    (run / "rollout_data" / "3.jsonl").write_bytes(rows[: len(rows) - 40])
    (run / "val_rollout_data" / "3.jsonl").unlink()
    assert main([str(run)]) == 0
    page = Page(run / "report.html")
    assert [r["step"] for r in page.unpack("rows") if "rep" not in r] == [1] * 6 + [2] * 6 + [3] * 5
    notes = " ".join(page.data["notes"])
    for file in ("config.yaml", "2.parquet", "3.jsonl, line 6"):
        assert file in notes
    (run / "metrics.jsonl").unlink()
    assert main([str(run)]) == 0
    assert "no curves" in " ".join(Page(run / "report.html").data["notes"])


ODD_METRICS = [
    ('"critic/score/mean": null', "critic/score/mean is None, not a number"),
    ('"critic/score/mean": [1]', "critic/score/mean is [1], not a number"),
    ('"critic/score/mean": "high"', "critic/score/mean is 'high', not a number"),
    ('"time": "noon"', "time is 'noon', not unix seconds"),
    ('"time": Infinity', "time is inf, not unix seconds"),
    ('"step": "two"', "step is 'two', not a whole number"),
    ('"event": "collapse"', "event and message must be text"),
    (f'"deep": {"[" * 100_000}', "nested too deeply"),
]


@pytest.mark.parametrize(("odd", "says"), ODD_METRICS, ids=[says for _, says in ODD_METRICS])
def test_one_odd_line_of_metrics_costs_itself_and_a_note(tmp_path: Path, odd: str, says: str) -> None:
    run = make_run(tmp_path, "odd")
    file = run / "metrics.jsonl"
    whole = file.read_text().splitlines()
    file.write_text("\n".join([whole[0], "", f'{{"step": 9, "time": 1.0, {odd}}}', *whole[1:]]))
    assert main([str(run)]) == 0
    page = Page(run / "report.html")
    assert page.data["notes"] == [f"{file}, line 3: {says}"]
    assert page.data["runs"][0]["steps"] == 3
    assert page.data["runs"][0]["series"]["critic/score/mean"][0] == [1, 2, 3]


def test_a_step_whose_timing_is_no_number_or_that_has_no_time_is_drawn_without_a_clock(tmp_path: Path) -> None:
    run = make_run(tmp_path, "odd")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    odd = {1: {"timing_s/gen": "nan", "timing_s/publish": "inf"}, 2: {"timing_s/step": "nan"}, 3: {}}
    for line in lines:
        if "timing_s/step" in line:
            line |= odd[line["step"]]
            if line["step"] == 3:
                del line["time"], line["timing_s/began_unix"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([str(run)]) == 0
    page = Page(run / "report.html")
    assert page.data["notes"] == []
    learner = {
        step: page.unpack(f"step-{n}")["learner"]
        for n, (_, kind, step) in enumerate(page.data["steps"])
        if kind == "train"
    }
    assert [name for name, *_ in learner[1]] == ["log-probs", "update", "rest"]
    assert learner[2] == learner[3] == []


ODD_ROWS = [
    ({"turns": [1]}, "turns.0: Input should be"),
    ({"turns": "x"}, "turns: Input should be a valid list"),
    ({"turns": [{"text": [0, 1], "seconds": None}]}, "turns.0.seconds: Input should be a valid number"),
    ({"turns": [{"text": [0, 1], "seconds": 1, "call": "x"}]}, "turns.0.call: Input should be"),
    ({"turns": [{"text": [0], "seconds": 1}]}, "turns.0.text.1: Field required"),
    ({"seconds": float("nan")}, "seconds: Input should be"),
    ({"began_unix": 1e300}, "began_unix: Input should be less than"),
    ({"generate_s": "long"}, "generate_s: Input should be a valid number"),
    ({"acc": "yes"}, "acc: Input should be a valid number"),
    ({"uid": ["a"]}, "uid: Input should be a valid string"),
    ({"ground_truth": None, "non_tensor_reward_model": "x"}, "non_tensor_reward_model: Input should be"),
]


@pytest.mark.parametrize(("odd", "says"), ODD_ROWS, ids=[says for _, says in ODD_ROWS])
@pytest.mark.parametrize("folder", ["rollout_data", "val_rollout_data"])
def test_one_odd_row_costs_itself_and_a_note(tmp_path: Path, folder: str, odd: dict[str, Any], says: str) -> None:
    run = make_run(tmp_path, "odd")
    for parquet in (run / "trajectories").glob("*.parquet"):
        parquet.unlink()  # clocks are made of the rows then
    file = run / folder / "3.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1] |= odd
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(run)]) == 0
    page = Page(run / "report.html")
    [note] = page.data["notes"]
    assert note.startswith(f"{file}, line 2: {says}")
    kind = "train" if folder == "rollout_data" else "val"
    assert sum((r["kind"], r["step"]) == (kind, 3) for r in page.unpack("rows")) == len(rows) - 1


def test_a_ground_truth_of_zero_is_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "rollout_data").mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {"output": "a", "ground_truth": 0},
        {"output": "b", "ground_truth": "", "non_tensor_reward_model": {"ground_truth": 7}},
        {"output": "c"},
    ]
    (run / "rollout_data" / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(run)]) == 0
    assert [r["gt"] for r in Page(run / "report.html").unpack("rows")] == ["0", "7", ""]


@pytest.mark.parametrize(
    ("config", "notes"),
    [
        ("model: foo\nrun: [1]\nstage: rl", ["model is no section", "run is no section"]),
        ("description: 2026-11-28\n? 2026-11-28\n: 1\nwhen: 2026-11-28", []),
        ("when: 2026-99-99", ["cannot be read: month must be in 1..12"]),
        ("a: &a [*a]", ["cannot be read: Circular reference"]),
    ],
)
def test_an_odd_config_is_a_note(tmp_path: Path, config: str, notes: list[str]) -> None:
    run = make_run(tmp_path, "odd", steps=1)
    (run / "config.yaml").write_text(config)
    assert main([str(run)]) == 0
    seen = [note for note in Page(run / "report.html").data["notes"] if "config.yaml" in note]
    assert len(seen) == len(notes)
    assert all(words in note for words, note in zip(notes, seen, strict=True))


def test_a_collector_that_read_before_says_the_same_as_a_fresh_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, "growing", steps=1)
    kept = Collector(limit=10_000, max_chars=20_000)
    first = kept.collect([Source(run, "no tokenizer")])
    assert len(first.rows) == 6 + 18 + 1
    make_run(tmp_path, "growing", steps=2)
    again = kept.collect([Source(run, "no tokenizer")])
    fresh = Collector(limit=10_000, max_chars=20_000).collect([Source(run, "no tokenizer")])
    assert len(fresh.rows) == 12 + 18 * 2 + 1
    assert again == fresh


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each rollout file was read for its rows, and each file of arrays for its clocks."""
    seen: Counter[str] = Counter()
    for name in ("sound_rows", "read_clocks"):
        read = getattr(trajectories, name)

        def counted(path: Path, read: Callable[..., Any] = read, **options: Any) -> Any:
            seen[path.name] += 1
            return read(path, **options)

        monkeypatch.setattr(trajectories, name, counted)
    return seen


def grown(root: Path, *, steps: int) -> Iterator[Path]:
    """A training run of so many steps, six trajectories each, one step more every time."""
    run = make_run(root, "growing", steps=steps)
    shutil.rmtree(run / "val_rollout_data")
    (run / "later").mkdir()
    for step in range(1, steps + 1):
        (run / f"rollout_data/{step}.jsonl").rename(run / f"later/{step}.jsonl")
    for step in range(1, steps + 1):
        (run / f"later/{step}.jsonl").rename(run / f"rollout_data/{step}.jsonl")
        yield run


def test_a_step_that_was_read_is_not_read_again(tmp_path: Path, reads: Counter[str]) -> None:
    collector = Collector(limit=10_000, max_chars=20_000)
    for number, run in enumerate(grown(tmp_path, steps=4), 1):
        reads.clear()
        assert len(collector.collect([Source(run, "no tokenizer")]).rows) >= 6 * number
        assert reads == {f"{number}.jsonl": 1, f"{number}.parquet": 1}


def test_past_the_limits_a_step_is_read_again_only_when_they_leap(
    tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectories, "PAGE_CHARS", 120_000)
    monkeypatch.setattr(trajectories, "STEP_VIEWS", 3)
    collector = Collector(limit=100, max_chars=20_000)
    for number, run in enumerate(grown(tmp_path, steps=32), 1):
        if number == 24:
            reads.clear()
        collector.collect([Source(run, "no tokenizer")])
    assert reads["1.jsonl"] == 1, "4 of each for 25 steps, then 3"
    clocks = sum(count for name, count in reads.items() if name.endswith(".parquet"))
    assert clocks == 9 + 2, "of the newest step each time, and with the leap of the two others that are timed"
    fresh = Collector(limit=100, max_chars=20_000).collect([Source(run, "no tokenizer")])
    assert collector.collect([Source(run, "no tokenizer")]) == fresh


def test_a_followed_run_gets_a_page_that_reloads_and_in_the_end_one_that_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = argparse.Namespace(
        runs=[tmp_path / "soon"], output=None, every=1.0, max_trajectories=100, max_chars=1000, tokenizer=None
    )
    assert follow(args, idle_s=0.5) == 0
    assert "waiting:" in capsys.readouterr().out, "a run that has not begun is waited for"
    run = make_run(tmp_path, "soon", steps=1)
    assert follow(args, idle_s=0.5) == 0
    said = capsys.readouterr().out
    assert f"{run / 'report.html'} is final" in said
    assert Page(run / "report.html").data["every"] is None
    for file, odd in (("metrics.jsonl", {"step": 1, "a": None}), ("rollout_data/1.jsonl", {"turns": [1]})):
        with (run / file).open("a") as out:
            out.write(json.dumps(odd) + "\n")
    assert follow(args, idle_s=0.5) == 0, "an odd line does not end it"
    assert len(Page(run / "report.html").data["notes"]) == 2
    for every in ("0.1", "nan", "inf"):
        with pytest.raises(ConfigError, match="at least 1 second"):
            main(["--follow", str(run), "--every", every])
