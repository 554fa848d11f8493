"""What the dashboard and the alarms of configs/ ask Prometheus for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "configs"


def board() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CONFIGS / "grafana-lookout.json").read_text(encoding="utf-8"))
    return found


def targets() -> Iterator[dict[str, Any]]:
    """Every query of every panel."""
    for panel in board()["panels"]:
        yield from panel.get("targets", ())


def alarms() -> list[str]:
    """Every alarm's expression."""
    return re.findall(r"^ +expr: (.+)$", (CONFIGS / "alerts-lookout.yml").read_text(encoding="utf-8"), re.MULTILINE)


def metrics_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression names."""
    return set(re.findall(r"\b(?:lookout|process)_\w+", expression))


def asked() -> list[set[str]]:
    """The metrics of every expression, of both files."""
    return [metrics_in(expression) for expression in [*(one["expr"] for one in targets()), *alarms()]]
