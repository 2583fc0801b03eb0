# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Pictures that clients send: data URIs, uploads and, where they are allowed, http(s) addresses. No path is opened."""

import base64
import http.client
import io
import ipaddress
import socket
import ssl
import string
import threading
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

from PIL import Image

from image_processing import load_image

# What PIL may try: no PostScript, which starts a program, and nothing rare
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
REDIRECTS = 3
NO_PICTURE = "image: no picture could be had from that address."  # for whatever reason: it would tell of our network


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. body: bytes of it, and of a remote picture. pixels: of a picture, before it is
    decoded. images, queries, choices: their numbers. text: characters. tokens: of an answer. seconds: that a client or
    a remote server may take to send what it sends. remote: whether http(s) addresses are fetched."""

    body: int = 20 * 2**20
    pixels: int = 64_000_000
    images: int = 8
    queries: int = 64
    choices: int = 8
    text: int = 100_000
    tokens: int = 2048
    seconds: float = 30.0
    remote: bool = False


def read(source: str, limits: Limits) -> bytes:
    """The bytes that a client's `url` stands for.

    Raises:
        ValueError: neither a data URI nor, where they are allowed, an http(s) address that gives a picture.
    """
    scheme, _, rest = source.partition(":")
    if scheme.lower() == "data":
        head, comma, payload = rest.partition(",")
        if not comma:
            raise ValueError("image: its data URI has no comma; expected data:image/png;base64,….")
        return base64.b64decode(payload + "==") if head.endswith(";base64") else unquote_to_bytes(payload)
    if scheme.lower() in ("http", "https") and limits.remote:
        return fetch(source, limits)
    remote = " or an http(s) address" if limits.remote else "; addresses are not fetched by this server"
    raise ValueError(f"image: expected a data URI{remote}.")


def decode(data: bytes, limits: Limits) -> Image.Image:
    """An RGB picture, turned as its EXIF orientation says; its size is looked at before it is decoded.

    Raises:
        ValueError: not a picture in one of `FORMATS`, broken, or larger than allowed.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > limits.pixels:
                raise ValueError(f"image: {image.width}×{image.height} pixels; expected at most {limits.pixels}.")
            return load_image(image, upright=True, copy=False)
    except Image.UnidentifiedImageError:
        raise ValueError(f"image: not a picture that can be read; expected {', '.join(FORMATS)}.") from None
    except ValueError:
        raise
    except Exception as error:  # the bomb limit's, and whatever a broken file leads PIL's plugins to
        raise ValueError(f"image: cannot be read ({error}).") from error


def fetch(url: str, limits: Limits) -> bytes:
    """What an address gives, each hop of it within `limits.seconds`.

    Every address that a hop's name has must be public, and the connection goes to the one that was looked at: no
    proxy, no second look-up.

    Raises:
        ValueError: `NO_PICTURE`, whatever the reason.
    """
    try:
        for _ in range(REDIRECTS + 1):
            status, answer = _get(url, limits)
            if status == 200:
                return answer
            url = urljoin(url, answer.decode("latin-1"))
    except (OSError, ValueError, http.client.HTTPException):
        pass
    raise ValueError(NO_PICTURE)


def _get(url: str, limits: Limits) -> tuple[int, bytes]:
    """200 and the body, or another status and where it redirects to."""
    parts = urlsplit(url)
    host = (parts.hostname or "").encode("idna").decode()
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise ValueError(NO_PICTURE)
    address = public_address(host, parts.port or (443 if parts.scheme == "https" else 80))
    sock = socket.create_connection(address, limits.seconds)

    def give_up() -> None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    # for all of it: a server that sends a byte now and then is cut off as well
    deadline = threading.Timer(limits.seconds, give_up)
    deadline.daemon = True
    deadline.start()
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
            sock.do_handshake()
        connection = http.client.HTTPConnection(host, parts.port)
        connection.sock = sock
        target = quote(parts._replace(scheme="", netloc="", fragment="").geturl() or "/", safe=string.punctuation)
        connection.request("GET", target, headers={"User-Agent": "LocateAnything-batched"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            return response.status, response.headers.get("location", "").encode("latin-1")
        body = response.read(limits.body + 1)
        if response.status != 200 or response.length or len(body) > limits.body:
            raise ValueError(NO_PICTURE)
        return 200, body
    finally:
        deadline.cancel()
        sock.close()


def public_address(host: str, port: int) -> tuple[str, int]:
    """The first address of a host, if every one of them is public.

    Raises:
        ValueError: one is not. OSError: the name is not known.
    """
    found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not found or not all(is_public(str(address)) for address in found):
        raise ValueError(NO_PICTURE)
    return str(found[0]), port


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, and none that a gateway maps to another."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        unicast = ip in ipaddress.ip_network("2000::/3")
        return unicast and ip.is_global and ip.sixtofour is None and ip.teredo is None
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)
