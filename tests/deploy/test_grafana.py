"""Every panel and alert asks for metrics that the code has; tests of engine and sandbox scrape those for real."""

import json
import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray", reason="ray is not installed")

from actors.metrics import ENGINE_COUNTERS, EVENTS, NAMES, RUN_FAMILIES
from serve import metrics as sandbox

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "aster.json").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
PANELS = [p for p in DASHBOARD["panels"] if p["type"] != "row"]

_SANDBOX_COUNTERS = {f"aster_sandbox_{name}" for name, _ in sandbox._COUNTS.values()} | {"aster_sandbox_calls"}
_COUNTERS = {*ENGINE_COUNTERS, EVENTS[0], *_SANDBOX_COUNTERS}
_PLAIN = (NAMES | {f"aster_sandbox_{name}" for name in sandbox._GAUGES}) - _COUNTERS
_HISTOGRAMS = {"aster_sandbox_duration_s", "aster_sandbox_queue_s"}
EXPORTED = (
    {f"ray_{name}" for name in _PLAIN}
    | {f"ray_{name}_total" for name in _COUNTERS}
    | {f"ray_{name}_bucket" for name in _HISTOGRAMS}
)


def asked(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def test_every_panel_asks_for_metrics_that_are_exported() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            names = asked(target["expr"])
            assert names, (panel["title"], target["expr"])
            assert names <= EXPORTED, (panel["title"], names - EXPORTED)
    variable = DASHBOARD["templating"]["list"][1]["query"]
    assert asked(variable) <= EXPORTED


def test_every_metric_of_ours_is_drawn_somewhere() -> None:
    drawn = {name for panel in PANELS for target in panel["targets"] for name in asked(target["expr"])}
    assert EXPORTED - drawn == set()


def test_no_alert_takes_a_series_younger_than_its_window_for_one_that_stands_still() -> None:
    windows = [(rule, *found) for rule in RULES for found in re.findall(r"changes\((\w+)\[(\w+)\]\)", rule["expr"])]
    assert windows
    for rule, name, window in windows:
        assert f"and {name} offset {window} > 0" in rule["expr"], rule["alert"]


def test_labels_in_expressions_and_legends_are_labels_of_the_metric() -> None:
    labels = {f"ray_{name}": {"run", label} for name, label, _ in RUN_FAMILIES.values()} | {
        "ray_aster_events_total": {"run", "event"}
    }
    for panel in PANELS:
        for target in panel["targets"]:
            for name in asked(target["expr"]):
                have = labels.get(name, {"run"})
                if name.startswith("ray_aster_engine"):
                    have = {"run", "engine"}
                if name.startswith("ray_aster_sandbox"):
                    have = {"node", "status", "state", "le"}
                assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= have, panel["title"]
                for selector in re.findall(rf"{name}{{([^}}]*)}}", target["expr"]):
                    assert set(re.findall(r"(\w+)=~?\"", selector)) <= have, panel["title"]


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        g = panel["gridPos"]
        cells = {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        assert not cells & taken, panel["title"]
        assert g["x"] + g["w"] <= 24
        taken |= cells
    rows = [p["title"] for p in panels if p["type"] == "row"]
    assert rows == ["Load", "Interaction collapse", "Sandbox", "Engines", "Learner"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_asks_for_metrics_that_are_exported(rule: dict) -> None:
    assert asked(rule["expr"])
    assert asked(rule["expr"]) <= EXPORTED


def test_the_provisioning_names_files_that_are_here() -> None:
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert all((DEPLOY / "prometheus" / name).is_file() for name in prometheus["rule_files"])
    provider = yaml.safe_load((DEPLOY / "grafana" / "provisioning" / "dashboards" / "aster.yaml").read_text())
    assert provider["providers"][0]["options"]["path"] == "$ASTER_DASHBOARDS"
    source = yaml.safe_load((DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    assert source["datasources"][0]["type"] == "prometheus"
