"""`python -m tests.soak MINUTES [--seed N] [--request N]`."""

from __future__ import annotations

import argparse
import faulthandler
import random
import sys

from .plans import make_plan
from .run import soak

# Longer than all that may still take its time when no more requests are sent.
_PATIENCE = 120.0


def main() -> int:
    """Run a soak, and tell what it found. 1 if there was a problem."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=main.__doc__)
    parser.add_argument("minutes", type=float, nargs="?", default=3.0, help="for how long (3)")
    parser.add_argument("--seed", type=int, default=None, help="of all that is chosen (another each time)")
    parser.add_argument("--request", type=int, default=None, help="send only this one, again and again")
    given = parser.parse_args()
    seed = random.randrange(1_000_000) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    if given.request is not None:
        print(make_plan(seed, given.request), flush=True)
    faulthandler.dump_traceback_later(given.minutes * 60 + _PATIENCE, exit=True)
    result = soak(given.minutes * 60, seed, given.request)
    faulthandler.cancel_dump_traceback_later()
    print("\n".join(result.lines()))
    if not result.problems:
        return 0
    for problem in result.problems[:10]:
        print(f"\nPROBLEM: {problem}")
    print(f"\n{len(result.problems)} problems. Again: python -m tests.soak {given.minutes:g} --seed {seed}")
    print("With --request N only one request is sent, again and again.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
