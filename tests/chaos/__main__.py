"""`python -m tests.chaos`: kills a box and a collector and cuts the wire between them, and counts what came through."""

from __future__ import annotations

import argparse
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.chaos.harness import ChaosError, Run, plan_from_seed

LIMIT = 600.0  # s, and a second for every LIMIT_EVENTS events
LIMIT_EVENTS = 50


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--seed", type=int, help="replays the plan of an earlier run with as many events")
    asked = parser.parse_args()
    seed = secrets.randbelow(1_000_000) if asked.seed is None else asked.seed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of all that is to be closed
    folder = Path(tempfile.mkdtemp(prefix="lookout-chaos-"))
    plan = plan_from_seed(seed, asked.events)
    print(f"seed {seed}: {plan.events} events, {len(plan.rounds)} rounds, in {folder}", flush=True)
    run = Run(plan, folder, lambda line: print(line, flush=True), LIMIT + asked.events / LIMIT_EVENTS)
    try:
        outcome = run()
    except ChaosError as error:
        print(f"chaos: {error}", flush=True)
        return 1
    print(outcome, flush=True)
    if not outcome.good:
        print(outcome.details(), flush=True)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
