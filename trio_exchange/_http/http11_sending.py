"""HTTP/1.1: how a request is written, its header fields and the framing of its content (RFC 9112, 6 and 7).

`PreparedRequest` has checked the header fields, and that the Content-Length is right if the content is in
memory. Only the length of other content, which an upload sends, is checked here.
"""

from __future__ import annotations

from .._exceptions import LocalProtocolError
from .._fields import HeaderList
from .http11_heads import asks_to_close


class EncodedFields:
    """The header fields of a request: encoded, and what they mean for the body and the connection.

    Args:
        headers: The fields, with the framing field that the content needs.

    Attributes:
        headers: As given.
        encoded: The field lines and the empty line after them.
        length: The value of Content-Length, None without it.
        chunked: Whether the content goes out in chunks.
        closes: Whether the request asks for the connection's end.
    """

    __slots__ = ("chunked", "closes", "encoded", "headers", "length")

    def __init__(self, headers: HeaderList) -> None:
        self.headers: HeaderList = headers
        self.length: bytes | None = None
        self.chunked: bool = False
        self.closes: bool = False
        lines: list[bytes] = []
        for name, value in headers:
            line = b"%b: %b\r\n" % (name, value)
            match name.lower():
                case b"host":
                    # RFC 9110, 7.2: Host should be the first field.
                    lines.insert(0, line)
                    continue
                case b"content-length":
                    self.length = value
                case b"transfer-encoding":
                    self.chunked = True
                    line = b"%b: chunked\r\n" % name
                case b"connection":
                    self.closes = self.closes or asks_to_close(value)
            lines.append(line)
        self.encoded: bytes = b"".join((*lines, b"\r\n"))


def frame_content(fields: EncodedFields, content: bytes) -> bytes:
    """Return what follows the head of a request whose content is in memory."""
    if not fields.chunked:
        return content
    return b"".join((*_chunk(content), b"0\r\n\r\n"))


def _chunk(data: bytes | memoryview) -> tuple[bytes | memoryview, ...]:
    # An empty chunk would be the end.
    return (b"%x\r\n" % len(data), data, b"\r\n") if data else ()


class ContentWriter:
    """Frames the content of one upload.

    Args:
        fields: The fields of the request.
    """

    __slots__ = ("_fields", "_left")

    def __init__(self, fields: EncodedFields) -> None:
        self._fields = fields
        self._left = int(fields.length or 0)

    def frame(self, data: memoryview) -> bytes | memoryview:
        """Return a piece of the content as it is written.

        Raises:
            LocalProtocolError: The content is longer than its Content-Length.
        """
        if self._fields.chunked:
            return b"".join(_chunk(data))
        self._left -= len(data)
        if self._left < 0:
            raise self._wrong_length("longer")
        return data

    def end(self) -> bytes:
        """Return what ends the content.

        Raises:
            LocalProtocolError: The content is shorter than its Content-Length.
        """
        if self._fields.chunked:
            return b"0\r\n\r\n"
        if self._left:
            raise self._wrong_length("shorter")
        return b""

    def _wrong_length(self, how: str) -> LocalProtocolError:
        length = (self._fields.length or b"").decode("ascii")
        return LocalProtocolError(f"the content is {how} than its Content-Length, {length}")
