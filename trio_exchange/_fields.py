"""Header fields: the list type `Headers`, and the checks of names and values before they are sent.

Names and values are bytes everywhere in the package. Text is accepted from callers if it is ASCII, since HTTP
gives no other text a meaning (RFC 9110, section 5.5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex, TypeAlias, TypeVar, overload

from ._exceptions import LocalProtocolError

T = TypeVar("T")

#: Header fields inside the package, where no look-up by name is needed.
HeaderList: TypeAlias = list[tuple[bytes, bytes]]
# Three mappings, since a mapping is invariant in the type of its keys.
HeaderTypes: TypeAlias = (
    Mapping[str, bytes | str]
    | Mapping[bytes, bytes | str]
    | Mapping[bytes | str, bytes | str]
    | Sequence[tuple[bytes | str, bytes | str]]
)

# RFC 9110, sections 5.6.2 and 5.5.
TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FIELD_VALUE = re.compile(rb"(?:[\x21-\x7e\x80-\xff]+(?:[ \t]+[\x21-\x7e\x80-\xff]+)*)?")


def to_bytes(name: str, value: bytes | str, of: bytes = b"") -> bytes:
    """Return bytes as they are, and ASCII text encoded.

    Args:
        name: The name of the argument, for error messages, such as "header values".
        value: The bytes or text.
        of: The name of the header that the value belongs to, for error messages; empty for none.

    Raises:
        TypeError: The value is neither bytes nor str, or contains other characters than ASCII.
    """
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        try:
            return value.encode("ascii")
        except UnicodeEncodeError as exc:
            # Not shown, since the value may be a secret; nor is the cause, which contains it.
            raise TypeError(
                f"{name} given as str must be ASCII, but the character at index {exc.start} is not"
                f"{f', for {of!r}' if of else ''}; encode it to bytes first"
            ) from None
    raise TypeError(
        f"{name} must be bytes or str, but got {type(value).__name__}{f' for {of!r}' if of else ''}"
    )


class Headers(list[tuple[bytes, bytes]]):
    """Header fields, in the order and case of the wire: a list of pairs of name and value, all bytes.

    It compares like a list and can be changed like one. In addition it finds fields by name, given as bytes
    or ASCII str, in any case: `headers.get("Content-Type")`, `"Content-Type" in headers`. With strict
    equality mypy reports a name to the left of `in`, since the items are pairs; use `get` there.
    """

    __slots__ = ()

    @overload
    def get(self, name: bytes | str) -> bytes | None: ...

    @overload
    def get(self, name: bytes | str, default: T) -> bytes | T: ...

    def get(self, name: bytes | str, default: T | None = None) -> bytes | T | None:
        """Return the value of the first field of a name.

        Args:
            name: The field's name, in any case.
            default: The value to return if there is no such field.

        Raises:
            TypeError: The name is neither bytes nor str.
        """
        wanted = _folded(name)
        for key, value in self:
            if key.lower() == wanted:
                return value
        return default

    def get_all(self, name: bytes | str) -> list[bytes]:
        """Return the values of all fields of a name, in order; an empty list if there is none.

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
        """Return a shallow copy, also a `Headers`."""
        return Headers(self)

    def __contains__(self, item: object) -> bool:
        if isinstance(item, (bytes, str)):
            return self.get(item) is not None
        return super().__contains__(item)


def _folded(name: bytes | str) -> bytes | None:
    """Return a header's name in lower case, None for text that is not ASCII and so matches no header."""
    if isinstance(name, bytes):
        return name.lower()
    if isinstance(name, str):
        return name.lower().encode() if name.isascii() else None
    raise TypeError(f"a header's name must be bytes or str, but got {type(name).__name__}")


def to_headers(value: HeaderTypes | None) -> Headers:
    """Convert a caller's headers, a mapping or a sequence of pairs, to `Headers`; None gives an empty list.

    Raises:
        TypeError: The value is neither a mapping nor a sequence of pairs, or a name or value in it is
            neither bytes nor ASCII str.
    """
    if value is None:
        return Headers()
    headers = Headers()
    pair: Any
    for pair in value if isinstance(value, list) else _pairs_of(value):
        # Most callers give tuples of bytes, which need no conversion.
        if type(pair) is tuple and len(pair) == 2 and type(pair[0]) is bytes is type(pair[1]):
            headers.append(pair)
        else:
            headers.append(_to_header(pair))
    return headers


def _pairs_of(value: HeaderTypes) -> Iterable[Any]:
    pairs: Any = value.items() if isinstance(value, Mapping) else value
    if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes, bytearray)):
        raise TypeError(f"headers must be a mapping or a sequence of pairs, but got {type(value).__name__}")
    return pairs


def _to_header(pair: Any) -> tuple[bytes, bytes]:
    name, value = to_pair("each header must be a pair of name and value", pair)
    name = to_bytes("header names", name)
    return name, to_bytes("header values", value, name)


def to_pair(message: str, pair: Any) -> tuple[Any, Any]:
    """Return the two items of a tuple or list.

    Raises:
        TypeError: `pair` is of another type or length; the error begins with `message`.
    """
    if not isinstance(pair, (tuple, list)):
        raise TypeError(f"{message}, but got {type(pair).__name__}")
    if len(pair) != 2:
        raise TypeError(f"{message}, but got {len(pair)} items")
    return pair[0], pair[1]


def check_field(name: bytes, value: bytes) -> None:
    """Check that a header field can be sent.

    Raises:
        LocalProtocolError: The name is not a token, or the value has control characters or outer white space.
    """
    if not TOKEN.fullmatch(name):
        raise LocalProtocolError(f"a header's name must be a token, not {name!r}")
    if not _FIELD_VALUE.fullmatch(value):
        raise LocalProtocolError(
            f"the value of the header {name!r} has control characters, or white space at an end"
        )


def check_single_field(name: bytes, repeated: bool) -> None:
    """Check that a header which may occur only once does not occur again.

    Args:
        name: The header's name.
        repeated: Whether it has occurred before.

    Raises:
        LocalProtocolError: It is repeated.
    """
    if repeated:
        raise LocalProtocolError(f"a request can have only one header {name!r}")
