from __future__ import annotations

import pytest
import trio

from trio_exchange._conflicts import ConflictDetector


def test_one_task_at_a_time() -> None:
    detector = ConflictDetector("another task is reading")
    busy = [detector.busy]
    for _ in range(2):
        with detector:
            busy.append(detector.busy)
            with pytest.raises(trio.BusyResourceError, match=r"^another task is reading$"), detector:
                pytest.fail("a second task was let in")
            busy.append(detector.busy)
        busy.append(detector.busy)
    assert busy == [False, True, True, False, True, True, False]


def test_an_error_inside_lets_the_next_task_in() -> None:
    detector = ConflictDetector("another task is reading")
    with pytest.raises(KeyError), detector:
        raise KeyError
    assert not detector.busy
