"""`python -m tests.soak`: a box before four cameras, faults without end, and whether anything grew meanwhile."""

from __future__ import annotations

import argparse
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edge.errors import LookoutError
from tests.bench.tracking import bundle
from tests.rtsp_server import missing
from tests.soak.judge import BLOCKS, trend
from tests.soak.picture import save
from tests.soak.run import EVERY, Outcome, Soak, SoakError, Usage

SHORTEST = 5.0  # minutes; less says nothing of slopes
WARM = 0.2, 60.0  # of the run, and at least seconds, until a program has everything that it keeps
# How much it may rise in all, steadily and by a step: allocators and caches settle, and a fault may be on at either
# end. A leak of one file or thread per fault would be dozens in the shortest soak.
LIMITS: dict[str, tuple[Callable[[Usage], float], float, float]] = {
    "memory, MiB": (lambda one: one.memory / 2**20, 6.0, 12.0),
    "files": (lambda one: one.files, 2.0, 10.0),
    "threads": (lambda one: one.threads, 2.0, 10.0),
}
console = Console(width=150)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="replays the plan of an earlier soak of as many minutes")
    parser.add_argument("--picture", type=Path, default=Path("out/soak.png"))
    asked = parser.parse_args()
    if asked.minutes < SHORTEST:
        parser.error(f"--minutes: at least {SHORTEST:.0f}")
    seed = secrets.randbelow(1_000_000) if asked.seed is None else asked.seed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of all that is to be closed
    folder = Path(tempfile.mkdtemp(prefix="lookout-soak-"))
    if reason := missing():
        print(f"no RTSP, all cameras are HTTP: {reason}", flush=True)
    print(f"seed {seed}: {asked.minutes:.0f} minutes, in {folder}", flush=True)
    try:
        mini = bundle(folder)
        soak = Soak(folder, mini.path, seed, 60 * asked.minutes, reason is None, lambda line: print(line, flush=True))
        outcome = soak()
    except (SoakError, LookoutError) as error:
        print(f"soak: {error}", flush=True)
        return 1
    save(outcome, asked.picture)
    good = told(outcome)
    print(f"{'flat and well' if good else 'NOT as it should be'}: seed {seed}, {asked.picture}", flush=True)
    if good:
        shutil.rmtree(folder)
    return 0 if good else 1


def told(outcome: Outcome) -> bool:
    """Say what came out -> whether all is well."""
    good = True
    table = Table("", "", title="what they took, after they were warm")
    for column in ("first", "last", "per hour", "95 % interval", "may rise by", "verdict"):
        table.add_column(column, justify="right")
    for name in ("box", "collector"):
        taken = settled(outcome, name)
        for title, (value, limit, step) in LIMITS.items():
            if len(taken) < BLOCKS:
                good = False
                table.add_row(name, title, "", "", "", "", "", "too few samples")
                continue
            found = trend([second for second, _ in taken], [value(usage) for _, usage in taken])
            grew = found.grew(limit, step)
            good = good and not grew
            table.add_row(
                name,
                title,
                *(f"{one:.1f}" for one in (found.first, found.last)),
                f"{found.slope:+.2f}",
                f"{found.low:+.2f} to {found.high:+.2f}",
                f"{limit:g} in {60 * found.hours:.0f} min, {step:g} at once",
                "GREW" if grew else "flat",
            )
    console.print(table)
    console.print(recoveries(outcome))
    lines = outcome.wrong()
    print(
        f"{len(outcome.faults)} faults; {outcome.described} frames described, {outcome.delivered} events delivered, "
        f"{outcome.stored} stored, gaps: {'some' if outcome.gaps else 'none'}"
    )
    for name, drops in sorted(outcome.drops.items()):
        print(f"{name}: not described: {', '.join(f'{count} {why}' for why, count in drops.items()) or 'none'}")
    for line in lines:
        print(f"  {line}")
    return good and not lines


def settled(outcome: Outcome, name: str) -> list[tuple[float, Usage]]:
    """Second and usage of the process that was there last, once it was warm."""
    taken: list[tuple[float, Usage | None]] = [(one.second, getattr(one, name)) for one in outcome.samples]
    known = [(second, usage) for second, usage in taken if usage]
    if not known:
        return []
    own = [(second, usage) for second, usage in known if usage.pid == known[-1][1].pid]
    share, least = WARM
    warm = own[0][0] + max(least, share * outcome.samples[-1].second) - EVERY
    return [(second, usage) for second, usage in own if second >= warm]


def recoveries(outcome: Outcome) -> Table:
    table = Table("camera", "fault", title="cameras, after a fault")
    for column in ("times", "as seen meanwhile", "pictures again after, s"):
        table.add_column(column, justify="right")
    kinds = sorted({(one.fault.target, one.fault.kind) for one in outcome.recoveries})
    for target, kind in kinds:
        own = [one for one in outcome.recoveries if (one.fault.target, one.fault.kind) == (target, kind)]
        worst = max(float("inf") if one.seconds is None else one.seconds for one in own)
        phases = sorted({phase for one in own for phase in one.phases})
        table.add_row(target, kind, str(len(own)), " ".join(phases), f"{worst:.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
