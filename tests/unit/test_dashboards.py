"""The dashboard and the alarms of configs/: what they ask for, box and collector have."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from collector.health import Vitals as Collected
from collector.stats import Stats
from edge.bundle import open_bundle
from edge.capture import CameraState
from edge.config import LoadConfig
from edge.ladder import Ladder
from edge.metrics import Vitals
from edge.publish import Publisher
from tests.dashboards import CONFIGS, alarms, board, metrics_in, targets
from tests.unit.test_vitals import publisher, serve

assert publisher  # the fixture


@pytest.fixture
def labels(bundle_folder: Path, publisher: Publisher, tmp_path: Path) -> dict[str, set[str]]:
    """Every metric that a box and a collector can have, and its labels; Prometheus adds `instance`."""
    gpu = tmp_path / "machine/sys/class/devfreq/17000000.gpu/device/load"
    thermal = tmp_path / "machine/sys/class/thermal/thermal_zone0"
    for path, text in ((gpu, "1"), (thermal / "type", "cpu-thermal"), (thermal / "temp", "50000")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    box = Vitals("box", open_bundle(bundle_folder), ["gate"], threading.Event(), tmp_path / "machine")
    box.ladder = Ladder(LoadConfig(), max_crops=32, smaller=False)
    box.measured("detect", 0.1)
    state = CameraState("gate", phase="up", frames=1, drops={"paced": 1}, frame_at=1.0)
    publisher.delivery.acknowledged_at = 1.0
    serve(box, publisher, state)
    stats = Stats(devices={"box": 1.0})
    collected = Collected(stats, "tcp://127.0.0.1:1", "x.db", tmp_path / "x.db")
    text = b"".join(map(generate_latest, (box.registry, collected.registry))).decode()
    found: dict[str, set[str]] = {"lookout_clock_synchronised": set()}  # some machines cannot tell
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return {name: own | {"instance"} for name, own in found.items()}


def words(expression: str) -> Iterator[str]:
    """The labels that an expression names: in braces, and after `by`."""
    for inside in re.findall(r"\{([^}]*)\}", expression):
        yield from re.findall(r"(\w+)\s*=", inside)
    for inside in re.findall(r"\bby\s*\(([^)]*)\)", expression):
        yield from re.findall(r"\w+", inside)


EXPRESSIONS = [*(one["expr"] for one in targets()), *alarms()]


def test_every_query_asks_for_what_is_there(labels: dict[str, set[str]]) -> None:
    assert len(EXPRESSIONS) > 40
    for expression in EXPRESSIONS:
        metrics = metrics_in(expression)
        assert metrics, expression
        for metric in metrics:
            assert metric in labels, f"{expression}: nobody exports {metric}"
            assert set(words(expression)) <= labels[metric], expression
        assert expression.count("(") == expression.count(")"), expression


def test_every_legend_names_labels_of_its_query(labels: dict[str, set[str]]) -> None:
    for one in targets():
        (metric,) = metrics_in(one["expr"])
        left = set(re.findall(r"\{\{(\w+)\}\}", one["legendFormat"]))
        kept = re.search(r"sum by \(([^)]*)\)", one["expr"])
        assert left <= (set(re.findall(r"\w+", kept[1])) if kept else labels[metric]), one["expr"]


def test_counters_are_asked_for_their_rate() -> None:
    """A counter begins again at 0 with each start: its value as such says nothing."""
    for expression in EXPRESSIONS:
        for metric in metrics_in(expression):
            if re.search(r"_(total|bucket|count|sum)$", metric):
                assert re.search(rf"(rate|increase)\({metric}(\{{[^}}]*\}})?\[", expression), expression


def test_every_metric_of_the_box_is_shown(labels: dict[str, set[str]]) -> None:
    shown = set().union(*map(metrics_in, EXPRESSIONS))
    own = {name for name in labels if name.startswith("lookout_")}
    left = {name for name in own - shown if not re.search(r"_(created|count|sum)$", name)}
    assert not left, "in no panel and no alarm"


def test_the_dashboard_imports() -> None:
    whole = board()
    panels = whole["panels"]
    numbers = [panel["id"] for panel in panels]
    assert len(set(numbers)) == len(numbers)
    assert whole["schemaVersion"] >= 39
    assert "id" not in whole, "that of one Grafana is another dashboard's in another"
    variables = {one["name"]: one for one in whole["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in panels:
        assert panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
            references = [one["refId"] for one in panel["targets"]]
            assert len(set(references)) == len(references)
    for one in targets():
        for name in re.findall(r"\$\{?(\w+)", one["expr"]):
            assert name in variables, one["expr"]


def test_panels_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board()["panels"]:
        place = panel["gridPos"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("ready", ["lookout_ready", "lookout_collector_ready"])
def test_what_does_not_run_is_not_ready_either(ready: str) -> None:
    """It exports nothing: only Prometheus' own `up` says so."""
    (alarm,) = (alarm for alarm in alarms() if metrics_in(alarm) == {ready})
    assert f"up == 0 and on (instance, job) last_over_time({ready}[" in alarm


def test_every_alarm_has_a_name_a_summary_and_how_soon() -> None:
    text = (CONFIGS / "alerts-lookout.yml").read_text(encoding="utf-8")
    names = re.findall(r"^ +- alert: (\w+)$", text, re.MULTILINE)
    assert len(names) == len(set(names)) == len(alarms())
    assert text.count("severity: page") + text.count("severity: ticket") == len(names)
    assert len(re.findall(r"annotations: \{ summary: \"", text)) == len(names)


def test_the_alarms_are_yaml() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not here: the alarms were read by pattern alone")
    groups = yaml.safe_load((CONFIGS / "alerts-lookout.yml").read_text(encoding="utf-8"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert [rule["expr"] for rule in rules] == alarms()
    assert {rule["labels"]["severity"] for rule in rules} == {"page", "ticket"}
