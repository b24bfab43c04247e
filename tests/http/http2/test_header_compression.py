"""HPACK with memos: the outcome of every block is that of hpack alone."""

from __future__ import annotations

import hpack
import pytest
from hpack import HeaderTuple, NeverIndexedHeaderTuple
from hypothesis import given
from hypothesis import strategies as st

from trio_exchange._http.http2 import header_compression
from trio_exchange._http.http2.header_compression import BlockDecoder, BlockEncoder

Fields = list[tuple[bytes, bytes]]

NAMES = (b":status", b"date", b"server", b"x-name", b"x-another", b"")
VALUES = (b"200", b"Mon, 01 Jan 2026 00:00:00 GMT", b"", b"v", b"a" * 70, b"b" * 300)
FIELDS = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=6)


def integer(value: int, bits: int, first: int) -> bytes:
    encoded = hpack.hpack.encode_integer(value, bits)
    encoded[0] |= first
    return bytes(encoded)


def string(value: bytes, *, huffman: bool) -> bytes:
    if huffman:
        value = hpack.Encoder().huffman_coder.encode(value)
    return integer(len(value), 7, 0x80 if huffman else 0) + value


def literal(first: int, bits: int, index: int, name: bytes, value: bytes, huffman: bool) -> bytes:
    named = b"" if index else string(name, huffman=huffman)
    return integer(index, bits, first) + named + string(value, huffman=huffman)


INDEXES = st.integers(0, 70) | st.integers(120, 130) | st.just(20_000)
REPRESENTATIONS = st.one_of(
    INDEXES.map(lambda index: integer(index, 7, 0x80)),
    st.integers(61, 66).map(lambda index: integer(index, 7, 0x80)),
    st.builds(
        lambda kind, *rest: literal(*kind, *rest),
        st.sampled_from([(0x40, 6), (0x40, 6), (0x00, 4), (0x10, 4)]),
        st.just(0) | st.integers(0, 66),
        st.sampled_from(NAMES),
        st.sampled_from(VALUES),
        st.booleans(),
    ),
)
SIZE_UPDATES = st.sampled_from([0, 40, 100, 400, 4096, 5000]).map(lambda size: integer(size, 5, 0x20))
# Whole blocks: sequences of representations, those of a real encoder aside, and bytes of any kind.
BLOCKS = st.one_of(
    st.builds(
        lambda updates, parts: b"".join([*updates, *parts]),
        st.just([]) | st.lists(SIZE_UPDATES, max_size=2),
        st.lists(REPRESENTATIONS, max_size=6),
    ),
    st.lists(REPRESENTATIONS | SIZE_UPDATES, max_size=4).map(b"".join),
    st.binary(max_size=30),
)

ORDER = st.lists(st.integers(0, 9), max_size=20)


def outcome(decode: object, block: bytes) -> tuple[object, ...]:
    assert callable(decode)
    try:
        return ("fields", [(bytes(name), bytes(value)) for name, value in decode(block)])
    except Exception as exc:
        # hpack shows a view of the block, and so an address.
        return (type(exc), str(exc).partition("<memory")[0])


def table_of(coder: hpack.Decoder | hpack.Encoder) -> tuple[object, ...]:
    table = coder.header_table
    return list(table.dynamic_entries), table.maxsize, table._current_size


@given(blocks=st.lists(BLOCKS, max_size=10), order=ORDER, cut=st.booleans())
def test_every_block_has_the_outcome_of_hpack(blocks: list[bytes], order: list[int], cut: bool) -> None:
    judge, ours = hpack.Decoder(600), hpack.Decoder(600)
    decoder = BlockDecoder(ours)
    for place in order:
        if place < len(blocks):
            block = blocks[place][:-1] if cut and place % 3 == 0 else blocks[place]
            expected = outcome(lambda data: judge.decode(data, raw=True), block)
            assert outcome(lambda data: decoder.decode(data).fields, block) == expected
            # After an error hpack's table may be half changed: it has to be so in the same way.
            assert table_of(ours) == table_of(judge)


@given(lists=st.lists(FIELDS, max_size=4), order=st.lists(st.integers(0, 3), max_size=20), data=st.data())
def test_the_blocks_of_an_encoder_are_decoded(
    lists: list[Fields], order: list[int], data: st.DataObject
) -> None:
    encoder, judge, ours = hpack.Encoder(), hpack.Decoder(), hpack.Decoder()
    decoder = BlockDecoder(ours)
    for place in order:
        if place < len(lists):
            encoder.header_table_size = data.draw(st.sampled_from([4096, 4096, 4096, 200, 0]))
            block = encoder.encode(lists[place])
            assert list(decoder.decode(block).fields) == lists[place] == judge.decode(block, raw=True)
            assert table_of(ours) == table_of(judge)


@given(
    lists=st.lists(
        st.lists(
            st.builds(
                lambda kind, name, value: kind(name, value),
                st.sampled_from([HeaderTuple, NeverIndexedHeaderTuple, lambda *pair: pair]),
                st.sampled_from(NAMES),
                st.sampled_from([*VALUES, b"s" * 1000]),
            ),
            max_size=5,
        ),
        max_size=4,
    ),
    order=st.lists(st.integers(0, 3), max_size=20),
    data=st.data(),
)
def test_every_list_is_encoded_as_hpack_does(
    lists: list[Fields], order: list[int], data: st.DataObject
) -> None:
    judge, ours = hpack.Encoder(), hpack.Encoder()
    encoder = BlockEncoder(ours)
    for place in order:
        if place < len(lists):
            size = data.draw(st.sampled_from([None, None, None, 4096, 200, 0]))
            for coder in (judge, ours):
                if size is not None:
                    coder.header_table_size = size
            assert encoder.encode(lists[place]) == judge.encode(lists[place])
            assert table_of(ours) == table_of(judge)


def test_a_field_that_was_too_large_for_the_table_is_added_to_a_larger_one() -> None:
    judge, ours = hpack.Encoder(), hpack.Encoder()
    encoder = BlockEncoder(ours)
    fields: Fields = [HeaderTuple(b"cookie", b"c" * 300)]
    for size in (200, 4096):
        judge.header_table_size = ours.header_table_size = size
        # The first block after a change of the size tells of it.
        for each in ([], fields, fields, fields):
            assert encoder.encode(each) == judge.encode(each)
            assert table_of(ours) == table_of(judge)


def test_a_field_that_is_never_indexed_is_no_other_field() -> None:
    encoder = BlockEncoder(hpack.Encoder())
    secret: Fields = [NeverIndexedHeaderTuple(b"cookie", b"c")]
    open_one: Fields = [HeaderTuple(b"cookie", b"c")]
    for _ in range(3):
        assert encoder.encode(secret)[0] & 0xF0 == 0x10
    assert encoder.encode(open_one)[0] & 0xC0 == 0x40


class Refusing:
    """Stands for a function of hpack that must not be called."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        raise AssertionError("hpack was asked")


def test_repeated_blocks_and_strings_are_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = BlockDecoder(hpack.Decoder())
    block = literal(0x40, 6, 33, b"", b"Mon, 01 Jan 2026", True)
    other = literal(0x40, 6, 44, b"", b"Mon, 01 Jan 2026", True)
    first = decoder.decode(block)
    monkeypatch.setattr(header_compression, "decode_huffman", Refusing())
    monkeypatch.setattr(hpack.Decoder, "decode", Refusing())
    assert decoder.decode(block) is first
    assert decoder.decode(other).fields == [(b"last-modified", b"Mon, 01 Jan 2026")]


def test_a_block_of_references_is_decoded_again_once_the_table_has_changed() -> None:
    decoder = BlockDecoder(hpack.Decoder())
    decoder.decode(literal(0x40, 6, 0, b"a", b"1", False))
    newest = integer(62, 7, 0x80)
    assert decoder.decode(newest) is decoder.decode(newest)
    decoder.decode(literal(0x40, 6, 0, b"b", b"2", False))
    assert decoder.decode(newest).fields == [(b"b", b"2")]


def test_a_table_that_the_server_did_not_shrink_is_refused() -> None:
    ours = hpack.Decoder()
    decoder = BlockDecoder(ours)
    block = integer(2, 7, 0x80)
    decoder.decode(block)
    ours.max_allowed_table_size = 100
    with pytest.raises(hpack.InvalidTableSizeError):
        decoder.decode(block)
    assert decoder.decode(integer(100, 5, 0x20) + block).fields == [(b":method", b"GET")]


def test_repeated_lists_are_not_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = BlockEncoder(hpack.Encoder())
    fields: Fields = [(b":method", b"GET"), (b":path", b"/a"), (b"x", b"y")]
    encoder.encode(fields)
    second = encoder.encode(fields)
    monkeypatch.setattr(hpack.Encoder, "encode", Refusing())
    assert encoder.encode(fields) == second


def test_a_server_can_not_fill_the_memos() -> None:
    decoder = BlockDecoder(hpack.Decoder(100_000))
    for number in range(150):
        for size in (1, 10, 100, 1000):
            decoder.decode(literal(0x00, 4, 0, b"x", b"%03d" % number * size, True))
        # One byte for each entry of 4000 bytes.
        decoder.decode(literal(0x40, 6, 0, b"%d" % number, b"v" * 3900, False))
        decoder.decode(integer(62, 7, 0x80) * 20)
    blocks, strings = decoder._blocks, decoder._strings
    assert len(blocks) == header_compression.MOST_BLOCKS
    assert len(strings) == header_compression.MOST_STRINGS
    assert max(map(len, blocks)) <= header_compression.MOST_IN_BLOCK
    assert max(map(len, strings)) <= header_compression.MOST_IN_STRING
    for block in blocks.values():
        assert (
            sum(32 + len(name) + len(value) for name, value in block.fields)
            <= header_compression.MOST_IN_FIELDS
        )


def test_requests_can_not_fill_the_memo() -> None:
    encoder = BlockEncoder(hpack.Encoder())
    for number in range(20):
        for size in (1, 3000):
            fields: Fields = [NeverIndexedHeaderTuple(b"cookie", b"%d" % number * size)]
            encoder.encode(fields)
    assert len(encoder._blocks) == header_compression.MOST_BLOCKS
    assert max(len(block) for block, _ in encoder._blocks.values()) <= header_compression.MOST_IN_FIELDS
