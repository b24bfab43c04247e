"""`python -m tests.fuzz [SECONDS] [TARGET ...]`: fuzz each target for so long, beginning with its corpus.

What is found is written to the folder `fuzz-findings`; when it is fixed, it belongs into the corpus. With
--merge, what was found of each target's corpus is chosen anew, also of the folder `fuzz-work`, where the
fuzzers keep what reaches something new. Inputs whose name is no SHA-1 were written by hand, and stay.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from pathlib import Path

from . import corpus

WORK = Path("fuzz-work")
FINDINGS = Path("fuzz-findings")
_LARGEST_INPUT = 4096
_TARGETS = ("http11", "recognizers", "http2", "parsers")
# Seconds that one run may take, and MiB that the process may use.
_LONGEST_RUN = 20
_MOST_MEMORY = 2048


def _fuzz(target: str, arguments: list[str]) -> None:
    """Fuzz in this process, until libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["trio_exchange", "h11", "h2", "hpack"]):
        from .targets import TARGETS
    warnings.simplefilter("error")
    atheris.Setup([sys.argv[0], *arguments], TARGETS[target])
    atheris.Fuzz()


def _options(target: str) -> list[str]:
    return [
        f"-max_len={_LARGEST_INPUT}",
        f"-timeout={_LONGEST_RUN}",
        f"-rss_limit_mb={_MOST_MEMORY}",
        f"-artifact_prefix={FINDINGS / target}-",
        f"-dict={Path(__file__).parent / 'words.dict'}",
    ]


def _run(target: str, *arguments: str) -> int:
    command = [sys.executable, "-m", "tests.fuzz", "--run", target, *arguments]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    """Fuzz each target in a process of its own; 1 if something was found."""
    if sys.argv[1:2] == ["--run"]:
        _fuzz(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("seconds", type=int, nargs="?", default=60, help="for each target (60)")
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(_TARGETS)} (all)")
    parser.add_argument("--merge", action="store_true", help="choose the corpus anew instead")
    given = parser.parse_args()
    if unknown := set(given.targets) - set(_TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}: there are {', '.join(_TARGETS)}")
    FINDINGS.mkdir(exist_ok=True)
    failed = []
    for target in given.targets or _TARGETS:
        work = WORK / target
        work.mkdir(parents=True, exist_ok=True)
        if given.merge:
            from .targets import TARGETS

            print(f"{target}: {len(corpus.renew(target, TARGETS[target], work))} inputs")
            continue
        limit = f"-max_total_time={given.seconds}"
        if _run(target, *_options(target), limit, str(work), str(corpus.CORPUS / target)):
            failed.append(target)
    for target in failed:
        print(
            f"{target}: something was found, see {FINDINGS}. Again: python -m tests.fuzz --run {target} FILE"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
