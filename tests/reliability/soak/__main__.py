"""`python -m tests.reliability.soak`: a soak for REL_SECONDS (30 minutes), its figures, and 1 for a fault."""

import asyncio
import os
import sys
import tempfile
from pathlib import Path

from tests.reliability.soak.run import soak
from tests.reliability.soak.verdict import Plan, faults_of, report


def main() -> int:
    plan = Plan(seconds=float(os.environ.get("REL_SECONDS", 1_800)), seed=int(os.environ.get("REL_SEED", 1)))
    with tempfile.TemporaryDirectory(prefix="engine-soak-") as directory:
        figures = asyncio.run(soak(plan, Path(directory)))
    faults = faults_of(figures, plan)
    sys.stdout.write(report(figures, plan) + "\n")
    sys.stdout.writelines(f"FAULT: {fault} (seed {plan.seed})\n" for fault in faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
