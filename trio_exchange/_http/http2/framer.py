"""The frames of requests: HEADERS, CONTINUATION and DATA (RFC 9113, 6.1, 6.2 and 6.10).

Theory of operation. h2 keeps the state of each stream and the send windows; the frames themselves are made
here. For each request h2 would count all open streams, take the header block through several objects, and
copy data six times. What a `RequestFramer` makes is, byte for byte, what h2 would make.
"""

from __future__ import annotations

import h2.connection

from ..._fields import HeaderList
from .frames import DATA, END_STREAM, frame_header, header_frames
from .h2_internals import append_output, count_data, drop_ended_streams, open_stream
from .header_compression import BlockEncoder
from .receive_windows import INITIAL_WINDOW

# The largest DATA frame to send, even if the server allows more. Larger frames would delay other streams.
_MOST_IN_FRAME = 64 * 1024


class RequestFramer:
    """Makes the frames of a connection's requests.

    Args:
        connection: h2's state of the connection.

    Attributes:
        most_streams: The server's limit of open streams.
    """

    def __init__(self, connection: h2.connection.H2Connection) -> None:
        self._h2 = connection
        self._encoder = BlockEncoder(connection.encoder)
        # The ids of streams that have ended since the last one was opened.
        self._ended: list[int] = []
        self.take_settings()

    def take_settings(self) -> None:
        """Adopt the server's settings, whose look-up in h2 is too slow for each request."""
        self.most_streams: int = self._h2.remote_settings.max_concurrent_streams
        self._stream_window: int = self._h2.remote_settings.initial_window_size

    def open(self, headers: HeaderList, body: bytes, *, end_stream: bool) -> int | None:
        """Open a stream, and make the frames of the request's head and, if it is small, of its whole body.

        They are appended to h2's output.

        Returns:
            The stream's id, or None if the server allows no more open streams.
        """
        drop_ended_streams(self._h2, self._ended)
        self._ended.clear()
        if len(self._h2.streams) >= self.most_streams:
            return None
        ended = end_stream and not body
        stream_id = open_stream(
            self._h2, receive_window=INITIAL_WINDOW, send_window=self._stream_window, ended=ended
        )
        block = self._encoder.encode(headers)
        append_output(
            self._h2, header_frames(stream_id, block, self._h2.max_outbound_frame_size, end_stream=ended)
        )
        if body:
            append_output(self._h2, self.data_header(stream_id, body, end_stream=end_stream) + body)
        return stream_id

    def end(self, stream_id: int) -> None:
        """Note that both sides of a stream have ended."""
        self._ended.append(stream_id)

    def room(self, stream_id: int) -> int:
        """Return how many bytes of data the windows let a stream send, in one frame."""
        window = self._h2.local_flow_control_window(stream_id)
        return max(0, min(window, self._h2.max_outbound_frame_size, _MOST_IN_FRAME))

    def fits(self, size: int) -> bool:
        """Return whether a new stream can send `size` bytes of data at once."""
        return not size or size <= min(
            self._h2.outbound_flow_control_window, self._stream_window, self._h2.max_outbound_frame_size
        )

    def data_header(self, stream_id: int, data: bytes | memoryview, *, end_stream: bool) -> bytes:
        """Count data that fits into the stream's `room`, and return the header of its DATA frame."""
        count_data(self._h2, stream_id, data, ended=end_stream)
        return frame_header(len(data), DATA, END_STREAM if end_stream else 0, stream_id)
