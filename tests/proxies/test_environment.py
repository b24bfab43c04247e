"""The proxy that the environment names, and the hosts that it exempts."""

from __future__ import annotations

import ipaddress
import os
from unittest import mock

import hypothesis
import pytest
from hypothesis import strategies as st

from trio_exchange import URL
from trio_exchange._proxies.environment import proxy_from_environment

VARIABLES = [
    spelling
    for name in ("http_proxy", "https_proxy", "ws_proxy", "wss_proxy", "ftp_proxy", "all_proxy", "no_proxy")
    for spelling in (name, name.upper())
]

# No deadline: the machine may be busy with something else.
SETTINGS = hypothesis.settings(deadline=None, max_examples=300)

LABELS = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
NAMES = st.lists(LABELS, min_size=1, max_size=5).map(".".join)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)


def _host_of_proxy(url: URL | bytes | str, environ: dict[str, str]) -> str | None:
    """The proxy's host in this environment."""
    with mock.patch.dict(os.environ, environ):
        proxy = proxy_from_environment(url)
    return None if proxy is None else proxy.url.host.decode()


def _is_direct(url: URL | str, no_proxy: str) -> bool:
    return _host_of_proxy(url, {"all_proxy": "http://proxy", "no_proxy": no_proxy}) is None


# Which variable counts.


@pytest.mark.parametrize("url", ["http://example.com", b"https://example.com", URL("ws://example.com"), ""])
def test_an_empty_environment_names_no_proxy(url: URL | bytes | str) -> None:
    assert proxy_from_environment(url) is None


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("http", "of-http"),
        ("HTTP", "of-http"),
        ("ws", "of-http"),
        ("https", "of-https"),
        ("wss", "of-https"),
        ("ftp", None),
        ("no", None),
    ],
)
@pytest.mark.parametrize("spell", [str.lower, str.upper])
def test_the_urls_scheme_selects_the_variable(scheme: str, expected: str | None, spell: type[str]) -> None:
    names = ("http", "https", "ws", "wss", "ftp", "all")
    environ = {spell(f"{name}_proxy"): f"http://of-{name}" for name in names}
    for url in (
        f"{scheme}://example.com",
        f"{scheme}://example.com".encode(),
        URL(f"{scheme}://example.com"),
    ):
        assert _host_of_proxy(url, environ) == expected


@pytest.mark.parametrize("url", ["example.com", "/path", "//example.com", ""])
def test_a_url_without_a_scheme_has_no_proxy(url: str) -> None:
    assert _host_of_proxy(url, {"all_proxy": "http://proxy", "_proxy": "http://other"}) is None


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"all_proxy": "http://low"}, "low"),
        ({"ALL_PROXY": "http://up"}, "up"),
        ({"all_proxy": "http://low", "ALL_PROXY": "http://up"}, "low"),
        ({"http_proxy": "http://low", "HTTP_PROXY": "http://up"}, "low"),
        ({"https_proxy": "http://other"}, None),
        ({"https_proxy": "http://other", "all_proxy": "http://all"}, "all"),
        # The scheme's own goes before, however it is spelled.
        ({"HTTP_PROXY": "http://up", "all_proxy": "http://all"}, "up"),
        # An empty value names none.
        ({"HTTP_PROXY": ""}, None),
        ({"http_proxy": " "}, None),
        ({"http_proxy": "", "HTTP_PROXY": "http://up"}, None),
        ({"all_proxy": "", "ALL_PROXY": "http://up"}, None),
        ({"http_proxy": "http://low", "HTTP_PROXY": ""}, "low"),
        ({"http_proxy": "", "HTTP_PROXY": "http://up", "all_proxy": "http://all"}, "all"),
        ({"HTTP_PROXY": "", "ALL_PROXY": "http://all"}, "all"),
        # A client's header, in a CGI program.
        ({"HTTP_PROXY": "http://up", "REQUEST_METHOD": "GET"}, None),
        ({"HTTP_PROXY": "http://up", "REQUEST_METHOD": ""}, None),
        ({"HTTP_PROXY": "http://up", "REQUEST_METHOD": "GET", "ALL_PROXY": "http://all"}, "all"),
        ({"http_proxy": "http://low", "HTTP_PROXY": "http://up", "REQUEST_METHOD": "GET"}, "low"),
    ],
)
def test_the_lower_case_name_goes_before_and_all_proxy_comes_last(
    environ: dict[str, str], expected: str | None
) -> None:
    assert _host_of_proxy("http://example.com", environ) == expected


def test_a_cgi_program_has_https_proxy_in_upper_case() -> None:
    environ = {"HTTPS_PROXY": "http://up", "REQUEST_METHOD": "GET"}
    assert _host_of_proxy("https://example.com", environ) == "up"


class _AnyCase(dict[str, str]):
    """As `os.environ` is on Windows: names are stored in upper case, and found in any."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).upper())

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.upper())

    def get(self, name: str, default: str = "") -> str:  # type: ignore[override]
        return super().get(name.upper(), default)


def test_names_in_any_case_dont_let_a_cgi_programs_client_name_the_proxy() -> None:
    environ = _AnyCase(HTTP_PROXY="http://up", NO_PROXY="direct.example")
    assert "http_proxy" in environ
    assert environ["http_proxy"] == environ.get("http_proxy") == "http://up"
    with mock.patch.object(os, "environ", environ):
        proxy = proxy_from_environment("http://example.com")
        assert proxy is not None
        assert proxy.url.host == b"up"
        assert proxy_from_environment("http://direct.example") is None
        environ["REQUEST_METHOD"] = "GET"
        assert proxy_from_environment("http://example.com") is None


@pytest.mark.parametrize("url", [None, 1, ["http://example.com"]])
def test_what_is_no_url_is_a_type_error(url: object) -> None:
    with pytest.raises(TypeError, match="url must be bytes or str"):
        proxy_from_environment(url)  # type: ignore[arg-type]


# What a value may be.


@pytest.mark.parametrize(
    ("value", "scheme", "host", "port", "auth"),
    [
        ("http://proxy.example.com:3128", b"http", b"proxy.example.com", 3128, None),
        ("https://proxy.example.com", b"https", b"proxy.example.com", None, None),
        ("http://proxy.example.com:3128/", b"http", b"proxy.example.com", 3128, None),
        (" http://proxy.example.com:3128\n", b"http", b"proxy.example.com", 3128, None),
        ("proxy.example.com:3128", b"http", b"proxy.example.com", 3128, None),
        ("proxy.example.com", b"http", b"proxy.example.com", None, None),
        ("localhost:3128", b"http", b"localhost", 3128, None),
        ("192.0.2.1:3128", b"http", b"192.0.2.1", 3128, None),
        ("[2001:db8::1]:3128", b"http", b"2001:db8::1", 3128, None),
        ("user:secret@proxy:3128", b"http", b"proxy", 3128, (b"user", b"secret")),
        ("http://us%65r:p%40ss@proxy:3128", b"http", b"proxy", 3128, (b"user", b"p@ss")),
        ("HTTP://proxy", b"http", b"proxy", None, None),
        ("http://b\u00fccher.example:3128", b"http", b"xn--bcher-kva.example", 3128, None),
        ("socks4://proxy:1080", b"socks4", b"proxy", 1080, None),
        ("socks4a://proxy:1080", b"socks4a", b"proxy", 1080, None),
        ("socks5://proxy:1080", b"socks5", b"proxy", 1080, None),
        ("socks5h://user:secret@proxy:1080", b"socks5h", b"proxy", 1080, (b"user", b"secret")),
    ],
)
def test_a_value_is_a_proxys_url(
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    scheme: bytes,
    host: bytes,
    port: int | None,
    auth: tuple[bytes, bytes] | None,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", value)
    proxy = proxy_from_environment("https://example.com")
    assert proxy is not None
    assert (proxy.url.scheme, proxy.url.host, proxy.url.port) == (scheme, host, port)
    assert proxy.auth == auth


@pytest.mark.parametrize(
    "value",
    [
        "ftp://user:secret@proxy",
        "socks://user:secret@proxy:1080",
        "socks6://user:secret@proxy:1080",
        "ws://user:secret@proxy",
        "://user:secret@proxy",
        "//user:secret@proxy",
        "http:/user:secret@proxy",
        "http://user:80/secret@proxy",
        "http://user:80?secret@proxy",
        "http://proxy/secret",
        "http://",
        "http:///secret",
        "http://user:secret@",
        "user:secret@:3128",
        "http://user:secret",
        "http://user:secret@proxy:port",
        "http://user:secret@proxy:0",
        "http://user:secret@proxy:65536",
        "http://user:secret@[::1",
        "http://user:secret@::1",
        "http://user:secret@pro xy",
        "http://user:sec ret@proxy",
        "http://user:secret/more@proxy",
        "http://us\u00e9r:secret@proxy",
        "http://us\u00e9r:/secret@proxy",
        "http://secret\u2100/@proxy",
        "http://user:secret@b\u00fc..de",
        "\udcffsecret",
    ],
)
@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://example.com", "http_proxy"),
        ("http://example.com", "HTTP_PROXY"),
        ("wss://example.com", "HTTPS_PROXY"),
        ("https://example.com", "all_proxy"),
        ("http://example.com", "ALL_PROXY"),
    ],
)
def test_another_value_is_an_error_that_names_the_variable_and_shows_no_credentials(
    monkeypatch: pytest.MonkeyPatch, value: str, url: str, name: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=rf"variable {name} must be .*HOST\[:PORT\].* scheme http, "
    ) as caught:
        proxy_from_environment(url)
    assert "sec" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_a_value_that_is_not_used_is_not_looked_at() -> None:
    bad = "ftp://proxy"
    assert _host_of_proxy("http://example.com", {"http_proxy": "http://proxy", "all_proxy": bad}) == "proxy"
    assert _host_of_proxy("http://example.com", {"https_proxy": bad}) is None
    assert _host_of_proxy("http://example.com", {"http_proxy": bad, "no_proxy": "example.com"}) is None


# Which hosts are exempt.


@pytest.mark.parametrize(
    ("environ", "direct"),
    [
        ({"no_proxy": "example.com"}, True),
        ({"NO_PROXY": "example.com"}, True),
        ({"no_proxy": "other.example", "NO_PROXY": "example.com"}, False),
        ({"no_proxy": "", "NO_PROXY": "example.com"}, False),
        ({"no_proxy": "example.com", "NO_PROXY": ""}, True),
        ({"NO_PROXY": "example.com", "REQUEST_METHOD": "GET"}, True),
    ],
)
@pytest.mark.parametrize("name", ["http_proxy", "ALL_PROXY"])
def test_no_proxy_exempts_from_every_variable(environ: dict[str, str], direct: bool, name: str) -> None:
    assert (_host_of_proxy("http://example.com", {name: "proxy", **environ}) is None) is direct


# Entries of NO_PROXY, the URLs that they exempt, and URLs that they do not; the scheme `http` is left out.
EXEMPTIONS = [
    # The list.
    ("", "", "example.com"),
    (" , ,", "", "example.com"),
    ("a.example,example.com", "example.com", ""),
    ("a.example, example.com ,b.example", "example.com", ""),
    ("a.example example.com", "example.com", ""),
    ("a.example\t\n,,example.com,", "example.com", ""),
    ("a.example;example.com", "", "example.com"),
    # All hosts.
    ("*", "example.com https://[2001:db8::1]:8443", ""),
    (" * ", "example.com", ""),
    ("a.example,*", "example.com", ""),
    ("*.", "", "example.com"),
    ("*:80", "", "example.com"),
    ("**", "", "example.com"),
    # Names.
    (
        "example.com",
        "example.com www.example.com a.b.c.example.com example.com.",
        "badexample.com example.com.other example.org com",
    ),
    ("www.example.com", "", "example.com"),
    ("com", "example.com", ""),
    (".example.com", "example.com www.example.com", "badexample.com"),
    ("*.example.com", "example.com www.example.com", "badexample.com"),
    ("*example.com", "", "badexample.com www.example.com"),
    ("www.*.com", "", "www.example.com"),
    ("..example.com", "", "www.example.com"),
    ("EXAMPLE.com", "www.example.COM", ""),
    ("example.com.", "example.com www.example.com.", ""),
    ("example.com..", "", "example.com"),
    ("localhost", "localhost", ""),
    ("other.example", "", "localhost 127.0.0.1"),
    ("127.0.0.1", "", "localhost"),
    ("http://example.com", "", "example.com"),
    ("example.com/", "", "example.com"),
    ("example.com/8", "", "example.com"),
    (".", "", "example.com /path"),
    (",", "", "/path"),
    # Names other than ASCII.
    ("b\u00fccher.example", "b\u00fccher.example", "bucher.example"),
    ("B\u00dcCHER.example", "xn--bcher-kva.example", ""),
    ("xn--BCHER-kva.example", "b\u00fccher.example", ""),
    (".b\u00fccher.example", "www.b\u00fccher.example", ""),
    ("*.b\u00fccher.example.:80", "www.b\u00fccher.example", ""),
    ("\u00fc..example", "", "example"),
    ("b\u00fccher_.example", "", "example"),
    # Ports.
    ("example.com:80", "example.com ws://example.com", "example.com:8080"),
    ("example.com:443", "https://www.example.com wss://www.example.com", "example.com"),
    ("example.com:8080", "example.com:8080", "example.com"),
    ("example.com:08080", "example.com:8080", ""),
    ("example.com", "example.com:8080", ""),
    (".example.com:8080", "www.example.com:8080", ""),
    ("example.com.:8080", "example.com:8080", ""),
    ("example.com:", "", "example.com"),
    ("example.com:http", "", "example.com"),
    ("example.com:080080", "", "example.com:80"),
    ("example.com:" + 5000 * "8", "", "example.com"),
    ("example.com:\u0668\u0660", "", "example.com"),
    (":80", "", "example.com :80"),
    # IPv4 addresses.
    ("127.0.0.1", "127.0.0.1 127.0.0.1:8080 127.0.0.1.", "127.0.0.2 www.127.0.0.1.example"),
    ("127.0.0.1.", "127.0.0.1", ""),
    ("127.0.0.1:80", "127.0.0.1", "https://127.0.0.1"),
    ("0.0.1", "", "127.0.0.1"),
    ("1", "", "127.0.0.1"),
    ("*.0.0.1", "", "127.0.0.1"),
    (".127.0.0.1", "", "127.0.0.1"),
    ("example.com", "", "127.0.0.1"),
    # IPv6 addresses.
    ("::1", "[::1]", "[::2]"),
    ("[::1]", "[::1] [::1]:8080", ""),
    ("0:0:0:0:0:0:0:1", "[::1]", ""),
    ("2001:DB8::A", "[2001:db8:0::a]", ""),
    ("[::1]:8080", "[::1]:8080", "[::1]"),
    ("[::1]:80", "[::1]", ""),
    ("::1:80", "[::1:80]", "[::1]"),
    ("fe80::1", "[fe80::1%25eth0]", ""),
    ("fe80::1%eth0", "[fe80::1%25eth0]", ""),
    ("[fe80::1%25eth0]:80", "[fe80::1]", ""),
    ("fe80::2", "", "[fe80::1%25eth0]"),
    ("eth0", "", "[fe80::1%25eth0]"),
    ("fe80::1%eth1", "[fe80::1%25eth0]", ""),
    ("fe80::2%eth0", "", "[fe80::1%25eth0]"),
    ("[::1", "", "[::2]"),
    # Networks.
    ("10.0.0.0/8", "10.1.2.3", "11.0.0.0"),
    ("10.1.2.3/8", "10.255.0.1", ""),
    ("10.1.2.3/32", "10.1.2.3", "10.1.2.2"),
    ("0.0.0.0/0", "192.0.2.1", "[::1] example.com"),
    ("10.0.0.0/33", "", "10.0.0.0"),
    ("10.0.0.0/", "", "10.0.0.0"),
    ("10/8", "", "10.0.0.0"),
    ("fd00::/8", "[fd12:3456::1]", "[fe80::1]"),
    ("fd00::1/8", "[fd12::]", ""),
    ("[fd00::]/8", "[fd12:3456::1]", ""),
    ("fe80::/10", "[fe80::1%25eth0]", ""),
    ("fe80::%eth1/10", "[fe80::1%25eth0]", ""),
    ("fe80::1%eth1/128", "[fe80::1%25eth0]:8080", ""),
    ("::/0", "[::1]", "127.0.0.1"),
    ("::/129", "", "[::]"),
]


@pytest.mark.parametrize(
    ("no_proxy", "url", "direct"),
    [
        (no_proxy, url if "://" in url else f"http://{url}", direct)
        for no_proxy, exempt, others in EXEMPTIONS
        for urls, direct in ((exempt, True), (others, False))
        for url in urls.split()
    ],
)
def test_no_proxy_lists_the_hosts_that_are_reached_directly(no_proxy: str, url: str, direct: bool) -> None:
    assert _is_direct(url, no_proxy) is direct
    assert _is_direct(URL(url), no_proxy) is direct


@SETTINGS
@hypothesis.given(NAMES, st.sampled_from(["", ".", "*."]), st.sampled_from(["", "."]), st.booleans())
def test_a_name_is_exempted_by_itself_and_by_every_domain_above_it(
    name: str, prefix: str, suffix: str, upper: bool
) -> None:
    labels = name.split(".")
    for start in range(len(labels)):
        entry = prefix + ".".join(labels[start:]) + suffix
        assert _is_direct(f"http://{name}", f"other.example,{entry.upper() if upper else entry}")


@SETTINGS
@hypothesis.given(NAMES, NAMES)
def test_a_name_is_exempted_by_nothing_else(name: str, entry: str) -> None:
    labels = name.split(".")
    above = {".".join(labels[start:]) for start in range(len(labels))}
    assert _is_direct(f"http://{name}", entry) is (entry in above)
    assert not _is_direct(f"http://x{name}", name)
    assert not _is_direct(f"http://{name}", f"x{name}")
    assert not _is_direct(f"http://{name}", f"x.{name}")


@SETTINGS
@hypothesis.given(st.data(), st.sampled_from([(4, 32), (6, 128)]))
def test_networks_agree_with_ipaddress(data: st.DataObject, version: tuple[int, int]) -> None:
    number, bits = version
    address = data.draw(st.ip_addresses(v=4) if number == 4 else st.ip_addresses(v=6))
    base = data.draw(st.ip_addresses(v=4) if number == 4 else st.ip_addresses(v=6))
    length = data.draw(st.integers(0, bits))
    network = ipaddress.ip_network(f"{base}/{length}", strict=False)
    url = URL(scheme="http", host=str(address))
    assert _is_direct(url, f"{base}/{length}") is (address in network)
    assert _is_direct(url, f"{address}/{length}")
    assert _is_direct(url, address.exploded)


@SETTINGS
@hypothesis.given(
    st.one_of(
        st.text(st.sampled_from("aA1.:*[]/%,_- \u00fc\u3002\udc80"), max_size=20),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
        st.binary().map(lambda raw: os.fsdecode(raw.replace(b"\0", b""))),
    ),
    st.sampled_from(["http://example.com", "http://127.0.0.1", "https://[fe80::1%25eth0]:8443", "http:///"]),
)
def test_no_text_in_no_proxy_raises(no_proxy: str, url: str) -> None:
    assert _is_direct(url, no_proxy) in (True, False)
    assert _is_direct(url, f"{no_proxy},*")
