"""Writes docs/architecture.md from the package itself: `python -m tests.architecture_picture`.

The picture has the imports that run, the folders are described by their `__init__`, the modules by the first
paragraph of their docstrings, and the path of a request is recorded while one is made.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import trio

import trio_exchange
from trio_exchange.testing import MemoryConnector, ScriptedPeer

PACKAGE = Path(trio_exchange.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"

# The modules at the top of the package are two layers: what a program imports, and what is below all else.
SURFACE, COMMON = "surface", "common"
# The one folder that programs import from: its docstring is for them.
TESTING = "testing"
TITLES = {
    SURFACE: "trio_exchange: the public functions and the pool",
    COMMON: "trio_exchange: the common modules",
}
DESCRIPTIONS = {
    SURFACE: "The modules that a program imports and calls. They may import from every folder.",
    TESTING: "Tests without a network. Only a program's tests import it, and no other folder.",
    COMMON: "Values, errors, timeouts and tracing, which every folder may import. They import no folder.",
}

HEAD = """\
# Architecture

<!-- Written by `python -m tests.architecture_picture`; tests/test_architecture.py checks that it is. -->

An arrow leads from a folder to one that its modules import. Every folder also imports the modules of
*{common}*; these arrows are left out. `tests/test_architecture.py` has the order of
all modules, and checks that each imports only those above it.

"""
PATH = """\
## The path of a request

A GET of an `https` URL over HTTP/1.1, on a new connection. These are the files that the requesting task
passes, in the order in which it first enters them, with the function that it enters first. The task of the
connection, which runs in the pool's nursery, is not shown.

"""


# -- Imports.


def path_of(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def folder_of(module: str) -> str:
    return module.rpartition(".")[0]


@functools.cache
def imports_of(module: str) -> frozenset[str]:
    """The modules that a module of the package imports when it runs, ours by their names in the package."""
    tree = ast.parse(path_of(module).read_text())
    return frozenset(name for node in _walk_what_runs(tree) for name in _imported_by(node, module))


def _walk_what_runs(tree: ast.AST) -> Iterator[ast.AST]:
    yield tree
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from _walk_what_runs(node)


def _imported_by(node: ast.AST, module: str) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            for alias in names:
                yield alias.name.removeprefix("trio_exchange.")
        case ast.ImportFrom(module=source, names=names, level=level):
            if not level:
                assert source is not None
                yield source.removeprefix("trio_exchange.")
                return
            folder = module.split(".")[:-level]
            if source is None:  # from . import x
                for alias in names:
                    yield ".".join([*folder, alias.name])
            else:
                yield ".".join([*folder, source])


# -- Layers.


def modules() -> list[str]:
    """Every module of the package, but for the folders' `__init__`."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    found = sorted(".".join(path.parts) for path in paths)
    return [name for name in found if name == "__init__" or not name.endswith("__init__")]


def layer_of(module: str) -> str:
    """The folder of a module; SURFACE for a module at the top that imports from a folder, else COMMON."""
    return folder_of(module) or (SURFACE if _imports_folders(module) else COMMON)


@functools.cache
def _imports_folders(module: str) -> bool:
    return any(folder_of(name) or _imports_folders(name) for name in imports_of(module) & {*modules()})


def layers() -> dict[str, list[str]]:
    """The modules of each layer, the layers from the top down: each imports only from those below it."""
    members: dict[str, list[str]] = {}
    for module in modules():
        members.setdefault(layer_of(module), []).append(module)
    below = {layer: {target for source, target in arrows() if source == layer} for layer in members}
    ordered: list[str] = []
    while len(ordered) < len(members):
        free = [layer for layer in sorted(members) if layer not in ordered and below[layer] <= {*ordered}]
        assert free, "the folders import one another in a circle"
        ordered.append(free[0])
    return {layer: members[layer] for layer in reversed(ordered)}


def arrows() -> set[tuple[str, str]]:
    """Which layer imports from which other."""
    ours = {*modules()}
    return {
        (layer_of(module), layer_of(name))
        for module in ours
        for name in imports_of(module) & ours
        if layer_of(module) != layer_of(name)
    }


# -- The page.


def picture() -> str:
    lines = ["```mermaid", "flowchart TD"]
    for layer, members in layers().items():
        lines.append(f'    subgraph {_identifier(layer)}["{_title(layer)}"]')
        lines += [f'        {_identifier(name)}["{name.rpartition(".")[2]}"]' for name in members]
        lines.append("    end")
    drawn = sorted(pair for pair in arrows() if pair[1] != COMMON)
    lines += [f"    {_identifier(source)} --> {_identifier(target)}" for source, target in drawn]
    return "\n".join([*lines, "```", ""])


def _identifier(name: str) -> str:
    return f"m_{name.replace('.', '_')}"


def _title(layer: str) -> str:
    return TITLES.get(layer) or f"{layer.replace('.', '/')}/"


def folder_sections() -> Iterator[str]:
    for layer, members in layers().items():
        lines = [f"## {_title(layer)}", "", _description(layer), ""]
        lines += [f"- `{path_of(name).relative_to(PACKAGE)}`: {_summary(name)}" for name in members]
        yield "\n".join([*lines, ""])


def _description(layer: str) -> str:
    """Two sentences."""
    if layer in DESCRIPTIONS:
        return DESCRIPTIONS[layer]
    summary, rest = _docstring(f"{layer}.__init__").split("\n\n")
    return f"{summary} {rest.splitlines()[0]}"


def _summary(module: str) -> str:
    return " ".join(_docstring(module).split("\n\n")[0].split())


def _docstring(module: str) -> str:
    text = ast.get_docstring(ast.parse(path_of(module).read_text()))
    assert text, f"{module} has no docstring"
    return text


def path_of_a_request() -> str:
    steps = enumerate(record_request(), 1)
    return "".join(f"{number}. `{file}`: `{function}`\n" for number, (file, function) in steps)


def record_request() -> list[tuple[str, str]]:
    """Make a request; each file that its task passes, and the first function that it enters there."""
    entered: dict[str, str] = {}

    async def serve(peer: ScriptedPeer) -> None:
        async for _ in peer:
            await peer.send_response(200, body=b"hello")

    async def main() -> None:
        task = trio.lowlevel.current_task()

        def note(frame: FrameType, event: str, _: Any) -> None:
            file = _ours(frame.f_code)
            if event == "call" and file and file not in entered and trio.lowlevel.current_task() is task:
                entered[file] = frame.f_code.co_qualname

        async with trio.open_nursery() as nursery:
            connector = MemoryConnector(nursery, serve)
            context = connector.ssl_context
            async with trio_exchange.ConnectionPool(connector=connector, ssl_context=context) as pool:
                sys.setprofile(note)
                try:
                    response = await pool.request("GET", "https://example.com/")
                finally:
                    sys.setprofile(None)
                assert response.content == b"hello"

    trio.run(main)
    return list(entered.items())


@functools.cache
def _ours(code: CodeType) -> str | None:
    """The file in the package that a function is from, but for the connector in memory."""
    path = Path(code.co_filename)
    if PACKAGE not in path.parents or PACKAGE / TESTING in path.parents:
        return None
    return str(path.relative_to(PACKAGE))


def page() -> str:
    head = HEAD.format(common=TITLES[COMMON])
    return "\n".join([head + picture(), *folder_sections(), PATH + path_of_a_request()])


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
