"""HTTP/1.1: heads and chunked bodies that are not of the common form, which h11 parses.

Theory of operation. `http11_heads` and `http11_bodies` recognize the common forms. Anything else goes to a
`Judge`: an h11 connection that is made only then, for one head or for the rest of one chunked body. It sees
the bytes in the pieces in which they arrive, and accepts them or refuses them with its error. Nothing else of
h11 is in use: requests, bodies of known length, and the reuse of connections don't need it.

A judge of heads must know the request: it decides whether the server may switch protocols. A judge of a
chunked body begins at the CRLF after some chunk. So its h11 connection is first fed a made-up response that
ends at the same position: a head, and a chunk of one byte without its CRLF.

*White space.* A line that h11 refuses costs it quadratic time if much white space follows the colon, or is in
a chunk's extension: its regular expressions try each division of the white space. So a judge cuts what
arrives behind each long run of white space, and gives h11 one piece at a time. If h11 has used all of the
piece, the run was in the data of a chunk, and may be of any length. If h11 still holds the run, it waits for
the rest of a line, and the judge refuses the response.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any

import h11

from .._exceptions import RemoteProtocolError, without_frames
from .._fields import HeaderList, Headers
from .http11_explanations import explain_received
from .http11_heads import ReceivedHead, framing_of
from .message_stream import Head
from .request import PreparedRequest

# The length of the shortest run of white space that is refused. Line ends count too: each line that continues
# a folded value (RFC 9112, 5.2) adds white space to the line that h11 parses.
_LONG = 1024
_LONG_RUN = b" " * _LONG
_TO_SPACES = bytes.maketrans(b"\t\r\n", b"   ")


class Judge:
    """An h11 connection that has sent a request.

    Args:
        request: The request.
        limit: The most bytes of a head, of a chunk's size line and of the trailers.
    """

    def __init__(self, request: h11.Request, limit: int) -> None:
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=limit)
        self._h11.send(request)
        self._limit = limit
        # The explanation of h11's error, kept because h11 gives the reason only once.
        self._violation = ""
        # The pieces that h11 has not received yet. While there are any, what it has received ends with a long
        # run of white space.
        self._pending: deque[bytes] = deque()
        # The length of the white space at the end of what has arrived, since the last cut.
        self._run = 0

    @property
    def rest(self) -> bytes:
        """The bytes that h11 has not used."""
        return self._h11.trailing_data[0] + b"".join(self._pending)

    def feed(self, data: bytes) -> None:
        """Take what has arrived, once h11 needs more data; `b""` for the end of the stream."""
        first, *others = self._cut(data)
        self._h11.receive_data(first)
        self._pending.extend(others)

    def _cut(self, data: bytes) -> list[bytes]:
        """Cut data behind each long run of white space. The last piece is empty if the data ends there."""
        run = self._run
        # Most data has no long run, and a sample shows it: each long run covers eight of these bytes.
        if not run and b" " * 8 not in data[:: _LONG // 8].translate(_TO_SPACES):
            end = data[-_LONG:]
            self._run = len(end) - len(end.rstrip(b" \t\r\n"))
            return [data]
        *before, last = (b" " * run + data.translate(_TO_SPACES)).split(_LONG_RUN)
        self._run = len(last) - len(last.rstrip(b" "))
        ends = itertools.accumulate(len(part) + _LONG for part in before)
        cuts = [0, *(end - run for end in ends), len(data)]
        return [data[start:end] for start, end in itertools.pairwise(cuts)]

    def _receive(self) -> Any:
        """Return h11's next event, or NEED_DATA if it needs more than what has arrived."""
        while (event := self._h11.next_event()) is h11.NEED_DATA and self._pending:
            # h11 returns the data of a chunk at once, so what it holds belongs to a line.
            if self._h11.trailing_data[0].translate(_TO_SPACES).endswith(_LONG_RUN):
                raise RemoteProtocolError(
                    f"the server sent {_LONG} characters of white space in a row "
                    "in a head, in the size line of a chunk or in trailers; expected are fewer"
                )
            if piece := self._pending.popleft():
                self._h11.receive_data(piece)
        return event

    def _next_event(self, head: Sequence[bytes]) -> Any:
        """Return h11's next event, None if it needs more data.

        Args:
            head: The pieces of the head so far, for the explanation of an error; empty in a body.
        """
        try:
            event = self._receive()
        except h11.RemoteProtocolError as exc:
            if not self._violation:
                self._violation = explain_received(str(exc), b"".join(head), self._limit)
            # The frames of h11's traceback refer to the h11 connection.
            raise RemoteProtocolError(self._violation) from without_frames(exc)
        return None if event is h11.NEED_DATA else event


class HeadJudge(Judge):
    """The judge of one head, interim or final.

    Args:
        prepared: The request.
        limit: The most bytes of a head.
    """

    def __init__(self, prepared: PreparedRequest, limit: int) -> None:
        headers: Any = prepared.headers
        # h11's checks can't fail here: preparing the request has already made them.
        super().__init__(h11.Request(method=prepared.method, target=prepared.target, headers=headers), limit)
        self._pieces: list[bytes] = []

    def feed(self, data: bytes) -> None:
        """Take what has arrived."""
        self._pieces.append(data)
        super().feed(data)

    def next_head(self) -> ReceivedHead | None:
        """Return the head, None if more of it is to come.

        Raises:
            RemoteProtocolError: The head is malformed or too large.
        """
        event = self._next_event(self._pieces)
        if event is None:
            return None
        rest = self.rest
        # h11 does not check a head that arrives complete in one piece.
        if sum(map(len, self._pieces)) - len(rest) > self._limit:
            raise RemoteProtocolError(f"the response's head is larger than {self._limit} bytes")
        headers = Headers(event.headers.raw_items())
        head = Head(b"HTTP/" + event.http_version, event.status_code, event.reason, headers)
        return ReceivedHead(head, framing_of(headers), rest)


class ChunkJudge(Judge):
    """The judge of the rest of a chunked body, from the CRLF after a chunk on.

    Args:
        limit: The most bytes of a chunk's size line and of the trailers.

    Attributes:
        trailers: The trailer fields, once the body has ended.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(h11.Request(method="GET", target="/", headers=[("Host", "")]), limit)
        self.trailers: HeaderList = []
        self.feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx")
        self._next_event(())
        self._next_event(())

    def take(self) -> bytes | None:
        """Return the next data, `b""` at the body's end, or None if more has to arrive first.

        Raises:
            RemoteProtocolError: The body is malformed, or the stream has ended too early.
        """
        event = self._next_event(())
        if event is None:
            return None
        if isinstance(event, h11.Data):
            return bytes(event.data)
        self.trailers = event.headers.raw_items()
        return b""
