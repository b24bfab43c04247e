"""The project's jobs: `nox -l` lists them, `nox -s NAME` runs one.

A session needs nothing but pip and a package index; only `bench` needs nginx and tinyproxy as well, `interop`
the programs in `SERVERS`, and `instructions` valgrind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.5.1"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests", "coverage"]

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
PROJECT = nox.project.load_toml("pyproject.toml")
# The real servers and proxies of the interop tests, and the Debian packages that have them.
SERVERS = {
    "nginx": "nginx-light",
    "nghttpd": "nghttp2-server",
    "nghttpx": "nghttp2-proxy",
    "squid": "squid-openssl",
    "tinyproxy": "tinyproxy",
    "haproxy": "haproxy",
    "danted": "dante-server",
    "microsocks": "microsocks",
    "v2ray": "v2ray",
}
# What the session `mutants` changes, and the tests that have to notice.
MUTATED = {
    "scheduler": ("_connections/scheduler.py", ["connections/test_scheduler"]),
    "exchange": (
        "_http/exchange.py",
        ["http/test_exchange", "http/test_http11", "http/test_dropped_responses"],
    ),
    "fields": ("_fields.py", ["test_headers", "test_models"]),
    "http2_headers": ("_http/http2/headers.py", ["http/http2/test_headers"]),
}
WITHOUT_SERVERS = ("-m", "not interop")
QUICK = ("-m", "not interop and not sweep")
SIDE_BY_SIDE = ("-n", "auto")


def group(name: str) -> list[str]:
    """What the dependency group called `name` installs."""
    return list(nox.project.dependency_groups(PROJECT, name))


def lowest() -> list[str]:
    """Each core dependency, pinned to its lower bound."""
    pins = []
    for line in PROJECT["project"]["dependencies"]:
        requirement = Requirement(line)
        (bound,) = (spec.version for spec in requirement.specifier if spec.operator == ">=")
        pins.append(f"{requirement.name}=={bound}")
    return pins


def version_of(python: Path) -> str | None:
    """The version of the CPython at this path, or None if it is none or does not run."""
    ask = "import sys; print(sys.implementation.name, '%d.%d' % sys.version_info[:2], end='')"
    try:
        answer = subprocess.run(
            [python, "-c", ask], capture_output=True, text=True, timeout=20, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.removeprefix("cpython ") if answer.startswith("cpython ") else None


def find_pythons() -> dict[str, str]:
    """The first CPython of each supported version: on PATH, then among those pyenv installed."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    folders = [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    folders += sorted(pyenv.glob("versions/*/bin"), reverse=True)
    own = version_of(Path(sys.executable))
    found: dict[str, str] = {}
    for version in VERSIONS:
        candidates = [folder / f"python{version}" for folder in folders]
        if own == version:
            candidates.append(Path(sys.executable))
        for python in candidates:
            # A pyenv shim exists for versions that it refuses to run, hence the asking.
            if python.exists() and version_of(python) == version:
                found[version] = str(python)
                break
    return found


PYTHONS = find_pythons()
if not PYTHONS:
    sys.exit(f"trio_exchange needs one of CPython {', '.join(VERSIONS)}, and found none.")
OLDEST = next(iter(PYTHONS))
LOWEST = "lowest"


def run_tests(session: nox.Session, *arguments: str) -> None:
    """Run pytest, with what was given to nox after `--`."""
    session.run("python", "-m", "pytest", *arguments, *session.posargs)


@nox.session(python=PYTHONS[OLDEST])
def demo(session: nox.Session) -> None:
    """Show the main job against peers embedded in the demo, on loopback."""
    session.install(".", *group("peers"))
    session.run("python", "-m", "examples.demo", *session.posargs)


@nox.session(python=PYTHONS[OLDEST])
def tests(session: nox.Session) -> None:
    """Run all tests but those against real servers, on the oldest CPython that was found."""
    session.log(f"nox -s tests runs all tests on CPython {OLDEST}: on two cores, less than 4 minutes.")
    session.log("Other versions of CPython: nox -s versions. Tests against real servers: nox -s interop.")
    session.install("-e.", *group("test"))
    run_tests(session, *WITHOUT_SERVERS, *SIDE_BY_SIDE)


@nox.session
@nox.parametrize(
    "python, run",
    [*((PYTHONS.get(version, False), version) for version in VERSIONS), (PYTHONS[OLDEST], LOWEST)],
    ids=[*VERSIONS, LOWEST],
)
def versions(session: nox.Session, run: str) -> None:
    """Run the tests on every other CPython, and on the oldest with each core dependency at its lower bound.

    Those that interrupt a scenario at every step are left to the session `tests`.
    """
    if run == OLDEST:
        session.skip(f"nox -s tests runs all tests on CPython {run}")
    if run not in (*PYTHONS, LOWEST):
        session.skip(f"CPython {run} was not found on this machine: not tested on it")
    pins = lowest() if run == LOWEST else []
    session.install("-e.", *pins, *group("test"))
    if pins:
        session.log(f"CPython {OLDEST} with {', '.join(pins)}")
    run_tests(session, *QUICK, *SIDE_BY_SIDE)


@nox.session(python=PYTHONS[OLDEST])
def coverage(session: nox.Session) -> None:
    """Run the tests and hold their coverage at 100 % of lines and branches.

    Those that interrupt a scenario at every step take half of the time, and cover nothing that the others
    don't; they are run by the session `tests`.
    """
    session.install("-e.", *group("test"))
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *QUICK, *SIDE_BY_SIDE, *session.posargs)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session(python=PYTHONS[OLDEST])
def lint(session: nox.Session) -> None:
    """Check the style, and that the formatter has nothing to change."""
    session.install(*group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session(python=PYTHONS[OLDEST])
def types(session: nox.Session) -> None:
    """Check all types with mypy, the package with pyright, and that every public name has one."""
    session.install("-e.", *group("types"))
    session.run("mypy")
    # Left to itself it would look into .venv, which the README has its readers make.
    python = shutil.which("python", path=session.bin) or sys.executable
    session.run("basedpyright", "--pythonpath", python)
    session.run("basedpyright", "--pythonpath", python, "--verifytypes", "trio_exchange", "--ignoreexternal")


@nox.session(python=PYTHONS[OLDEST])
def package(session: nox.Session) -> None:
    """Build the sdist, from it the wheel, and import that away from this folder."""
    dist = Path(session.create_tmp()).resolve()
    shutil.rmtree(dist)
    session.install("build")
    session.run("python", "-m", "build", "--outdir", str(dist), silent=True)
    (wheel,) = dist.glob("*.whl")
    session.install("--force-reinstall", str(wheel))
    check = (
        "import trio_exchange, importlib.metadata as m, importlib.resources as r;"
        "assert r.files('trio_exchange').joinpath('py.typed').is_file();"
        "assert m.version('trio-exchange') == trio_exchange.__version__;"
        "print('trio_exchange', trio_exchange.__version__, 'from', trio_exchange.__file__)"
    )
    session.run("python", "-I", "-W", "error", "-c", check)


@nox.session(python=PYTHONS[OLDEST])
def examples(session: nox.Session) -> None:
    """Run every example, through the tests that check what it prints."""
    session.install("-e.", *group("test"))
    run_tests(session, "tests/test_examples.py")


@nox.session(python=PYTHONS[OLDEST])
def interop(session: nox.Session) -> None:
    """Run the tests against real servers. It needs the programs in `SERVERS`, and fails without them."""
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"
    for program, package in SERVERS.items():
        if not shutil.which(program, path=path):
            session.error(f"{program} is not installed: on Debian, apt-get install {package}.")
    session.install("-e.", *group("test"), *group("servers"))
    # With this set, a server that is missing or will not start is a failure, never a skip.
    session.env["TRIO_EXCHANGE_REQUIRE_SERVERS"] = "1"
    run_tests(session, "-m", "interop")


@nox.session(python=PYTHONS[OLDEST])
def soak(session: nox.Session) -> None:
    """Send requests of all kinds to servers of all kinds: the minutes after `--`, 3 if there are none."""
    session.install("-e.", *group("test"))
    session.run("python", "-m", "tests.soak", *session.posargs)


@nox.session(python=PYTHONS[OLDEST])
def fuzz(session: nox.Session) -> None:
    """Fuzz what servers send: after `--` the seconds for each target, and the targets (60, and all)."""
    session.install("-e.", *group("test"), *group("fuzz"))
    session.run("python", "-m", "tests.fuzz", *session.posargs)


@nox.session(python=PYTHONS[OLDEST])
def mutants(session: nox.Session) -> None:
    """Change modules in small ways, and see that tests fail: after `--` the names in MUTATED, or all."""
    # Not the package itself: mutmut imports its own changed copy.
    session.install(*PROJECT["project"]["dependencies"], *group("test"), *group("mutants"))
    root = Path.cwd()
    for name in session.posargs or MUTATED:
        module, tests = MUTATED[name]
        work = Path(session.create_tmp()).resolve() / name
        for folder in ("trio_exchange", "tests"):
            shutil.copytree(root / folder, work / folder, dirs_exist_ok=True)
        shutil.copy(root / "pyproject.toml", work)
        selection = "".join(f"\n    tests/{test}.py" for test in tests)
        (work / "setup.cfg").write_text(
            f"[mutmut]\nsource_paths = trio_exchange\nonly_mutate = trio_exchange/{module}\n"
            f"pytest_add_cli_args_test_selection ={selection}\n"
        )
        with session.chdir(work):
            session.run("mutmut", "run")
            session.run("mutmut", "results")


@nox.session(python=PYTHONS[OLDEST])
def bench(session: nox.Session) -> None:
    """Measure CPU per request beside other clients; arguments after `--` are passed on."""
    session.install(".", *group("bench"), *group("peers"))
    written = Path(session.create_tmp()).resolve() / "benchmarks.json"
    session.run("python", "-m", "tests.benchmarks", "--json", str(written), *session.posargs)
    session.log(f"Everything that was measured is in {written}, unless --json named another file.")


@nox.session(python=PYTHONS[OLDEST])
def instructions(session: nox.Session) -> None:
    """Compare the instructions per request with those kept; `-- --update` keeps the new ones."""
    if not shutil.which("valgrind"):
        session.error("valgrind is not installed: on Debian, apt-get install valgrind.")
    pins = []
    if "--update" not in session.posargs:
        # A new release of a dependency, and what it costs, is a change of its own.
        kept = json.loads(Path("tests/benchmarks/instructions.json").read_text())
        pins = [f"{name}=={version}" for name, version in kept["packages"].items()]
    session.install(".", *pins)
    session.run("python", "-m", "tests.benchmarks.instructions", *session.posargs)
