"""Explanations of h11's errors in the terms of HTTP.

h11 gives its reasons only as text. This module recognizes a text by its beginning. An unknown text, from
another version of h11, is passed on unchanged.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Sequence

# The most bytes that an explanation shows of each received piece.
_MOST_SHOWN = 100

# A `bytes` or `bytearray` literal in an error's text.
_LITERAL = re.compile(r"""b'(?:[^'\\]|\\.)*'|b"(?:[^"\\]|\\.)*\"""")

_RECEIVED = {
    "illegal status line": (
        "the server sent the status line {quoted[0]}; "
        "expected is 'HTTP/1.1', a code of three digits and a reason"
    ),
    "InformationalResponse status_code": (
        "the server sent the status line {status_line}; expected is a code from 100 to 999"
    ),
    "illegal header line": (
        "the server sent the header line {quoted[0]}; "
        "expected is a name, a colon and a value without control characters"
    ),
    "continuation line at start": (
        "the server sent a header line that begins with white space ({first_header}) "
        "and continues no other; expected is a name"
    ),
    "conflicting Content-Length": "the server sent more than one Content-Length ({lengths})",
    "bad Content-Length": (
        "the server sent a malformed Content-Length ({lengths}); expected are at most 20 digits"
    ),
    "multiple Transfer-Encoding": (
        "the server sent more than one Transfer-Encoding ({codings}); expected is 'chunked', once"
    ),
    "Only Transfer-Encoding": (
        "the server sent an unsupported Transfer-Encoding ({codings}); expected is 'chunked'"
    ),
    "Received server _SWITCH_UPGRADE": (
        "the server sent 101 (Switching Protocols), but the request does not ask for an upgrade"
    ),
    "illegal chunk header": (
        "the server sent {quoted[0]} as the size of a chunk; expected are at most 20 hexadecimal digits"
    ),
    "malformed chunk footer": "the server sent {quoted[0]} after a chunk; expected is {quoted[1]}",
    "Receive buffer too long": "the response's {what} larger than {limit} bytes",
    "peer closed connection": "the server closed the connection before the end of the body",
    "peer unexpectedly closed connection": "the server closed the connection before the end of the body",
}
_UNKNOWN = "the server broke HTTP/1.1: {text}"


def explain_received(text: str, head: bytes, limit: int) -> str:
    """Explain the error in a response: what was received and what was expected.

    Args:
        text: The text of the error that h11 raised.
        head: The bytes of the rejected head. Empty if h11 rejected a part of the body.
        limit: The most bytes of a head, of a chunk's size line and of the trailers.
    """
    lines = [line.removesuffix(b"\r") for line in head.split(b"\n")]
    lines = list(itertools.takewhile(bool, lines)) or [b""]
    quoted = [_shown(ast.literal_eval(literal)) for literal in _LITERAL.findall(text)]
    sentence = next((said for beginning, said in _RECEIVED.items() if text.startswith(beginning)), _UNKNOWN)
    return sentence.format(
        text=text,
        # Another version of h11 may quote less.
        quoted=[*quoted, text, text],
        status_line=_shown(lines[0]),
        first_header=_shown(b"".join(lines[1:2])),
        lengths=_fields(lines, b"content-length:"),
        codings=_fields(lines, b"transfer-encoding:"),
        what="head is" if head else "trailers, or the size of a chunk in it, are",
        limit=limit,
    )


def _fields(lines: Sequence[bytes], name: bytes) -> str:
    found = [_shown(line) for line in lines if line.lower().startswith(name)]
    return ", ".join(found) or "in the trailers"


def _shown(data: bytes) -> str:
    return repr(data) if len(data) <= _MOST_SHOWN else f"{data[:_MOST_SHOWN]!r}..."
