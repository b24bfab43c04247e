from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ..interop.nginx import running_nginx
from ..interop.process import Process
from ..interop.proxies import running_tinyproxy
from .cases import CASES, CLIENTS, Case
from .report import Report, describe, describe_connections, read_environment
from .runner import FULL, QUICK, Result, run


def main() -> None:
    options = parse_arguments()
    cases = choose_cases(options.only)
    effort = QUICK if options.quick else FULL
    raise_file_limit(cases)
    started = time.monotonic()
    results, connections = measure_all(cases, options)
    seconds = time.monotonic() - started
    report, environment = Report(results), read_environment()
    print(f"{describe(environment)}\n")
    print(f"CPU time per request, median of {effort.rounds} rounds, {seconds:.0f} s in all\n")
    print(f"{report.table(effort)}\n\n{report.rates()}\n\n{report.targets()}")
    if connections:
        print(f"\n{connections}")
    if options.json:
        options.json.write_text(json.dumps(report.to_dict(effort, environment), indent=2) + "\n")
    for failure in report.failures():
        print(f"\n{failure.client} failed in {failure.case}", file=sys.stderr)
    sys.exit(1 if report.failures() else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description="Compare HTTP clients by CPU time."
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: a rough picture")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="cases whose name contains one of these")
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=CLIENTS)
    return parser.parse_args()


def choose_cases(only: list[str] | None) -> list[Case]:
    cases = [case for case in CASES if only is None or any(part in case.name for part in only)]
    if not cases:
        sys.exit(f"no such case; there are: {', '.join(case.name for case in CASES)}")
    return cases


def measure_all(cases: list[Case], options: argparse.Namespace) -> tuple[list[Result], str | None]:
    """The results, and a line on the connections that carried one request each."""
    effort = QUICK if options.quick else FULL
    results = []
    with running_nginx() as server, proxy_for(cases) as proxy:
        for group in run(server, proxy, cases, options.clients, effort):
            results += group
            print(
                f"measured {', '.join(dict.fromkeys(result.case for result in group))}",
                file=sys.stderr,
                flush=True,
            )
        return results, describe_connections(server.connections_log())


def proxy_for(cases: list[Case]) -> AbstractContextManager[Process | None]:
    return running_tinyproxy() if any(case.proxy for case in cases) else nullcontext()


def raise_file_limit(cases: list[Case]) -> None:
    # nginx holds the connections of all clients at once, and inherits the limit.
    needed = 256 + max(case.connections for case in cases) * len(CLIENTS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            sys.exit(f"{needed} open files are needed, and the limit is {hard}; --only chooses smaller cases")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


if __name__ == "__main__":
    main()
