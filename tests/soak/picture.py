"""A soak as a picture: what box and collector took over time, and above it when what was made to fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tests.soak.run import Outcome, Usage

BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)}  # a legend that hides nothing


def save(outcome: Outcome, path: Path) -> None:
    """A row per target of faults; memory, files and threads of both; the age of each camera's latest picture."""
    figure, axes = plt.subplots(
        5, 1, figsize=(13, 13), sharex=True, constrained_layout=True, height_ratios=(1, 2, 2, 2, 2)
    )
    targets = sorted({fault.target for fault in outcome.faults}, reverse=True)
    for row, target in enumerate(targets):
        own = [(fault.at / 60, fault.seconds / 60) for fault in outcome.faults if fault.target == target]
        axes[0].broken_barh(own, (row - 0.4, 0.8), color="tab:red")
    axes[0].set_yticks(range(len(targets)), targets)
    rows = {"memory, MiB": lambda one: one.memory / 2**20, "files": lambda one: one.files}
    rows["threads"] = lambda one: one.threads
    for axis, (title, value) in zip(axes[1:4], rows.items(), strict=True):
        for name in ("box", "collector"):
            taken: list[tuple[float, Usage]] = [(one.second, getattr(one, name)) for one in outcome.samples]
            points = [(second / 60, float(value(usage)) if usage else float("nan")) for second, usage in taken]
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)  # what is flat looks so
        axis.legend(**BESIDE)
    names = sorted({name for one in outcome.samples for name in one.ages})
    for name in names:
        points = [(one.second / 60, one.ages.get(name)) for one in outcome.samples]
        axes[4].plot(
            [minute for minute, _ in points],
            [age if age is not None else float("nan") for _, age in points],
            label=name,
        )
    axes[4].set_ylabel("age of the latest picture, s")
    axes[4].legend(**BESIDE)
    axes[4].set_xlabel("minutes")
    figure.suptitle(f"soak, seed {outcome.seed}: faults, and what they did")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
