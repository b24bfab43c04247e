from __future__ import annotations

import pytest

import trio_exchange
from trio_exchange import (
    ConnectError,
    ConnectionNotAvailable,
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
from trio_exchange._exceptions import ExchangeFailed
from trio_exchange._http.retry import Resend, reason_to_resend

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
