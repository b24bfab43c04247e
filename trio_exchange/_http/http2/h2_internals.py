"""The only module that uses h2 beyond its documented interface; for hpack `header_compression` does so too.

Checked with h2 4.4.1 and hpack 4.2.0. Each function documents why it is needed. If another version lacks a
name that is used here, `tests/http/http2/test_h2_internals.py` fails and reports that name.
"""

from __future__ import annotations

from collections import deque
from typing import TypeAlias

import h2.config
import h2.connection
import h2.settings
from h2.connection import ConnectionInputs
from h2.settings import SettingCodes
from h2.stream import H2Stream, StreamClosedBy, StreamInputs
from hpack.table import HeaderTable

SavedTable: TypeAlias = tuple[deque[tuple[bytes, bytes]], int]


def new_connection(
    *, initial_window: int, connection_window: int, max_header_bytes: int
) -> h2.connection.H2Connection:
    """Create h2's state of a client connection, with its preface ready to be sent.

    h2 has no argument for the values of the first SETTINGS frame. It has none for the limit of a header list
    either, which it passes to its decoder only when the server has acknowledged the setting.

    Args:
        initial_window: The initial receive window of each stream, in bytes.
        connection_window: The receive window of the connection, in bytes.
        max_header_bytes: The largest header list to accept, in bytes.
    """
    config = h2.config.H2Configuration(
        client_side=True,
        header_encoding=None,
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
        validate_inbound_headers=False,
        normalize_inbound_headers=False,
    )
    connection = h2.connection.H2Connection(config)
    connection.local_settings = h2.settings.Settings(
        client=True,
        initial_values={
            SettingCodes.ENABLE_PUSH: 0,
            SettingCodes.INITIAL_WINDOW_SIZE: initial_window,
            SettingCodes.MAX_HEADER_LIST_SIZE: max_header_bytes,
        },
    )
    connection.decoder.max_header_list_size = max_header_bytes
    connection.initiate_connection()
    connection.increment_flow_control_window(connection_window - connection.inbound_flow_control_window)
    return connection


def highest_stream_id(connection: h2.connection.H2Connection) -> int:
    """Return the highest id of the opened streams, 0 before the first."""
    return connection.highest_outbound_stream_id


def open_stream(
    connection: h2.connection.H2Connection, *, receive_window: int, send_window: int, ended: bool
) -> int:
    """Open the next stream in h2's state, as `send_headers` does, and return its id.

    `send_headers` counts all open streams one by one, looks for fields that only a server needs, and passes
    the header block through several objects. All that costs as much as the rest of a request.

    Args:
        connection: h2's state of the connection.
        receive_window: The initial receive window of the stream.
        send_window: The initial send window of the stream.
        ended: Whether the header block ends this side of the stream.
    """
    connection.state_machine.process_input(ConnectionInputs.SEND_HEADERS)
    highest = connection.highest_outbound_stream_id
    stream_id = highest + 2 if highest else 1
    stream = H2Stream(stream_id, connection.config, receive_window, send_window)
    stream.max_outbound_frame_size = connection.max_outbound_frame_size
    connection.streams[stream_id] = stream
    connection.highest_outbound_stream_id = stream_id
    stream.state_machine.process_input(StreamInputs.SEND_HEADERS)
    if ended:
        stream.state_machine.process_input(StreamInputs.SEND_END_STREAM)
    return stream_id


def count_data(
    connection: h2.connection.H2Connection, stream_id: int, data: bytes | memoryview, *, ended: bool
) -> None:
    """Count data in h2's state, as `send_data` does, for a DATA frame that is made outside of h2.

    `send_data` copies the data six times on the way to the bytes to send.

    Args:
        connection: h2's state of the connection.
        stream_id: The id of the stream.
        data: The data, which must fit into one frame and into the windows.
        ended: Whether the data ends this side of the stream.
    """
    stream = connection.streams[stream_id]
    connection.state_machine.process_input(ConnectionInputs.SEND_DATA)
    stream.state_machine.process_input(StreamInputs.SEND_DATA)
    if ended:
        stream.state_machine.process_input(StreamInputs.SEND_END_STREAM)
    stream.outbound_flow_control_window -= len(data)
    connection.outbound_flow_control_window -= len(data)


def drop_ended_streams(connection: h2.connection.H2Connection, ended: list[int]) -> None:
    """Make h2 drop the streams that have ended, as `send_headers` does before it opens a stream.

    Args:
        connection: h2's state of the connection.
        ended: The ids of the streams. Those that h2 has dropped before are ignored.
    """
    for stream_id in ended:
        stream = connection.streams.pop(stream_id, None)
        if stream is not None:
            connection._closed_streams[stream_id] = stream.closed_by


def append_output(connection: h2.connection.H2Connection, frames: bytes) -> None:
    """Append frames that were made outside of h2 to those that h2 has made and that were not yet sent."""
    connection._data_to_send += frames


def save_table(table: HeaderTable) -> SavedTable:
    """Save the content of a dynamic table, which hpack has no method for."""
    return table.dynamic_entries.copy(), table._current_size


def restore_table(table: HeaderTable, saved: SavedTable) -> None:
    """Give a dynamic table its saved content again."""
    table.dynamic_entries, table._current_size = saved


def end_stream_remotely(connection: h2.connection.H2Connection, stream_id: int) -> None:
    """Tell h2 that the server has ended a stream, in a frame that bypassed h2."""
    connection.streams[stream_id].state_machine.process_input(StreamInputs.RECV_END_STREAM)


def forget_stream(connection: h2.connection.H2Connection, stream_id: int) -> None:
    """Make h2 treat a stream as long closed, so that it ignores frames that still arrive on the stream.

    Otherwise h2 would end the connection for a late informational response or for data, since the head
    bypassed it.
    """
    closed_by = connection.streams.pop(stream_id).closed_by
    connection._closed_streams[stream_id] = closed_by or StreamClosedBy.SEND_RST_STREAM


def limit_header_table(connection: h2.connection.H2Connection, most: int) -> None:
    """Limit hpack's encoder to `most` bytes of the dynamic table that the server offers.

    The encoder searches the whole table for each header, and h2 adopts any size that the server offers.
    """
    encoder = connection.encoder
    encoder.header_table_size = min(encoder.header_table_size, most)
    # Of several changes, only the smallest and the last are signalled (RFC 7541, 4.2).
    last = encoder.header_table_size
    smallest = min(encoder.table_size_changes, default=last)
    encoder.table_size_changes = [smallest, last] if smallest < last else [last]
    # hpack does not count setting the same size again as a change, and would then not signal the first one.
    encoder.header_table.resized = True
