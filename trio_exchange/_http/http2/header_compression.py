"""HPACK (RFC 7541) for one connection, with memos of what repeats.

Theory of operation. hpack is the judge of every header block. A `BlockDecoder` reads the common, well-formed
representations itself. If it meets anything else, it restores the dynamic table and lets hpack decode the
block from its start, which decodes it or raises the error. So this module never accepts what hpack refuses.

*Memos.* Most blocks repeat: a server answers like requests with the same bytes, and a program sends the same
fields again. The outcome of a block depends on its bytes and, if it refers to the dynamic table, on that
table too. The table is a queue of entries that only grows at one end and shrinks at the other, so its newest
entry and its length identify its content (`TableState`).

- A decoded block is kept if it does not refer to the dynamic table, or does not change it.
- An encoded block is kept if it does not change the dynamic table. The second of two like requests is so.
- A string that was decoded from the Huffman code is kept, since blocks often differ in one field only.

*Bounds.* A server chooses the strings, so each memo is limited in entries, and in the bytes of each entry.
The oldest entry makes room for a new one. Each connection has its own memos: no timing tells one server
what another one sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import hpack
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from ..._fields import HeaderList
from .h2_internals import restore_table, save_table

K = TypeVar("K")
V = TypeVar("V")

# The most entries of each memo.
MOST_BLOCKS = 16
MOST_STRINGS = 128
# The most bytes of an encoded block, and of its fields as RFC 7541, 4.1 counts them.
MOST_IN_BLOCK = 512
MOST_IN_FIELDS = 4096
# The most bytes of an encoded string.
MOST_IN_STRING = 64

# RFC 7541, 6 and 5.2: the first bits of a representation, and of a string.
_INDEXED = 0x80
_INCREMENTAL = 0x40
_SIZE_UPDATE = 0x20
_HUFFMAN = 0x80
# RFC 7541, 4.1.
_ENTRY_OVERHEAD = 32

# Indexes start at 1.
_STATIC: Sequence[tuple[bytes, bytes]] = ((b"", b""), *HeaderTable.STATIC_TABLE)
_FIRST_DYNAMIC = len(_STATIC)

#: The newest entry of a dynamic table, compared by identity, and the number of entries.
TableState: TypeAlias = tuple[object, int]


def state_of(table: HeaderTable) -> TableState:
    """Return the newest entry and the length of a dynamic table, which identify its present content."""
    entries = table.dynamic_entries
    return (entries[0], len(entries)) if entries else (None, 0)


class DecodedBlock:
    """A header block from the server, which may occur again.

    Attributes:
        fields: The decoded fields.
        checked: The result of the checks in `headers.py`, None before they were made.
    """

    __slots__ = ("_added", "_size", "_state", "checked", "fields")

    def __init__(
        self,
        fields: Sequence[tuple[bytes, bytes]],
        size: int = 0,
        added: Sequence[tuple[bytes, bytes]] = (),
        state: TableState | None = None,
    ) -> None:
        self.fields = fields
        self.checked: Any = None
        self._size = size
        # The entries that the block adds to the dynamic table, and the state of the table that the block
        # refers to, None if it refers to none.
        self._added = added
        self._state = state

    def may_repeat(self) -> bool:
        """Return whether the same bytes can have the same outcome again, and are worth a place in a memo."""
        return self._size <= MOST_IN_FIELDS and (self._state is None or not self._added)

    def repeat(self, table: HeaderTable, most: int) -> bool:
        """Apply the block to the table once more, if it still has the same outcome.

        Args:
            table: The dynamic table.
            most: The largest size of the fields.

        Returns:
            Whether the block has the same outcome.
        """
        state = self._state
        if self._size > most or (state is not None and not _is_in(table, state)):
            return False
        if self._added and table.maxsize:
            # In a table of size 0, adding an entry changes nothing.
            for name, value in self._added:
                table.add(name, value)
        return True


def _is_in(table: HeaderTable, state: TableState) -> bool:
    newest, length = state_of(table)
    return newest is state[0] and length == state[1]


class BlockDecoder:
    """Decodes the header blocks of a connection.

    Args:
        decoder: The decoder that has the connection's dynamic table.
    """

    def __init__(self, decoder: hpack.Decoder) -> None:
        self._decoder = decoder
        self._blocks: dict[bytes, DecodedBlock] = {}
        self._strings: dict[bytes, bytes] = {}

    def decode(self, data: bytes) -> DecodedBlock:
        """Decode a header block.

        Raises:
            hpack.HPACKError: The block can't be decoded or is too large.
        """
        decoder = self._decoder
        table = decoder.header_table
        if table.maxsize <= decoder.max_allowed_table_size:
            known = self._blocks.get(data)
            if known is not None and known.repeat(table, decoder.max_header_list_size):
                return known
            saved = save_table(table)
            try:
                block = self._recognize(data, table)
            except (_Unusual, IndexError, hpack.HPACKError):
                restore_table(table, saved)
            else:
                if len(data) <= MOST_IN_BLOCK and block.may_repeat():
                    _remember(self._blocks, MOST_BLOCKS, data, block)
                return block
        fields: Any = decoder.decode(data, raw=True)
        return DecodedBlock([(bytes(name), bytes(value)) for name, value in fields])

    def _recognize(self, data: bytes, table: HeaderTable) -> DecodedBlock:
        """Decode a block of common representations, and update the table.

        Raises:
            _Unusual: hpack has to decide.
            IndexError: The block ends early, or refers to an entry that the table does not have.
            hpack.HPACKError: A string is not of the Huffman code.
        """
        before = state_of(table)
        entries = table.dynamic_entries
        most = self._decoder.max_header_list_size
        fields: HeaderList = []
        added: HeaderList = []
        refers = False
        size = position = 0
        end = len(data)
        while position < end:
            first = data[position]
            # RFC 7541, 6: the bits of the index.
            if first & _INDEXED:
                mask = 0x7F
            elif first & _INCREMENTAL:
                mask = 0x3F
            elif first & _SIZE_UPDATE:
                raise _Unusual
            else:
                mask = 0x0F
            index, position = _integer(data, position, mask)
            if index < _FIRST_DYNAMIC:
                field = _STATIC[index]
            else:
                refers = True
                field = entries[index - _FIRST_DYNAMIC]
            if mask == 0x7F:
                if not index:
                    raise _Unusual
            else:
                name = field[0]
                if not index:
                    name, position = self._string(data, position)
                value, position = self._string(data, position)
                field = (name, value)
                if mask == 0x3F:
                    added.append(field)
                    table.add(name, value)
            fields.append(field)
            size += _ENTRY_OVERHEAD + len(field[0]) + len(field[1])
            if size > most:
                raise _Unusual
        return DecodedBlock(fields, size, added, before if refers else None)

    def _string(self, data: bytes, position: int) -> tuple[bytes, int]:
        """Return the string at `position` (RFC 7541, 5.2), and the position after it."""
        first = data[position]
        length, start = _integer(data, position, 0x7F)
        end = start + length
        if end > len(data):
            raise _Unusual
        encoded = data[start:end]
        if not first & _HUFFMAN:
            return encoded, end
        string = self._strings.get(encoded)
        if string is None:
            string = decode_huffman(encoded)
            if length <= MOST_IN_STRING:
                _remember(self._strings, MOST_STRINGS, encoded, string)
        return string, end


class _Unusual(Exception):
    """The block holds something that is left to hpack."""


def _integer(data: bytes, position: int, mask: int) -> tuple[int, int]:
    """Return the integer at `position` (RFC 7541, 5.1), and the position after it."""
    value = data[position] & mask
    if value < mask:
        return value, position + 1
    # One or two more bytes suffice for what is usual.
    more = data[position + 1]
    if more < 0x80:
        return value + more, position + 2
    last = data[position + 2]
    if last < 0x80:
        return value + (more & 0x7F) + (last << 7), position + 3
    raise _Unusual


class BlockEncoder:
    """Encodes the header blocks of a connection.

    Args:
        encoder: The encoder that has the connection's dynamic table.
    """

    def __init__(self, encoder: hpack.Encoder) -> None:
        self._encoder = encoder
        self._blocks: dict[Any, tuple[bytes, TableState]] = {}

    def encode(self, headers: HeaderList) -> bytes:
        """Encode the header fields of a request as hpack does."""
        encoder = self._encoder
        table = encoder.header_table
        # hpack's `NeverIndexedHeaderTuple` equals an ordinary tuple, so the key includes the types. The size
        # decides whether a large field is added to the table.
        key = (table.maxsize, *headers, *map(type, headers))
        known = self._blocks.get(key)
        if known is not None and not table.resized and _is_in(table, known[1]):
            return known[0]
        before = None if table.resized else state_of(table)
        block = encoder.encode(headers)
        if before is not None and _is_in(table, before) and _size_of(headers) <= MOST_IN_FIELDS:
            _remember(self._blocks, MOST_BLOCKS, key, (block, before))
        return block


def _size_of(headers: HeaderList) -> int:
    return sum(_ENTRY_OVERHEAD + len(name) + len(value) for name, value in headers)


def _remember(memo: dict[K, V], most: int, key: K, value: V) -> None:
    """Add an entry to a memo, in the place of its oldest entry if it is full."""
    if len(memo) >= most:
        del memo[next(iter(memo))]
    memo[key] = value
