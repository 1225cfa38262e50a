"""The report in a real browser: drawn, filtered, walked by keyboard, narrow, hostile, half-written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from report_runs import HOSTILE, make_run

from aster.report import main, write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page's scripts are not run")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        browser.size(1300, 900)
        yield browser


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pages")
    make_run(root, "collapsed", problem=HOSTILE, right=1, calls=0, steps=4)
    make_run(root, "dense", right=2, calls=6, steps=4, event=None)
    assert main([str(root)]) == 0
    return root


@pytest.fixture
def opened(browser: Browser, root: Path) -> Iterator[Browser]:
    browser.errors.clear()
    browser.requests.clear()
    browser.open(root / "report.html")
    yield browser
    assert browser.errors == []


def texts(browser: Browser, selector: str) -> list[str]:
    found = browser.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")
    return [str(text) for text in found]


def test_the_page_draws_itself_without_an_error_and_asks_for_nothing(opened: Browser, root: Path) -> None:
    assert set(opened.requests) == {(root / "report.html").resolve().as_uri()}
    assert texts(opened, "h1") == ["collapsed, dense"]
    assert len(texts(opened, "#charts figure")) >= 10
    names = texts(opened, "#charts figcaption b")
    for name in ("Training reward", "Collapse ratio", "Throughput", "Time of a step, dense"):
        assert name in names
    assert opened.evaluate("[...document.querySelectorAll('svg[role=img]')].every((s) => s.getAttribute('aria-label'))")
    assert texts(opened, "nav[aria-label=sections] a")[:3] == ["Overview", "Accuracy", "Tool use"]


def test_the_collapsed_run_has_the_banner_and_the_dense_one_has_not(opened: Browser) -> None:
    [alarm] = texts(opened, "#alarms [role=alert]")
    assert "collapsed" in alarm
    assert "Interaction collapse" in alarm
    words = texts(opened, ".runs tbody td:nth-child(2)")
    assert words == ["! since step 1", "✓ silent"]
    assert texts(opened, "#bands figcaption .badge") == words


def test_filters_and_order_change_what_the_table_shows(opened: Browser) -> None:
    assert texts(opened, "#count") == ["86 trajectories, 50.0 % right, 2.16 calls each"]
    opened.choose("#filter-run", "1")
    opened.choose("#filter-step", "2")
    opened.choose("#filter-kind", "train")
    opened.wait("document.querySelectorAll('#table tbody tr').length === 6")
    opened.choose("#filter-ok", "0")
    opened.wait("document.querySelectorAll('#table tbody tr').length === 3")
    assert all("✗ wrong" in row for row in texts(opened, "#table tbody tr"))
    opened.choose("#filter-calls", "0")
    opened.wait("document.querySelector('#table caption')")
    opened.click("#filter-clear")
    opened.choose("#filter-ok", "null")
    opened.wait("document.querySelectorAll('#table tbody tr').length === 2")
    assert "sandbox lost" in texts(opened, "#table tbody tr")[0]
    opened.click("#filter-clear")
    opened.click("[data-sort=calls]")
    opened.wait("document.querySelector('th[aria-sort=descending]')")
    opened.wait(
        "[...document.querySelectorAll('#table tbody tr')].slice(0, 25).every((r) => r.textContent.includes('dense'))"
    )
    opened.choose("#filter-text", "row problem")
    opened.wait("document.querySelector('#count').textContent.startsWith('36 ')")
    opened.choose("#filter-text", "seen 2 in 5")
    opened.wait("document.querySelector('#count').textContent === ''")
    opened.click("#filter-deep")
    opened.wait("document.querySelector('#count').textContent.startsWith('8 ')")


def test_a_trajectory_opens_by_keyboard_and_shows_its_turns_tokens_and_neighbours(opened: Browser) -> None:
    opened.choose("#filter-run", "1")
    opened.wait("document.querySelectorAll('#table tbody tr').length === 43")
    opened.evaluate("document.querySelector('#table tbody tr').focus()")
    opened.press("ArrowDown")
    opened.press("Enter")
    opened.wait("document.querySelector('#viewer').open")
    assert texts(opened, "#viewer-title") == ["dense, training step 1"]
    assert len(texts(opened, "#viewer .turn")) == 7
    first = texts(opened, "#viewer .turn")[0]
    for part in ("first thought 1 é🙂", "print(x)", "seen 1 in 0", "runtime error"):
        assert part in first
    assert "✗ wrong" in texts(opened, "#viewer .view-head")[0]
    opened.press("j")
    assert opened.evaluate("document.activeElement.dataset.turn") == "0"
    opened.press("2")
    opened.wait("document.querySelector('.tokens')")
    shown = texts(opened, ".tokens .mine")
    assert len(shown) == 7
    assert "first thought 1 é🙂" in shown[0]
    assert "seen 1 in 0" in texts(opened, ".tokens .theirs")[0]
    opened.press("3")
    opened.wait("document.querySelector('[data-mode=lp]').getAttribute('aria-pressed') === 'true'")
    opened.press("4")
    assert "learner finds it less likely" in texts(opened, ".legend")[0]
    opened.press("5")
    assert "version 0" in texts(opened, ".legend")[0]
    opened.press("1")
    opened.press("ArrowRight")
    opened.wait("document.querySelector('#viewer .view-head').textContent.includes('3 of 43')")
    opened.click("#viewer .siblings button:first-of-type")
    opened.wait("document.querySelector('#viewer .view-head').textContent.includes('1 of 43')")
    opened.press("Escape")
    assert opened.evaluate("document.querySelector('#viewer').open") is False


def test_what_a_model_wrote_is_text_and_never_markup(opened: Browser) -> None:
    assert opened.evaluate("document.querySelectorAll('img').length") == 0
    assert any(HOSTILE in text for text in texts(opened, "#alarms p"))
    assert any(HOSTILE in text for text in texts(opened, "#table td.q"))
    opened.choose("#filter-ok", "null")
    opened.wait("document.querySelectorAll('#table tbody tr').length === 2")
    opened.click("#table tbody tr")
    opened.wait("document.querySelector('#viewer').open")
    assert HOSTILE in texts(opened, "#viewer .notice")[0]
    opened.press("2")
    assert opened.evaluate("document.querySelectorAll('img').length") == 0


def test_a_step_on_the_clock_is_drawn_and_a_line_of_it_opens_its_trajectory(opened: Browser) -> None:
    opened.choose("#step-pick", "6")
    opened.wait("document.querySelector('#step-said').textContent.includes('The learner waited 5.0 s')")
    assert "waits for rollouts" in texts(opened, "#step-chart svg text")
    assert "engine-1" in texts(opened, "#step-chart svg text")
    opened.click("#step-chart canvas")
    opened.wait("document.querySelector('#viewer').open")
    assert "training step" in texts(opened, "#viewer-title")[0]


def test_a_narrow_window_scrolls_only_downwards_and_dark_colours_are_dark(opened: Browser) -> None:
    opened.size(360, 740, dark=True)
    try:
        opened.wait("document.documentElement.dataset.theme === 'dark'")
        assert opened.evaluate("document.documentElement.scrollWidth") == 360
        assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 24)"
    finally:
        opened.size(1300, 900)


def test_a_run_with_losses_only_and_a_torn_one_are_drawn_too(browser: Browser, tmp_path: Path) -> None:
    browser.errors.clear()
    sft = tmp_path / "sft"
    sft.mkdir()
    (sft / "config.yaml").write_text("stage: sft\n")
    lines = [{"step": s, "time": s, "train/loss": 2.0 / s, "val/loss": 2.5 / s} for s in (1, 2, 3)]
    lines[-1]["val/tool_format_accuracy"] = 0.75
    (sft / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "tra')
    assert main([str(sft)]) == 0
    browser.open(sft / "report.html")
    assert texts(browser, ".tile .label") == ["loss", "validation loss", "tool format"]
    assert "Loss" in texts(browser, "#charts figcaption b")
    assert browser.errors == []
    torn = make_run(tmp_path, "torn", steps=1)
    (torn / "config.yaml").write_text("run: [")
    assert main([str(torn)]) == 0
    browser.open(torn / "report.html")
    assert texts(browser, "#alarms summary") == ["1 thing could not be read"]
    assert browser.errors == []


def test_a_data_source_named_as_on_the_hub_has_its_accuracy_and_its_curve(browser: Browser, tmp_path: Path) -> None:
    browser.errors.clear()
    run = make_run(tmp_path, "hub", source="openai/gsm8k", steps=1)
    assert main([str(run)]) == 0
    browser.open(run / "report.html")
    assert "openai/gsm8k avg@2" in texts(browser, ".tile .label")
    assert "Validation accuracy" in texts(browser, "#charts figcaption b")
    assert browser.errors == []


def test_a_live_page_says_how_old_it_is_and_reloads_itself(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path, "live", steps=1)
    page = run / "report.html"
    write_report([run], page, every=1.0)
    browser.open(page)
    browser.wait("document.querySelector('#live')?.textContent.includes('this page was written')")  # it reloads at will
    write_report([run], page)
    browser.wait("document.body && document.body.dataset.ready === 'true' && !document.querySelector('#live')")
