"""serving/images.py: what a client may send as a picture, and each way to make the server read something else."""

import base64
import contextlib
import io
import random
import socket
import ssl
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trustme
from PIL import Image

from serving import images
from serving.images import Limits, decode, fetch, is_public, read

REMOTE = Limits(remote=True, seconds=2, body=100_000)


def png(size=(84, 56), colour="red", **kwargs):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG", **kwargs)
    return buffer.getvalue()


def uri(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_a_data_uri_is_read_and_decoded_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode(read(uri(png()), Limits()), Limits()).size == (84, 56)
    assert decode(png(exif=exif), Limits()).size == (56, 84)
    assert read("data:,a%20b", Limits()) == b"a b"
    assert read(uri(png()).replace("data:", "DATA:", 1), Limits()) == png()


@pytest.mark.parametrize("limits", [Limits(), REMOTE])
def test_no_path_is_ever_read(tmp_path, limits):
    file = tmp_path / "secret.png"
    file.write_bytes(png())
    names = [str(file), f"file://{file}", f"FILE://{file}", f" file://{file}", f"file:{file}", "secret.png", "~/x.png"]
    names += [f"ftp://localhost{file}", "gopher://x/", "jar:file:///x!/y", "\\\\host\\x.png", "", "/etc/passwd"]
    for name in names:
        with pytest.raises(ValueError, match=r"^image: expected a data URI"):
            read(name, limits)
    with pytest.raises(ValueError, match=r"^image: "):
        read("data", limits)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        png()[:60],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"P5 4 4 255 " + b"0" * 16,
    ],
    ids=["empty", "text", "cut", "eps", "svg", "pgm"],
)
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(ValueError, match=r"^image"):
        decode(data, Limits())


def bomb(width, height):
    """A PNG that claims so many pixels and holds none of them."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9000, 9000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(size):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="pixels"):
        decode(bomb(*size), Limits())
    assert time.perf_counter() - start < 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", images.FORMATS)
def test_a_broken_picture_is_a_value_error_whatever_pil_makes_of_it(kind):
    buffer, draw = io.BytesIO(), random.Random(0)
    Image.effect_noise((40, 30), 50).convert("RGB").save(buffer, kind)
    for _ in range(100):
        data = bytearray(buffer.getvalue())
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(min(len(data), 200))] = draw.randrange(256)
        with contextlib.suppress(ValueError):
            decode(bytes(data[: draw.choice([None, len(data) // 2])]), Limits())


# ---- remote pictures


@contextlib.contextmanager
def web(answer, certificate=None):
    """A server on loopback that answers each path by `answer(handler)`; yields (address, paths that were asked).
    certificate: trustme's, for https."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            with contextlib.suppress(OSError):
                answer(self)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(context)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def reply(handler, status, body=b"", **headers):
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def loopback_is_public(monkeypatch):
    """127.0.0.1 counts as public, everything else as it is."""
    monkeypatch.setattr(images, "is_public", lambda ip, real=is_public: ip == "127.0.0.1" or real(ip))


PRIVATE = [
    "127.0.0.1",
    "127.1.2.3",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
]
PRIVATE += ["224.0.0.1", "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00::1", "ff02::1"]
PRIVATE += ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::"]
PRIVATE += ["2002:a00:1::", "2001:0:7f00:1::", "2001:db8::1"]

HOSTS = ["127.0.0.1", "localhost", "0", "0.0.0.0", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "[::1]"]
HOSTS += ["[::ffff:127.0.0.1]", "user:pass@93.184.216.34", "ⓛocalhost", "169.254.169.254"]
TARGETS = ["http://127.0.0.2:{port}/x", "//127.0.0.2:{port}/x", "http://localhost:{port}/x", "file:///etc/passwd"]
TARGETS += ["http://[::1]:{port}/x", "ftp://127.0.0.1:{port}/x", "http://127.0.0.1:{port}/"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_told_apart(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"])
def test_public_addresses_are_told_apart(address):
    assert is_public(address)


@pytest.mark.parametrize("host", HOSTS)
def test_no_connection_is_made_to_a_private_host(host, monkeypatch):
    made = []
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: made.append(args))
    with pytest.raises(ValueError, match=r"^image: no picture could be had"):
        read(f"http://{host}:80/x.png", REMOTE)
    assert not made


def test_remote_pictures_are_off_by_default():
    with web(lambda handler: reply(handler, 200, png())) as (address, asked):
        with pytest.raises(ValueError, match="addresses are not fetched"):
            read(f"{address}/a.png", Limits())
        assert not asked


def test_a_remote_picture_is_fetched_through_redirects(loopback_is_public):
    def answer(handler):
        if handler.path.startswith("/first"):
            reply(handler, 302, Location="second.png?a=b%20c")
        else:
            assert handler.headers["Host"].startswith("127.0.0.1:")
            reply(handler, 200, png())

    with web(answer) as (address, asked):
        assert read(f"{address}/first é.png#part", REMOTE) == png()
        assert asked == ["/first%20%C3%A9.png", "/second.png?a=b%20c"]


def test_over_https_the_name_in_the_address_must_be_the_certificates(loopback_is_public, monkeypatch, tmp_path):
    real, ours = socket.getaddrinfo, trustme.CA()
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *a, **k: real("127.0.0.1", *a, **k))
    ours.cert_pem.write_to_path(tmp_path / "ca.pem")

    def fetched(authority, *names):
        with web(lambda handler: reply(handler, 200, png()), authority.issue_cert(*names)) as (address, asked):
            try:
                return read(address.replace("127.0.0.1", "pictures.example"), REMOTE) == png()
            except ValueError:
                assert not asked
                raise

    with pytest.raises(ValueError, match="no picture"):
        fetched(ours, "pictures.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert fetched(ours, "pictures.example")
    for authority, name in ((ours, "127.0.0.1"), (ours, "other.example"), (trustme.CA(), "pictures.example")):
        with pytest.raises(ValueError, match="no picture"):
            fetched(authority, name)


@pytest.mark.parametrize("target", TARGETS)
def test_each_redirect_is_checked(loopback_is_public, monkeypatch, target):
    """To what is private, to another scheme, and round in circles."""
    monkeypatch.setattr(images, "is_public", lambda ip: ip == "127.0.0.1")
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.2" if host == "localhost" else host, *a, **k)
    )
    with (
        web(lambda handler: reply(handler, 302, Location=target.format(port=handler.server.server_port))) as (
            at,
            asked,
        ),
        pytest.raises(ValueError, match="no picture"),
    ):
        fetch(f"{at}/", REMOTE)
    assert set(asked) == {"/"}
    assert len(asked) <= images.REDIRECTS + 1


def test_a_name_is_looked_up_once_and_its_address_is_the_one_that_is_used(monkeypatch):
    """DNS rebinding: the second answer would be loopback."""
    answers, made = iter(["93.184.216.34", "127.0.0.1"]), []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **k: [(0, 0, 0, "", (next(answers), port))])

    def connect(address, timeout):
        made.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ValueError, match="no picture"):
        fetch("http://rebinding.example/x.png", REMOTE)
    assert made == [("93.184.216.34", 80)]


def test_a_name_with_one_private_address_is_refused(monkeypatch):
    both = [(0, 0, 0, "", (ip, 80)) for ip in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: both)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("connected"))
    with pytest.raises(ValueError, match="no picture"):
        fetch("http://both.example/x.png", REMOTE)


def drip(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"X")
        time.sleep(0.1)


def drip_body(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + png()[:20])
    while True:
        handler.wfile.write(b"X")
        time.sleep(0.1)


def endless(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    while True:
        handler.wfile.write(b"X" * 65536)


@pytest.mark.parametrize(
    "answer",
    [
        lambda handler: reply(handler, 404, png()),
        lambda handler: reply(handler, 200, png(), **{"Content-Length": "500000"}),
        lambda handler: reply(handler, 302),
        endless,
        lambda handler: handler.wfile.write(b"220 ssh\r\n"),
    ],
    ids=["404", "longer", "nowhere", "endless", "other protocol"],
)
def test_what_a_remote_server_may_not_do(loopback_is_public, answer):
    with web(answer) as (address, _), pytest.raises(ValueError, match="no picture"):
        fetch(address, REMOTE)


@pytest.mark.parametrize("answer", [drip, drip_body], ids=["headers", "body"])
def test_a_slow_remote_server_is_cut_off(loopback_is_public, answer):
    start = time.perf_counter()
    with web(answer) as (address, _), pytest.raises(ValueError, match=r"^image: "):
        decode(fetch(address, Limits(remote=True, seconds=0.5)), Limits())
    assert time.perf_counter() - start < 2


def test_no_proxy_of_the_environment_is_used(loopback_is_public, monkeypatch):
    with web(lambda handler: reply(handler, 200, png())) as (proxy, asked):
        monkeypatch.setenv("http_proxy", proxy)
        with web(lambda handler: reply(handler, 200, png())) as (address, asked_itself):
            assert fetch(f"{address}/x", REMOTE) == png()
    assert (asked, asked_itself) == ([], ["/x"])
