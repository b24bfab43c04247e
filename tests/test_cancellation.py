"""Whatever step a request is interrupted at, nothing is lost, nothing leaks, and no other request notices."""

from __future__ import annotations

import itertools

import pytest

from tests.harness.scenarios import DIRECT, MARKS, OVER_SOCKETS, SCENARIOS, Handler, network, refused
from tests.harness.sweep import Interruption, Run, sweep

pytestmark = pytest.mark.sweep

scenarios = pytest.mark.parametrize("name", SCENARIOS)
interruptions = pytest.mark.parametrize("interruption", Interruption)
over_sockets = pytest.mark.parametrize("name", OVER_SOCKETS)


@scenarios
@interruptions
def test_interrupted_at_any_step(name: str, interruption: Interruption) -> None:
    assert sweep(SCENARIOS[name], network, interruption) >= 4


@over_sockets
@interruptions
def test_interrupted_at_any_step_over_sockets(name: str, interruption: Interruption) -> None:
    assert sweep(SCENARIOS[name], network, interruption, sockets=True) >= 4


@scenarios
@interruptions
def test_interrupted_at_any_step_with_callbacks_that_wait(name: str, interruption: Interruption) -> None:
    handler = Handler()
    extensions = {"trace": handler, "informational": handler}
    steps = sweep(SCENARIOS[name], network, interruption, extensions=extensions)
    assert steps > (20 if name in DIRECT else 6)


@pytest.mark.parametrize(
    ("name", "sockets"),
    [(name, False) for name in SCENARIOS] + [(name, True) for name in OVER_SOCKETS],
    ids=lambda value: {False: "memory", True: "sockets"}.get(value, value),
)
@pytest.mark.parametrize("which", ["trace", "informational"])
def test_a_callback_that_raises_at_any_call(name: str, sockets: bool, which: str) -> None:
    for call in itertools.count(1):
        handler = Handler(failing=call)
        error = Run(SCENARIOS[name], network, {which: handler}, sockets=sockets).uninterrupted()
        if len(handler.calls) < call:
            assert error is None
            break
        assert error is handler.error
    assert call > (8 if name in DIRECT else 2) or which == "informational"


@scenarios
def test_a_scenario_is_what_it_is_said_to_be(name: str) -> None:
    """It could take another way than the one that is to be interrupted."""
    handler = Handler()
    scenario, extensions = SCENARIOS[name], {"trace": handler, "informational": handler}
    assert Run(scenario, network, extensions).uninterrupted() is None
    calls = handler.calls
    begun = [call if isinstance(call, int) else str(call).removesuffix(".started") for call in calls]
    assert tuple(call for call in begun if isinstance(call, int) or call in MARKS) == scenario.way
    assert calls[0] == f"{scenario.way[0]}.started"
    completed = {f"{mark}.complete" for mark in scenario.way if mark in MARKS}
    assert completed <= set(calls) or scenario.run is refused
    if name == "half read":
        assert calls[-1] == "connection.close.complete"
    if name == "h2 half read":
        assert calls[-1] == "http2.response_closed.complete"
