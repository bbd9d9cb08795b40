"""Requests that mean no good: each is answered 4xx or 503, and the server goes on answering others."""

import io
import os
import resource
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import draw  # isort: skip


def png(size=(64, 48)) -> bytes:
    data = io.BytesIO()
    draw("green", "pole", size).save(data, "PNG")
    return data.getvalue()


def bomb(side: int) -> bytes:
    """A valid PNG of side x side black pixels, some kilobytes long."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side // 8 + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def is_up(live) -> bool:
    answer = httpx.get(f"{live.url}/api/search", params={"q": "a red bar", "k": 3}, timeout=60)
    return answer.status_code == 200 and len(answer.json()["hits"]) == 3


def many(live) -> dict:
    """Options of a client that opens as many connections as it is asked for."""
    return {"base_url": live.url, "timeout": 120, "limits": httpx.Limits(max_connections=None)}


def raw(live, data: bytes, more=(), timeout=10.0) -> bytes:
    """The answer to bytes on a bare socket; `more` pieces follow while the server takes them."""
    got = b""
    with socket.create_connection(("127.0.0.1", live.port), timeout=timeout) as connection:
        try:
            connection.sendall(data)
            for piece in more:
                connection.sendall(piece)
        except OSError:
            got = b""  # it was closed, and its answer may still be there
        try:
            while part := connection.recv(65536):
                got += part
        except ConnectionResetError:
            return got
    return got


@pytest.mark.parametrize(
    "path",
    [
        "/images/../../etc/passwd",
        "/images/..%2f..%2fetc%2fpasswd",
        "/images/%2e%2e/%2e%2e/etc/passwd",
        "/static/../app.py",
        "/static/%2e%2e%2fapp.py",
        "/static//etc/passwd",
        "/static/....//app.py",
        "/uploads/../../etc/passwd",
        "/uploads/upload:..%2f..%2fetc%2fpasswd",
        "/explain/../../etc/passwd?q=a",
        "//etc/passwd",
        "/images/0%00.png",
    ],
)
def test_no_path_leads_out(live, path):
    status = int(raw(live, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()).split()[1])
    assert 400 <= status < 500
    assert is_up(live)


@pytest.mark.parametrize("side", [2000, 20_000])
def test_a_bomb_is_refused_by_its_header(live, side):
    data = bomb(side)
    assert len(data) < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for address in ("/api/pictures", "/api/similar"):
        answer = httpx.post(live.url + address, content=data, timeout=60)
        assert answer.status_code == 400
        assert "pixels, the limit is 1,000,000" in answer.json()["detail"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KB; the larger has 400 million pixels
    assert is_up(live)


@pytest.mark.parametrize(
    "data",
    [b"", b"no picture", png()[:-40], png()[:20], b"GIF89a", b"\xff\xd8\xff", b"%!PS-Adobe-3.0\nshowpage", b"<svg/>"],
)
def test_what_is_no_picture_is_refused(live, data):
    assert httpx.post(f"{live.url}/api/pictures", content=data, timeout=60).status_code == 400
    assert is_up(live)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 400), st.binary(min_size=1, max_size=20))
def test_a_damaged_picture_is_a_picture_or_refused(live, place, damage):
    data = png()
    place %= len(data)
    answer = httpx.post(
        f"{live.url}/api/pictures", content=data[:place] + damage + data[place + len(damage) :], timeout=60
    )
    assert answer.status_code in (200, 400)


def test_a_body_that_says_it_is_too_large_is_not_read(live):
    head = b"POST /api/pictures HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999\r\n\r\n"
    assert b" 413 " in raw(live, head).split(b"\r\n")[0]
    for wrong in (b"-5", b"1e9", b"1, 2", b"9" * 5000):
        status = raw(live, head.replace(b"99999999999", wrong)).split(b"\r\n")[0]
        assert b" 400 " in status or b" 413 " in status
    assert is_up(live)


def test_an_endless_body_is_cut_off(live):
    head = b"POST /api/pictures HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"10000\r\n" + bytes(65536) + b"\r\n"
    sent = 0

    def endless():
        nonlocal sent
        while sent < 400:
            sent += 1
            yield piece

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert b" 413 " in raw(live, head, endless()).split(b"\r\n")[0] + b" 413 " * (sent < 400)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000
    assert is_up(live)


def test_a_body_where_none_belongs_ends_the_connection(live):
    head = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert b" 200 " in raw(live, head).split(b"\r\n")[0]  # recv ends: the server has closed
    assert is_up(live)


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n\r\n",
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz",
        b"POST /api/pictures HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /api/pictures HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /?q=%ff%fe%00&plus=%ed%a0%80 HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\n\r\n",
    ],
)
def test_malformed_requests_are_answered_or_closed(live, data):
    answer = raw(live, data)
    assert not answer or answer.startswith(b"HTTP/1.1 4") or b" 200 " in answer.split(b"\r\n")[0]
    assert b"Traceback" not in answer
    assert is_up(live)


def test_slow_clients_are_closed_and_others_are_served(live):
    slow = []
    for n in range(100):
        connection = socket.create_connection(("127.0.0.1", live.port), timeout=20)
        head = b"POST /api/pictures HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\nx"
        connection.sendall(b"" if n % 3 == 0 else b"GET / HT" if n % 3 == 1 else head)
        slow.append(connection)
    assert is_up(live)
    for n, connection in enumerate(slow):
        answer = connection.recv(65536)  # ends when the server closes
        assert answer == b"" if n % 3 < 2 else answer.startswith((b"HTTP/1.1 408", b"HTTP/1.1 503"))
        connection.close()
    assert is_up(live)


def test_a_client_that_drips_is_closed(live):
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as connection:
        end, closed = time.monotonic() + 15, False
        while time.monotonic() < end and not closed:
            try:
                connection.sendall(b"G")
                time.sleep(0.1)
            except OSError:
                closed = True
        assert closed
    assert is_up(live)


def test_200_clients_at_once_are_answered_or_told_to_come_back(live):
    def ask(n):
        answer = client.get("/api/search", params={"q": f"a red bar {n}", "k": 3})
        return answer.status_code, answer.headers.get("retry-after")

    with httpx.Client(**many(live)) as client, ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(400)))
    assert {status for status, _ in answers} <= {200, 503}
    assert sum(status == 200 for status, _ in answers) >= 8
    assert all((status == 503) == (after == "1") for status, after in answers)
    assert is_up(live)


def test_many_uploads_at_once_do_not_fill_the_memory(live):
    data = png((600, 400))

    def send(n):
        return client.post("/api/pictures", content=data).status_code

    with httpx.Client(**many(live)) as client, ThreadPoolExecutor(60) as pool:
        statuses = set(pool.map(send, range(120)))
    assert statuses <= {200, 503}
    assert is_up(live)


def test_clients_that_go_away_leave_nothing_behind(live):
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(100):
        with socket.create_connection(("127.0.0.1", live.port)) as connection:
            connection.sendall(b"GET /api/search?q=a HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    end = time.monotonic() + 20
    while len(os.listdir("/proc/self/fd")) > before + 5 and time.monotonic() < end:
        time.sleep(0.1)
    assert len(os.listdir("/proc/self/fd")) <= before + 5
    assert threading.active_count() <= threads + 2
    assert is_up(live)
