"""HTTP/1.1: the heads of responses, and what they say about the body and about the connection.

Theory of operation. `recognize` accepts a head only if it has arrived whole and is of the strict, common
form: HTTP/1.1, a final status, CRLF line ends, no folding, no control characters, no white space around
values but the usual space after the colon, and at most one framing field, of its plain form. h11 accepts
each such head too, with the same result; the tests compare the two. So the fast path can't be more lenient
than h11, which judges all other heads, the malformed ones included (`http11_fallback`).

The regular expressions take linear time: the part after each repetition can't begin with a character that the
repetition matches, so that going back finds no other match. They use no possessive quantifiers, with which
CPython 3.11.2 matches wrongly.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .._fields import HeaderList, Headers
from .message_stream import Head

# RFC 9112, sections 4 and 5; RFC 9110, sections 5.5 and 5.6.2.
_TEXT = rb"[\t\x20-\x7e\x80-\xff]*"
_HEAD = re.compile(
    rb"HTTP/1\.1 ([2-9][0-9]{2}) (" + _TEXT + rb")\r\n"
    rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+: ?(?![\t ])" + _TEXT + rb"(?<![\t ])\r\n)*)\r\n"
)
# Applies to the lines that `_HEAD` has matched.
_FIELD = re.compile(rb"([^:]+): ?([^\r]*)\r\n")
# The lines among them that `framing_of` looks at.
_FRAMING_FIELD = re.compile(
    rb"(?<=\n)(content-length|transfer-encoding|connection): ?([^\r]*)\r\n", re.IGNORECASE
)
_FRAMING_NAMES = frozenset((b"content-length", b"transfer-encoding", b"connection"))
# The number of digits that h11 accepts.
_MOST_DIGITS = 20


class Framing(NamedTuple):
    """The header fields of a response that decide how its body ends, and whether the connection persists.

    Attributes:
        length: The value of Content-Length, None without it.
        coded: Whether there is a Transfer-Encoding. It is `chunked`, or else the head is refused.
        closes: Whether the server asks for the connection's end.
        ambiguous: Whether there is more than one framing field, or one not of its plain form.
    """

    length: int | None
    coded: bool
    closes: bool
    ambiguous: bool


class ReceivedHead(NamedTuple):
    """A head, and what came with it.

    Attributes:
        head: The head.
        framing: What its fields say about the body.
        rest: The bytes that came after the head.
    """

    head: Head
    framing: Framing
    rest: bytes


def recognize(data: bytes, limit: int) -> ReceivedHead | None:
    """Parse a final head if it is whole and of the common form. Otherwise return None: h11 has to judge.

    Args:
        data: The bytes that have arrived, from the beginning of the head.
        limit: The most bytes of a head.
    """
    # Don't scan a head that is not whole.
    match = _HEAD.match(data) if b"\r\n\r\n" in data else None
    if match is None:
        return None
    end = match.end()
    start, stop = match.span(3)
    headers = Headers(_FIELD.findall(data, start, stop))
    framing = framing_of(_FRAMING_FIELD.findall(data, start, stop))
    if framing.ambiguous or end > limit:
        return None
    return ReceivedHead(Head(b"HTTP/1.1", int(match[1]), match[2], headers), framing, data[end:])


def framing_of(headers: HeaderList) -> Framing:
    """Find the fields that decide how the body ends, and whether the connection persists."""
    length, fields = None, 0
    coded = closes = malformed = False
    for name, value in headers:
        name = name.lower()
        if name not in _FRAMING_NAMES:
            continue
        match name:
            case b"content-length":
                fields += 1
                if value.isdigit() and len(value) <= _MOST_DIGITS:
                    length = int(value)
                else:
                    malformed = True
            case b"transfer-encoding":
                fields += 1
                coded = True
                malformed = malformed or value != b"chunked"
            case _:
                closes = closes or asks_to_close(value)
    return Framing(length, coded, closes, malformed or fields > 1)


def asks_to_close(value: bytes) -> bool:
    """Return whether a Connection field has the option `close`."""
    options = value.lower()
    # Few fields have the option, and looking at each option takes longer.
    return b"close" in options and any(option.strip() == b"close" for option in options.split(b","))


def may_persist(request_closes: bool, method: bytes, head: Head, framing: Framing) -> bool:
    """Return whether another request may follow on the connection (RFC 9112, 9.3). Ambiguity means closing.

    Args:
        request_closes: Whether the request asks for the connection's end.
        method: The request's method.
        head: The final head of the response.
        framing: What its fields say.
    """
    if request_closes or framing.closes or framing.ambiguous or head.version < b"HTTP/1.1":
        return False
    if head.status == 204 and announces_body(framing):
        return False
    # Some proxies can't parse a further request after a CONNECT that they refused.
    return method != b"CONNECT"


def announces_body(framing: Framing) -> bool:
    """Return whether a response without content announces some.

    The statuses 1xx and 204 exclude both framing fields (RFC 9110, 8.6; RFC 9112, 6.1). A server that
    announces a body may also send it, and it must not be parsed as the next response.
    """
    return framing.coded or bool(framing.length)
