from __future__ import annotations

from typing import Any

import pytest
import trio

import trio_exchange
from trio_exchange import (
    ConnectError,
    ConnectionNotAvailable,
    ConnectionPool,
    ConnectTimeout,
    ExchangeError,
    InvalidURL,
    LocalProtocolError,
    NetworkError,
    PoolTimeout,
    ProtocolError,
    ProxyError,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    TimeoutException,
    UnsupportedProtocol,
    WriteError,
    WriteTimeout,
    _exceptions,
)
from trio_exchange._exceptions import ExchangeFailed, show_public_contexts
from trio_exchange._http.retry import Resend, reason_to_resend
from trio_exchange.testing import MemoryConnector, ScriptedPeer

PARENTS: dict[type[Exception], type[Exception] | tuple[type[Exception], ...]] = {
    ExchangeError: Exception,
    ConnectionNotAvailable: ExchangeError,
    ProxyError: ExchangeError,
    ProtocolError: ExchangeError,
    LocalProtocolError: ProtocolError,
    InvalidURL: (LocalProtocolError, ValueError),
    UnsupportedProtocol: InvalidURL,
    RemoteProtocolError: ProtocolError,
    TimeoutException: ExchangeError,
    PoolTimeout: TimeoutException,
    ConnectTimeout: TimeoutException,
    ReadTimeout: TimeoutException,
    WriteTimeout: TimeoutException,
    NetworkError: ExchangeError,
    ConnectError: NetworkError,
    ReadError: NetworkError,
    WriteError: NetworkError,
}


@pytest.mark.parametrize(("error", "parents"), PARENTS.items())
def test_the_tree(error: type[Exception], parents: type[Exception] | tuple[type[Exception], ...]) -> None:
    assert error.__bases__ == (parents if isinstance(parents, tuple) else (parents,))


def test_every_exception_is_public() -> None:
    assert set(_exceptions.__all__) == {error.__name__ for error in PARENTS}
    assert set(_exceptions.__all__) <= set(trio_exchange.__all__)


idempotent_or_not = pytest.mark.parametrize("idempotent", [False, True])
reused_or_not = pytest.mark.parametrize("reused", [False, True])


@idempotent_or_not
@reused_or_not
def test_a_failure_of_which_nothing_is_known_forbids_resending(idempotent: bool, reused: bool) -> None:
    assert reason_to_resend(ExchangeFailed(ReadError()), idempotent=idempotent, reused=reused) is None


@idempotent_or_not
@reused_or_not
def test_an_unsent_request_may_be_sent_again_if_the_connection_was_reused(
    idempotent: bool, reused: bool
) -> None:
    error = ExchangeFailed(WriteError(), unanswered=True, unsent=True)
    reason = reason_to_resend(error, idempotent=idempotent, reused=reused)
    assert reason is (Resend.UNSENT if reused else None)


@idempotent_or_not
@reused_or_not
def test_a_sent_but_unanswered_request_may_be_sent_again_if_it_is_idempotent_besides(
    idempotent: bool, reused: bool
) -> None:
    error = ExchangeFailed(ReadError(), unanswered=True)
    reason = reason_to_resend(error, idempotent=idempotent, reused=reused)
    assert reason is (Resend.UNANSWERED if idempotent and reused else None)


@idempotent_or_not
@reused_or_not
@pytest.mark.parametrize("unanswered", [False, True])
def test_a_refused_request_may_always_be_sent_again(idempotent: bool, reused: bool, unanswered: bool) -> None:
    error = ExchangeFailed(RemoteProtocolError(), refused=True, unanswered=unanswered)
    assert reason_to_resend(error, idempotent=idempotent, reused=reused) is Resend.REFUSED


@idempotent_or_not
@reused_or_not
def test_a_request_for_which_a_connection_had_no_place_may_always_be_sent(
    idempotent: bool, reused: bool
) -> None:
    error = ExchangeFailed(RemoteProtocolError(), refused=True, unanswered=True, unsent=True)
    assert reason_to_resend(error, idempotent=idempotent, reused=reused) is Resend.UNSENT


@pytest.mark.parametrize("known", [{"unanswered": True, "unsent": True}, {"refused": True}])
def test_what_is_known_of_one_failure_leaves_others_alone(known: dict[str, bool]) -> None:
    ExchangeFailed(ReadError(), **known)
    assert reason_to_resend(ExchangeFailed(ReadError()), idempotent=True, reused=True) is None


# -- What users see of it.


async def test_an_error_of_a_handler_has_the_public_error_as_its_context(nursery: trio.Nursery) -> None:
    async def hang_up(peer: ScriptedPeer) -> None:
        await peer.receive_request()

    async def fail(event: str, info: dict[str, Any]) -> None:
        if event == "http11.receive_response_headers.failed":
            try:
                raise KeyError("first")
            except KeyError:
                raise LookupError("second")  # noqa: B904 - the chain is what is tested

    async with ConnectionPool(connector=MemoryConnector(nursery, hang_up)) as pool:
        with pytest.raises(LookupError, match="second") as caught:
            await pool.request("POST", "http://x/", content=b"body", extensions={"trace": fail})
    first = caught.value.__context__
    assert isinstance(first, KeyError)
    assert isinstance(first.__context__, RemoteProtocolError)


def test_contexts_that_form_a_circle_come_to_an_end() -> None:
    first, second = KeyError(), ValueError()
    first.__context__, second.__context__ = second, first
    show_public_contexts(first)
    assert first.__context__ is second
