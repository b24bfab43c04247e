"""What the fuzzers have found worth keeping is sent to the client once more, without a fuzzer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from trio_exchange._connect.transport import Readiness
from trio_exchange._http import http11
from trio_exchange._http.http2 import stream as http2_stream
from trio_exchange._http.http2.frames import Frame, FrameSplitter

from .fuzz import corpus
from .fuzz.inputs import NEXT_REQUEST, PIECE, http2_script, http11_script
from .fuzz.targets import TARGETS, Misbehaviour, _exchange_twice, _run

FILES = [(target, path) for target in TARGETS for path in corpus.inputs(target)]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
OTHER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother"


@pytest.mark.parametrize(("target", "path"), FILES, ids=[f"{target}-{path.name}" for target, path in FILES])
def test_the_client_is_unharmed(target: str, path: Path) -> None:
    TARGETS[target](path.read_bytes())


def test_the_corpus_is_small() -> None:
    assert {target for target, _ in FILES} == set(TARGETS)
    assert len(FILES) <= 20 * len(TARGETS)
    assert sum(path.stat().st_size for _, path in FILES) <= 100 * 1024


def test_inputs_mean_what_they_say() -> None:
    script = http11_script(b"\x05\x01" + b"a" + PIECE + b"b" + NEXT_REQUEST + b"c")
    assert (script.options, script.ends, script.phases) == (5, True, ((b"a", b"b"), (b"c",)))
    empty = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    ping = b"\x00\x00\x08\x06\x01\x00\x00\x00\x00"
    script = http2_script(b"\x80\x00" + b"\x01\x09\x00" + b"\x02\x06\x0112345678" + b"\x00\x0b\x00\x03abc")
    acknowledged = empty[:4] + b"\x01" + empty[5:]
    assert script.phases == ((acknowledged, ping + b"12345678"), (b"abc",))


def test_the_second_answer_is_looked_at_if_the_connection_was_kept() -> None:
    seen, alone = _run(_exchange_twice, http11_script(b"\0\0" + OK + NEXT_REQUEST + OTHER))
    assert seen == (200, [(b"Content-Length", b"5")], b"other", None)
    assert alone == (OTHER,)
    _, alone = _run(_exchange_twice, http11_script(b"\0\0" + OK + OTHER + NEXT_REQUEST + OTHER))
    assert alone is None


def test_an_answer_to_another_request_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\0\0" + OK + PIECE + OTHER + NEXT_REQUEST + OK
    TARGETS["http11"](data)
    monkeypatch.setattr(http11.HTTP11Connection, "readiness", lambda _: Readiness.QUIET)
    with pytest.raises(Misbehaviour, match="other"):
        TARGETS["http11"](data)


def test_data_of_another_stream_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    data = (corpus.CORPUS / "http2" / "two-and-one").read_bytes()
    take_data = http2_stream.HTTP2Stream.take_data

    def take_twisted(exchange: http2_stream.HTTP2Stream, data: bytes, size: int) -> None:
        take_data(exchange, data.replace(b"\x03", b"\x01"), size)

    monkeypatch.setattr(http2_stream.HTTP2Stream, "take_data", take_twisted)
    with pytest.raises(Misbehaviour, match="a body of no stream"):
        TARGETS["http2"](data)


def test_what_hangs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http11, "timed", lambda _timeout, _error, operation, *args: operation(*args))
    with pytest.raises(Misbehaviour, match="it hangs"):
        TARGETS["http11"](b"\0\0")


def test_frames_that_depend_on_how_they_arrive_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    data = (corpus.CORPUS / "parsers" / "frames").read_bytes()
    split = FrameSplitter.split

    def forget(splitter: FrameSplitter, data: bytes, highest_stream_id: int) -> Iterator[Frame]:
        yield from split(splitter, data, highest_stream_id)
        splitter._buffer = b""

    monkeypatch.setattr(FrameSplitter, "split", forget)
    with pytest.raises(Misbehaviour, match="byte by byte"):
        TARGETS["parsers"](data)


def test_what_is_kept_reaches_what_the_rest_does_not(tmp_path: Path) -> None:
    for name, data in {"small": b"\1x", "large": b"\1" + b"x" * 50, "same": b"\1" + b"x" * 51}.items():
        (tmp_path / name).write_bytes(data)
    small, large, same = (tmp_path / name for name in ("small", "large", "same"))
    chosen = corpus.choose(TARGETS["parsers"], [], [small, large, same])
    assert chosen == [large]
    assert corpus.choose(TARGETS["parsers"], [same], [small, large]) == []


def test_what_was_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CORPUS", tmp_path)
    work, kept = tmp_path / "work", tmp_path / "parsers"
    for folder, name, data in (
        (work, "a" * 40, b"\1" + b"x" * 50),
        (kept, "b" * 40, b"\1"),
        (kept, "c", b""),
    ):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    assert corpus.renew("parsers", TARGETS["parsers"], work) == [kept / ("a" * 40), kept / "c"]
