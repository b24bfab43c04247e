"""TODO _fields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex, TypeAlias, TypeVar, overload

from ._exceptions import LocalProtocolError

T = TypeVar("T")

#: Headers where no user sees them.
HeaderList: TypeAlias = list[tuple[bytes, bytes]]
# A mapping's type of keys is invariant, hence three of them.
HeaderTypes: TypeAlias = (
    Mapping[str, bytes | str]
    | Mapping[bytes, bytes | str]
    | Mapping[bytes | str, bytes | str]
    | Sequence[tuple[bytes | str, bytes | str]]
)

# RFC 9110, 5.6.2 and 5.5.
TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FIELD_VALUE = re.compile(rb"(?:[\x21-\x7e\x80-\xff]+(?:[ \t]+[\x21-\x7e\x80-\xff]+)*)?")


def to_bytes(name: str, value: bytes | str, of: bytes = b"") -> bytes:
    """Take bytes, or text in ASCII. An error says that it is the `name`, of which one is told by `of`."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        try:
            return value.encode("ascii")
        except UnicodeEncodeError as exc:
            # The value may be a secret.
            raise TypeError(
                f"{name} given as str must be ASCII, but the character at index {exc.start} is not"
                f"{f', for {of!r}' if of else ''}; encode it to bytes first"
            ) from None
    raise TypeError(
        f"{name} must be bytes or str, but got {type(value).__name__}{f' for {of!r}' if of else ''}"
    )


class Headers(list[tuple[bytes, bytes]]):
    """Header fields, in the order and case of the wire: a list of pairs of name and value, all bytes.

    It compares, and can be changed, like any list. Besides, fields are found by name, given as bytes or
    ASCII str, in any case: `headers.get("Content-Type")`, `"Content-Type" in headers`.
    mypy with strict equality reports a name before `in`, since the items are pairs; use `get` there.
    """

    __slots__ = ()

    @overload
    def get(self, name: bytes | str) -> bytes | None: ...

    @overload
    def get(self, name: bytes | str, default: T) -> bytes | T: ...

    def get(self, name: bytes | str, default: T | None = None) -> bytes | T | None:
        """The value of the first field of that name.

        Args:
            name: The field's name, in any case.
            default: What to return where there is no such field.

        Raises:
            TypeError: The name is neither bytes nor str.
        """
        wanted = _folded(name)
        for key, value in self:
            if key.lower() == wanted:
                return value
        return default

    def get_all(self, name: bytes | str) -> list[bytes]:
        """The values of all fields of that name, in their order; an empty list where there is none.

        Args:
            name: The fields' name, in any case.

        Raises:
            TypeError: The name is neither bytes nor str.
        """
        wanted = _folded(name)
        return [value for key, value in self if key.lower() == wanted]

    @overload
    def __getitem__(self, index: SupportsIndex) -> tuple[bytes, bytes]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[bytes, bytes]]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (bytes, str)):
            raise TypeError(f"headers are a list of pairs; find one by headers.get({index!r})")
        return super().__getitem__(index)

    def copy(self) -> Headers:
        """A copy, of the same type."""
        return Headers(self)

    def __contains__(self, item: object) -> bool:
        if isinstance(item, (bytes, str)):
            return self.get(item) is not None
        return super().__contains__(item)


def _folded(name: bytes | str) -> bytes | None:
    """A header's name in lower case; None for text that is no header's name."""
    if isinstance(name, bytes):
        return name.lower()
    if isinstance(name, str):
        return name.lower().encode() if name.isascii() else None
    raise TypeError(f"a header's name must be bytes or str, but got {type(name).__name__}")


def to_headers(value: HeaderTypes | None) -> Headers:
    """Take what a caller gives as headers.

    Raises:
        TypeError: It is neither a mapping nor a sequence of pairs, or a name or value is neither bytes nor
            ASCII str.
    """
    if value is None:
        return Headers()
    pairs: Any = value.items() if isinstance(value, Mapping) else value
    if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes, bytearray)):
        raise TypeError(f"headers must be a mapping or a sequence of pairs, but got {type(value).__name__}")
    return Headers(map(_to_header, pairs))


def _to_header(pair: Any) -> tuple[bytes, bytes]:
    name, value = to_pair("each header must be a pair of name and value", pair)
    name = to_bytes("header names", name)
    return name, to_bytes("header values", value, name)


def to_pair(message: str, pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, (tuple, list)):
        raise TypeError(f"{message}, but got {type(pair).__name__}")
    if len(pair) != 2:
        raise TypeError(f"{message}, but got {len(pair)} items")
    return pair[0], pair[1]


def check_field(name: bytes, value: bytes) -> None:
    """Check a header field.

    Raises:
        LocalProtocolError: It can't be sent.
    """
    if not TOKEN.fullmatch(name):
        raise LocalProtocolError(f"a header's name must be a token, not {name!r}")
    if not _FIELD_VALUE.fullmatch(value):
        raise LocalProtocolError(
            f"the value of the header {name!r} has control characters, or white space at an end"
        )


def check_single_field(name: bytes, has_it: bool) -> None:
    if has_it:
        raise LocalProtocolError(f"a request can have only one header {name!r}")
