"""The names of h2 and hpack that are not their documented interfaces, and that this package uses.

Where a new version lacks one, the test here that fails names it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import h2.config
import h2.connection
import h2.stream
import hpack
import pytest
from h2.connection import ConnectionInputs
from h2.errors import ErrorCodes
from h2.exceptions import TooManyStreamsError
from h2.stream import StreamClosedBy, StreamInputs
from hyperframe.frame import SettingsFrame
from hypothesis import given
from hypothesis import strategies as st

from trio_exchange._http.http2 import h2_internals
from trio_exchange._http.http2.frames import DATA, END_STREAM, frame_header, header_frames
from trio_exchange._http.http2.header_compression import BlockDecoder, BlockEncoder

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
        ("connection", "_data_to_send"),
        ("connection", "config"),
        ("connection", "max_outbound_frame_size"),
        ("connection", "outbound_flow_control_window"),
        ("connection", "state_machine"),
        ("decoder", "header_table"),
        ("decoder", "max_allowed_table_size"),
        ("encoder", "header_table"),
        ("encoder", "header_table_size"),
        ("encoder", "table_size_changes"),
        ("header_table", "_current_size"),
        ("header_table", "add"),
        ("header_table", "dynamic_entries"),
        ("header_table", "maxsize"),
        ("header_table", "resized"),
        ("header_table", "STATIC_TABLE"),
        ("stream", "closed_by"),
        ("stream", "max_outbound_frame_size"),
        ("stream", "outbound_flow_control_window"),
        ("stream", "state_machine"),
        ("state_machine", "process_input"),
        ("ConnectionInputs", "SEND_DATA"),
        ("ConnectionInputs", "SEND_HEADERS"),
        ("StreamInputs", "RECV_END_STREAM"),
        ("StreamInputs", "SEND_DATA"),
        ("StreamInputs", "SEND_END_STREAM"),
        ("StreamInputs", "SEND_HEADERS"),
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
        "ConnectionInputs": ConnectionInputs,
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
    decoder = BlockDecoder(connection.decoder)
    encoder = hpack.Encoder()
    fields = [(b":status", b"200"), (b"x-long", b"value")]
    for _ in range(2):  # the second time by its place in the table
        assert decoder.decode(encoder.encode(fields)).fields == fields
    with pytest.raises(hpack.HPACKError):
        decoder.decode(encoder.encode([(b"a", b"b" * 5000)]))


def test_a_dynamic_table_is_restored() -> None:
    table = hpack.Decoder().header_table
    table.add(b"a", b"1")
    saved = h2_internals.save_table(table)
    table.add(b"b", b"2")
    h2_internals.restore_table(table, saved)
    assert list(table.dynamic_entries) == [(b"a", b"1")]
    # The size was restored too: nothing is evicted until the table is full.
    table.maxsize = 2 * (32 + 2)
    table.add(b"c", b"3")
    assert list(table.dynamic_entries) == [(b"c", b"3"), (b"a", b"1")]
    table.add(b"d", b"4")
    assert list(table.dynamic_entries) == [(b"d", b"4"), (b"c", b"3")]


class Opened(NamedTuple):
    """A stream to open on each of two connections, one of them by h2 alone."""

    fields: list[tuple[bytes, bytes]]
    body: bytes | None
    answered: bool


@given(
    streams=st.lists(
        st.builds(
            Opened,
            st.lists(st.sampled_from([*HEAD, (b"x", b"y"), (b"x-long", b"~" * 100)]), min_size=1),
            st.none() | st.binary(max_size=20),
            st.booleans(),
        ),
        max_size=8,
    ),
    most=st.integers(1, 4),
)
def test_streams_are_opened_as_h2_opens_them(streams: list[Opened], most: int) -> None:
    ours, theirs = connection_with_stream(), connection_with_stream()
    settings = SettingsFrame(settings={SettingsFrame.MAX_CONCURRENT_STREAMS: most + 1}).serialize()
    for connection in (ours, theirs):
        connection.receive_data(settings)
        # Long enough for the data, and short enough for CONTINUATION frames.
        connection.max_outbound_frame_size = 20
    encoder = BlockEncoder(ours.encoder)
    ended: list[int] = []
    for fields, body, answered in streams:
        ends = body is None
        stream_id = theirs.get_next_available_stream_id()
        h2_internals.drop_ended_streams(ours, ended)
        full = len(ours.streams) >= ours.remote_settings.max_concurrent_streams
        try:
            theirs.send_headers(stream_id, fields, end_stream=ends)
        except TooManyStreamsError:
            assert full
            continue
        assert not full
        opened = h2_internals.open_stream(ours, receive_window=100_000, send_window=65_535, ended=ends)
        assert opened == stream_id
        block = encoder.encode(fields)
        h2_internals.append_output(
            ours, header_frames(stream_id, block, ours.max_outbound_frame_size, end_stream=ends)
        )
        if body is not None:
            theirs.send_data(stream_id, body, end_stream=True)
            h2_internals.count_data(ours, stream_id, body, ended=True)
            h2_internals.append_output(ours, frame_header(len(body), DATA, END_STREAM, stream_id) + body)
        if answered:
            for connection in (ours, theirs):
                h2_internals.end_stream_remotely(connection, stream_id)
            ended.append(stream_id)
        assert ours.data_to_send() == theirs.data_to_send()
        assert stream_states(ours) == stream_states(theirs)
        assert ours._closed_streams == theirs._closed_streams
        assert ours.outbound_flow_control_window == theirs.outbound_flow_control_window
        assert ours.highest_outbound_stream_id == theirs.highest_outbound_stream_id


def stream_states(connection: h2.connection.H2Connection) -> dict[int, tuple[object, ...]]:
    return {
        stream_id: (
            stream.state_machine.state,
            stream.state_machine.client,
            stream.state_machine.headers_sent,
            stream.state_machine.stream_closed_by,
            stream.outbound_flow_control_window,
            stream.inbound_flow_control_window,
            stream.max_outbound_frame_size,
        )
        for stream_id, stream in connection.streams.items()
    }


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
