import base64
import gzip
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from aster.config import Recipe
from aster.data.rollouts import write_rollouts, write_validation
from aster.errors import ConfigError, DataError
from aster.metrics import rollout_metrics, validation_metrics
from aster.report import main
from aster.tracking import Tracker
from aster.types import (
    Cause,
    PromptRow,
    Timing,
    ToolCall,
    ToolOutcome,
    Trajectory,
    TrajectoryGroup,
    Turn,
    Verdicts,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "filter"
HOSTILE = "</script><img src=x onerror=alert(1)>{{SCRIPT}}"


class Texts:
    """A vocabulary in which every piece of text is one id."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def ids(self, *pieces: str) -> np.ndarray:
        first = len(self.pieces)
        self.pieces += pieces
        return np.arange(first, len(self.pieces), dtype=np.int32)

    def decode(self, ids: np.ndarray, /, *, skip_special: bool = False) -> str:
        text = "".join(self.pieces[i] for i in ids.tolist())
        return re.sub(r"<\|im_(start|end)\|>", "", text) if skip_special else text


TEXTS = Texts()


def trajectory(problem: str, sample: int, *, right: bool) -> Trajectory:
    code = f"x = {sample}\nprint(x)  # <b>{problem}</b>"
    call = json.dumps({"name": "code_interpreter", "arguments": {"code": code}})
    prompt = TEXTS.ids(f"<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n<think>\n")
    parts = [
        f"first thought {sample}\n</think>\n\n<tool_call>\n{call}\n</tool_call><|im_end|>",
        f"\n<|im_start|>user\n<tool_response>\nseen {sample}\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n",
        f"second thought\n</think>\n\nThe answer is \\boxed{{{sample}}}.<|im_end|>",
    ]
    status = "ok" if right else "error"
    outcome = ToolOutcome.SUCCESS if right else ToolOutcome.RUNTIME_ERROR
    return Trajectory(
        uid=f"u/{problem[:9]}/{sample}",
        row_id=f"row {problem[:9]}",
        sample=sample,
        prompt_ids=prompt,
        ids=TEXTS.ids(*parts),
        mask=np.array([True, False, True]),
        behaviour_logprobs=np.array([-0.1, 0, -0.2], np.float32),
        versions=np.array([3, -1, 3], np.int32),
        turns=(
            Turn(0, 1, "stop", 0.0, 1.0, ToolCall(code, status, outcome, f"seen {sample}", 0.5)),
            Turn(2, 3, "stop", 1.5, 2.0),
        ),
        cause=Cause.ANSWERED,
        timing=Timing(0, 2.0, 1.5, 0.5, 0.0),
    ).with_reward(float(right), Verdicts(right, right, str(sample)))


def group(problem: str, step: int, *right: bool, source: str = "math") -> TrajectoryGroup:
    members = tuple(trajectory(problem, i, right=ok) for i, ok in enumerate(right))
    return TrajectoryGroup(PromptRow(f"row {problem[:9]}", (), "1", source), step, members)


def make_run(root: Path, name: str, *, problem: str = "What is 1+1?", steps: int = 3, right: int = 1) -> Path:
    recipe = Recipe.load(
        "rl_stage1_18k", [f"run.dir={root}", f"run.name={name}", "run.tensorboard=false", f"optim.lr={right}e-6"]
    )
    with Tracker.open(recipe, total_steps=steps, console=Console(file=io.StringIO())) as tracker:
        for step in range(1, steps + 1):
            train = [group(problem, step, True, False, True), group("other", step, False, False, True)]
            tracker.log(step, rollout_metrics(train) | {"actor/lr": 1e-6, "perf/throughput": 10.0 * step})
            write_rollouts(recipe.run.path / "rollout_data", train, step=step, decode=TEXTS.decode)
        val = [group(f"problem {i}", steps, *[i % 3 < right] * 2, source="aime") for i in range(9)]
        tracker.log(steps, validation_metrics(val, n=2))
        write_validation(recipe.run.path / "val_rollout_data", val, step=steps, decode=TEXTS.decode)
        tracker.event(2, "collapse", f"few calls {HOSTILE}")
    return recipe.run.path


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
    assert page.data["trajectories_total"] == len(rows) == 2 * (3 * 6 + 9 * 2)
    train = [r for r in rows if r["run"] == 1 and r["kind"] == "train" and r["step"] == 2]
    assert [(r["id"], r["n"], r["ok"]) for r in train[:3]] == [
        ("row What is 1", i, ok) for i, ok in enumerate((1, 0, 1))
    ]
    assert train[0] | {"c": 0, "i": 0} == {
        "run": 1, "kind": "train", "step": 2, "src": "math", "id": "row What is 1", "n": 0, "ok": 1,
        "cause": "answered", "calls": 1, "tok": 3, "s": 2.0, "pred": "0", "gt": "1", "q": "What is 1+1?",
        "c": 0, "i": 0,
    }  # fmt: skip
    assert page.data["chunks"] == len([name for name in page.scripts if name.startswith("chunk-")])


def test_a_trajectory_comes_apart_into_thought_code_observation_and_answer(page: Page) -> None:
    row = next(r for r in page.unpack("rows") if r["run"] == 1 and r["n"] == 1 and r["kind"] == "val")
    details = page.details(row)
    first, last = details["turns"]
    assert first["think"] == "first thought 1"
    assert first["code"].startswith("x = 1\nprint(x)")
    assert (first["obs"], first["tok"], first["s"], first["call_s"]) == ("seen 1", 1, 1.0, 0.5)
    assert last == {"think": "second thought", "text": "The answer is \\boxed{1}.", "s": 0.5, "tok": 1, "end": "stop"}
    assert details["policy_version"] == 3


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


def test_accuracies_are_compared_on_the_same_problems(page: Page) -> None:
    first, second = page.data["accuracy"]
    assert (first["source"], first["metric"], first["versus"], first["problems"]) == ("aime", "mean@2", None, 9)
    assert (first["mean"], second["mean"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    versus = second["versus"]
    assert (versus["run"], versus["step"], versus["problems"]) == ("stage1", 3, 9)
    assert versus["mean"] == pytest.approx(1 / 3)
    assert 0 <= versus["low"] < versus["mean"] < versus["high"]


def test_a_limit_takes_the_same_number_from_every_step(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.html"
    assert main([str(root / "stage1"), "--output", str(out), "--max-trajectories", "10", "--max-chars", "100"]) == 0
    page = Page(out)
    rows = page.unpack("rows")
    assert [(r["kind"], r["step"]) for r in rows] == [("train", s) for s in (1, 1, 2, 2, 3, 3)] + [("val", 3)] * 2
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


CHROMIUM = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page's scripts are not run")
def test_a_browser_draws_the_page_and_opens_a_trajectory(page: Page, root: Path, tmp_path: Path) -> None:
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=8000 --window-size=1300,1000 --dump-dom"
    address = (root / "report.html").resolve().as_uri() + "#trajectory-0"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path}", address]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "data-error" not in dom, re.search(r'data-error="[^"]*"', dom)
    assert 'data-ready="true"' in dom
    assert "onerror=alert" in dom, "hostile text is shown ..."
    assert "<img" not in dom, "... and is not markup"
    assert dom.count("<article") == 2
    assert dom.count('class="card chart"') >= 12
    assert 'aria-label="Training reward"' in dom
    assert "page 1 of 2" in dom, "72 trajectories, 50 on a page"
    viewer = dom[dom.index('<dialog id="viewer"') :]
    for text in ("first thought 0", "seen 0", "Final turn", '<span class="n">0</span>', "ended by"):
        assert text in viewer
