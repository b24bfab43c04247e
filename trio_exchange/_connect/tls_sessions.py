"""TLS sessions: kept when a connection has received data, and resumed by the next ones to the same peer.

Theory of operation. Resuming a session (RFC 8446, section 2.2; RFC 5246, section 7.3; RFC 5077) saves the
certificates, their verification and the signature. The peer then proves only that it knows the session's
secret: neither its certificate nor its name is verified again. So a session is offered only where all that
was verified would be verified again in the same way. A `SessionKey` has all of that.

- *Certificates are verified again after ten minutes.* Only the session of a full handshake is kept, and for
  so long; a server can't extend it by further tickets.
- *Connections share a session meanwhile.* An observer can link connections that offer the same ticket, for
  which RFC 8446, appendix C.4 recommends to use each only once. But Python copies a session, certificates
  included, whenever it is read or set. A new ticket for each connection would cost as much as resuming
  saves. The connections of a pool mostly have the same two addresses, and the time limit is short.
- *A connection that fails forgets the session that it has offered*: in the handshake, or later without having
  received data. In TLS 1.3 the server may refuse the client after the handshake.
- *Reading a session leaks memory* in many releases of CPython (gh-116810): 6.5 KiB each time, which is the
  session itself. There a process reads only so many that the leak stays small, and then resumes no more new
  sessions.
- *The client's certificate* can't be read from a context. A session belongs to its context, which `ssl`
  checks too. A program that needs another certificate needs another context, since open connections keep the
  certificate that they began with as well. The key refers to the context, so that no later one can have the
  same `id`.
"""

from __future__ import annotations

import ssl
import sys
import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, ClassVar, NamedTuple

# For how many keys a session is kept.
_MOST_SESSIONS = 100
# For how many seconds after the full handshake a session may be resumed.
_LIFETIME = 600.0
# Whether reading a session leaks memory: mended in CPython 3.12.8 and 3.13.1.
READING_LEAKS = sys.version_info < (3, 12, 8) or (3, 13) <= sys.version_info < (3, 13, 1)
# How many sessions a process may then read: 6.5 MiB.
_MOST_LEAKED = 1000


class SessionKey(NamedTuple):
    """What two connections must have in common so that one may resume the session of the other.

    Attributes:
        peer: The server or proxy that is connected to, with the name for SNI.
        context: The TLS settings.
        alpn: The protocols that are offered.
        verification: The context's settings for verification, since a program can change them at any time.
    """

    peer: Hashable
    context: ssl.SSLContext
    alpn: tuple[str, ...]
    verification: Hashable


class _KeptSession(NamedTuple):
    session: ssl.SSLSession
    expires_at: float


class TLSSessions:
    """The sessions of a pool, one for each key. Those that were not used for longest are forgotten first.

    Attributes:
        leaked: How many sessions all pools have read, where reading leaks memory.
    """

    leaked: ClassVar[int] = 0

    def __init__(self) -> None:
        self._kept: OrderedDict[SessionKey, _KeptSession] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: SessionKey) -> ssl.SSLSession | None:
        """Return the session to offer, None if there is none."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        if kept.expires_at <= time.monotonic():
            del self._kept[key]
            return None
        self._kept.move_to_end(key)
        return kept.session

    def keep(self, key: SessionKey, ssl_object: Any) -> None:
        """Keep the session of a full handshake, unless there is one for the key, or it can't be resumed."""
        if key in self._kept:
            return
        if READING_LEAKS:
            if TLSSessions.leaked >= _MOST_LEAKED:
                return
            TLSSessions.leaked += 1
        session = ssl_object.session
        # In TLS 1.3 a session without a ticket has no id either.
        if session is None or not (session.has_ticket or session.id):
            return
        self._kept[key] = _KeptSession(session, time.monotonic() + _LIFETIME)
        if len(self._kept) > _MOST_SESSIONS:
            self._kept.popitem(last=False)

    def forget(self, key: SessionKey, session: ssl.SSLSession) -> None:
        """Forget a session, unless another one has replaced it."""
        kept = self._kept.get(key)
        if kept is not None and kept.session is session:
            del self._kept[key]


class Resumption:
    """The sessions as one connection uses them.

    Args:
        sessions: The sessions of the pool.
        peer: The server or proxy that is connected to, with the name for SNI.
        context: The TLS settings, as they are when the handshake begins.
        alpn: The protocols that are offered.

    Attributes:
        offered: The session to offer in the handshake, None if there is none.
    """

    __slots__ = ("_key", "_sessions", "offered")

    def __init__(
        self, sessions: TLSSessions, peer: Hashable, context: ssl.SSLContext, alpn: tuple[str, ...]
    ) -> None:
        verification = (context.verify_mode, context.verify_flags, context.check_hostname)
        self._sessions = sessions
        self._key = SessionKey(peer, context, alpn, verification)
        self.offered: ssl.SSLSession | None = sessions.find(self._key)

    def succeeded(self, ssl_object: Any) -> None:
        """Take note that the connection has received data, behind which no session ticket is to come."""
        if not ssl_object.session_reused:
            # The server may have refused the session that was offered.
            self.failed()
            self._sessions.keep(self._key, ssl_object)

    def failed(self) -> None:
        """Take note that the handshake failed, or that the connection ended without data."""
        if self.offered is not None:
            self._sessions.forget(self._key, self.offered)


def verifies_alone(context: ssl.SSLContext) -> bool:
    """Return whether nothing but OpenSSL verifies the peer, so that sessions may be resumed.

    A class derived from `ssl.SSLContext` may need the certificates of a full handshake, as that of the
    truststore package does.
    """
    return type(context).__module__ == ssl.__name__
