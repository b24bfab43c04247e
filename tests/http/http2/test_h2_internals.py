"""The names of h2 and hpack that are not their documented interfaces, and that this package uses.

Where a new version lacks one, the test here that fails names it.
"""

from __future__ import annotations

from typing import Any

import h2.config
import h2.connection
import h2.stream
import hpack
import pytest
from h2.errors import ErrorCodes
from h2.stream import StreamClosedBy, StreamInputs

from trio_exchange._http.http2 import h2_internals

HEAD = [(b":method", b"GET"), (b":authority", b"h"), (b":scheme", b"http"), (b":path", b"/")]


def connection_with_stream() -> h2.connection.H2Connection:
    connection = h2_internals.new_connection(
        initial_window=100_000, connection_window=200_000, max_header_bytes=5000
    )
    connection.send_headers(1, HEAD)
    return connection


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("connection", "_closed_streams"),
        ("connection", "decoder"),
        ("connection", "encoder"),
        ("connection", "highest_outbound_stream_id"),
        ("connection", "local_settings"),
        ("connection", "streams"),
        ("decoder", "max_header_list_size"),
        ("encoder", "header_table"),
        ("encoder", "header_table_size"),
        ("encoder", "table_size_changes"),
        ("header_table", "resized"),
        ("stream", "closed_by"),
        ("stream", "state_machine"),
        ("state_machine", "process_input"),
        ("StreamInputs", "RECV_END_STREAM"),
        ("StreamClosedBy", "SEND_RST_STREAM"),
    ],
)
def test_h2_and_hpack_have_the_name(owner: str, name: str) -> None:
    connection: Any = connection_with_stream()
    owners = {
        "connection": connection,
        "decoder": connection.decoder,
        "encoder": connection.encoder,
        "header_table": connection.encoder.header_table,
        "stream": connection.streams[1],
        "state_machine": connection.streams[1].state_machine,
        "StreamInputs": StreamInputs,
        "StreamClosedBy": StreamClosedBy,
    }
    assert hasattr(owners[owner], name), f"{owner} has no {name}; see h2_internals.py"


def test_the_first_settings_are_ours() -> None:
    connection = connection_with_stream()
    server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    server.initiate_connection()
    server.receive_data(connection.data_to_send())
    assert server.remote_settings.initial_window_size == 100_000
    assert server.remote_settings.max_header_list_size == 5000
    assert server.remote_settings.enable_push == 0
    assert server.outbound_flow_control_window == 200_000
    assert connection.decoder.max_header_list_size == 5000


def test_headers_are_decoded_with_the_table_of_the_connection() -> None:
    connection = connection_with_stream()
    encoder = hpack.Encoder()
    fields = [(b":status", b"200"), (b"x-long", b"value")]
    for _ in range(2):  # the second time by its place in the table
        assert h2_internals.decode_headers(connection, encoder.encode(fields)) == fields
    with pytest.raises(hpack.HPACKError):
        h2_internals.decode_headers(connection, encoder.encode([(b"a", b"b" * 5000)]))


def test_the_end_of_a_stream_that_h2_was_not_shown() -> None:
    connection = connection_with_stream()
    h2_internals.end_stream_remotely(connection, 1)
    connection.end_stream(1)
    assert connection.streams[1].closed
    assert h2_internals.highest_stream_id(connection) == 1


@pytest.mark.parametrize("reset", [False, True])
def test_what_arrives_on_a_stream_that_was_forgotten_is_ignored(reset: bool) -> None:
    connection = connection_with_stream()
    server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    server.initiate_connection()
    server.receive_data(connection.data_to_send())
    connection.receive_data(server.data_to_send())
    if reset:
        connection.reset_stream(1, ErrorCodes.CANCEL)
    h2_internals.forget_stream(connection, 1)
    connection.clear_outbound_data_buffer()
    server.reset_stream(1, ErrorCodes.NO_ERROR)
    assert connection.receive_data(server.data_to_send()) == []
    assert connection.state_machine.state is not h2.connection.ConnectionState.CLOSED


@pytest.mark.parametrize(
    ("offered", "told"),
    [([8192], [4096]), ([0, 8192], [0, 4096]), ([100, 200, 150], [100, 150]), ([100], [100])],
)
def test_the_table_of_sent_headers_is_limited(offered: list[int], told: list[int]) -> None:
    connection = connection_with_stream()
    for size in offered:
        connection.encoder.header_table_size = size
    h2_internals.limit_header_table(connection, 4096)
    assert connection.encoder.table_size_changes == told
    assert connection.encoder.header_table_size == told[-1]
    assert connection.encoder.header_table.resized
