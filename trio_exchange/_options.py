"""Checks of the pool's options.

Each function checks the value of one option, whose name is part of the error message, and returns the value
in the form in which the pool uses it. All raise TypeError for a value of the wrong type, and ValueError for
a number out of range.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ._connect.connector import Connector, SocketOption
from ._models import Proxy
from ._timeouts import check_seconds


def to_proxies(proxy: Proxy | Sequence[Proxy] | None) -> Sequence[Proxy]:
    """Convert the `proxy` option to a chain of proxies, which may be empty."""
    if proxy is None:
        return ()
    if isinstance(proxy, Proxy):
        return (proxy,)
    given: Any = proxy
    is_text = isinstance(given, (str, bytes, bytearray))
    if is_text or not isinstance(given, Sequence) or not all(isinstance(hop, Proxy) for hop in given):
        # Only the type: the value may contain a password.
        raise TypeError(f"proxy must be a Proxy, a sequence of them, or None, not {type(given).__name__}")
    return tuple(proxy)


def to_connector(connector: Connector | None) -> Connector:
    """Convert the `connector` option; None stands for one that uses Trio's functions."""
    if connector is None:
        return Connector()
    if not isinstance(connector, Connector):
        raise TypeError(f"connector must be a Connector or None, not {connector!r}")
    return connector


def to_socket_options(options: Iterable[SocketOption] | None) -> tuple[SocketOption, ...] | None:
    """Convert the `socket_options` option to a tuple of tuples."""
    if options is None:
        return None
    if not isinstance(options, Iterable):
        raise TypeError(f"socket_options must be an iterable of tuples, not {options!r}")
    options = tuple(options)
    given: tuple[Any, ...] = options
    for option in given:
        if not isinstance(option, tuple) or len(option) not in (3, 4):
            raise TypeError(
                f"each of socket_options must be a tuple of 3 or 4 for setsockopt, not {option!r}"
            )
    return options


def at_least(least: int, name: str, value: int) -> int:
    """Check that a value is an int of `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, not {value}")
    return value


def limit(least: int, name: str, value: int | None) -> int:
    """Convert a limit of `least` or more for the scheduler; None stands for no limit."""
    return sys.maxsize if value is None else at_least(least, name, value)


def seconds(name: str, value: float) -> float:
    """Check that a value is a number of seconds, not None."""
    check_seconds(name, value)
    if value is None:
        raise TypeError(f"{name} must be a number of seconds, not None")
    return value


def interval(name: str, value: float | None) -> float | None:
    """Check that a value is a positive number of seconds, or None for never."""
    check_seconds(name, value)
    if value == 0:
        raise ValueError(f"{name} must be more than 0 seconds, or None for never")
    return value


def text_or_none(name: str, value: str | None) -> str | None:
    """Check that a value is a str or None."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a str or None, not {value!r}")
    return value
