"""A soak as a picture: what box and collector took over time, with the faults behind it."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tests.soak.run import Outcome, Usage

COLOURS = {"collector": "tab:red", "wire": "tab:purple", "box": "tab:olive"}  # of faults; a camera's are grey


def save(outcome: Outcome, path: Path) -> None:
    """Memory, files and threads of both, and the age of each camera's latest picture."""
    figure, axes = plt.subplots(4, 1, figsize=(13, 12), sharex=True, constrained_layout=True)
    rows = {"memory, MiB": lambda one: one.memory / 2**20, "files": lambda one: one.files}
    rows["threads"] = lambda one: one.threads
    for axis, (title, value) in zip(axes, rows.items(), strict=False):
        for name in ("box", "collector"):
            taken: list[tuple[float, Usage]] = [(one.second, getattr(one, name)) for one in outcome.samples]
            points = [(second / 60, float(value(usage)) if usage else float("nan")) for second, usage in taken]
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axis.set_ylabel(title)
        axis.legend(loc="upper left")
    names = sorted({name for one in outcome.samples for name in one.ages})
    for name in names:
        points = [(one.second / 60, one.ages.get(name)) for one in outcome.samples]
        axes[3].plot(
            [minute for minute, _ in points],
            [age if age is not None else float("nan") for _, age in points],
            label=name,
        )
    axes[3].set_ylabel("age of the latest picture, s")
    axes[3].legend(loc="upper left")
    axes[3].set_xlabel("minutes")
    for fault in outcome.faults:
        for axis in axes:
            axis.axvspan(fault.at / 60, fault.ends / 60, color=COLOURS.get(fault.target, "tab:gray"), alpha=0.15)
        axes[0].text(fault.at / 60, axes[0].get_ylim()[1], f" {fault.target} {fault.kind}", rotation=90, fontsize=6)
    figure.suptitle(f"soak, seed {outcome.seed}: faults of cameras grey, collector red, wire purple, box green")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
