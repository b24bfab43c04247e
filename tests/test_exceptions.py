from __future__ import annotations

import pytest

import trio_exchange
from trio_exchange import (
    ConnectError,
    ConnectionNotAvailable,
    ConnectTimeout,
    ExchangeError,
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
from trio_exchange._exceptions import mark_unanswered, may_resend

PARENTS = {
    ExchangeError: Exception,
    ConnectionNotAvailable: ExchangeError,
    ProxyError: ExchangeError,
    UnsupportedProtocol: ExchangeError,
    ProtocolError: ExchangeError,
    LocalProtocolError: ProtocolError,
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


@pytest.mark.parametrize(("error", "parent"), PARENTS.items())
def test_the_tree(error: type[Exception], parent: type[Exception]) -> None:
    assert error.__bases__ == (parent,)


def test_every_exception_is_public() -> None:
    assert set(_exceptions.__all__) == {error.__name__ for error in PARENTS}
    assert set(_exceptions.__all__) <= set(trio_exchange.__all__)


@pytest.mark.parametrize("idempotent", [False, True])
def test_an_error_that_nobody_marked_forbids_resending(idempotent: bool) -> None:
    assert not may_resend(ReadError(), idempotent=idempotent)


@pytest.mark.parametrize("idempotent", [False, True])
def test_an_unsent_request_may_always_be_sent_again(idempotent: bool) -> None:
    error = WriteError()
    mark_unanswered(error, unsent=True)
    assert may_resend(error, idempotent=idempotent)


@pytest.mark.parametrize("idempotent", [False, True])
def test_a_sent_but_unanswered_request_may_be_sent_again_if_it_is_idempotent(idempotent: bool) -> None:
    error = ReadError()
    mark_unanswered(error, unsent=False)
    assert may_resend(error, idempotent=idempotent) is idempotent


def test_marking_one_error_leaves_others_alone() -> None:
    mark_unanswered(ReadError(), unsent=True)
    assert not may_resend(ReadError(), idempotent=True)
