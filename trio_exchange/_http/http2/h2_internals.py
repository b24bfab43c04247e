"""All that this package does with h2 and hpack beyond their documented interfaces.

Checked on h2 4.4.1 and hpack 4.2.0. Each function says what it is needed for. Where
another version lacks one of the names used here, `tests/test_private_names.py` fails and says which.
"""

from __future__ import annotations

from typing import Any, cast

import h2.config
import h2.connection
import h2.settings
from h2.settings import SettingCodes
from h2.stream import StreamClosedBy, StreamInputs

from ..._fields import HeaderList


def new_connection(
    *, initial_window: int, connection_window: int, max_header_bytes: int
) -> h2.connection.H2Connection:
    """Make the state of a client's connection, with its first bytes ready to be sent.

    h2 offers no argument for the settings of the first SETTINGS frame, nor for the limit of a header list,
    which it copies to its decoder only when the server has acknowledged the setting.

    Args:
        initial_window: Of each stream.
        connection_window: Of the connection.
        max_header_bytes: The largest header list that is accepted.
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
    """The highest id of the streams that were opened, 0 if none was."""
    return connection.highest_outbound_stream_id


def decode_headers(connection: h2.connection.H2Connection, block: bytes) -> HeaderList:
    """Decode a header block past h2, with the table that h2 decodes with.

    A malformed response concerns its stream alone (RFC 9113, 8.1.1), while h2 gives up the connection for
    some.

    Raises:
        hpack.HPACKError: It can't be decoded, or is too large.
    """
    fields: Any = connection.decoder.decode(block, raw=True)
    return cast("HeaderList", fields)


def end_stream_remotely(connection: h2.connection.H2Connection, stream_id: int) -> None:
    """Tell h2 that the server has ended a stream, in a frame that h2 was not shown."""
    connection.streams[stream_id].state_machine.process_input(StreamInputs.RECV_END_STREAM)


def forget_stream(connection: h2.connection.H2Connection, stream_id: int) -> None:
    """Let h2 take a stream for one that was closed long ago, and ignore what still arrives on it.

    Were it kept, h2 would give up the connection for a late informational response, or for data: it was not
    shown the head.
    """
    closed_by = connection.streams.pop(stream_id).closed_by
    connection._closed_streams[stream_id] = closed_by or StreamClosedBy.SEND_RST_STREAM


def limit_header_table(connection: h2.connection.H2Connection, most: int) -> None:
    """Let hpack use no more of the table that the server offers than `most` bytes.

    Every header is looked for in all of the table. h2 takes over whatever the server offers.
    """
    encoder = connection.encoder
    encoder.header_table_size = min(encoder.header_table_size, most)
    # Of several changes, only the smallest and the last are to be told (RFC 7541, 4.2).
    last = encoder.header_table_size
    smallest = min(encoder.table_size_changes, default=last)
    encoder.table_size_changes = [smallest, last] if smallest < last else [last]
    # A size that is set twice is no change to hpack, which then forgets the first.
    encoder.header_table.resized = True
