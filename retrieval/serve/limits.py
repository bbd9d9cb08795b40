"""What a request must keep to before the application sees it: its host, token, origin and body. And the headers of every answer.

Plain ASGI, so that a refused body is never read."""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Collection
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "qf_token"
OPEN_PATHS = ("/healthz",)  # answered without a token
BODY_SECONDS = 20.0  # in which a whole body must have arrived
READING = ("GET", "HEAD", "OPTIONS")
POLICY = (
    "default-src 'none'; img-src 'self' blob:; style-src 'self'; script-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
PICTURE_POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'none'"  # a browser styles its page
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def is_same(given: str, secret: str) -> bool:
    """Whether two secrets are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(errors="replace"), secret.encode(errors="replace"))


@dataclass(frozen=True)
class Door:
    """Who may come in. The token is compared in constant time; a browser is given a cookie that does not hold it.

    hosts: the names that a request may be addressed to, against DNS rebinding; any if empty."""

    token: str | None = None
    hosts: Collection[str] = ()

    @property
    def cookie(self) -> str:
        """The value of the cookie."""
        return hmac.new((self.token or "").encode(errors="replace"), b"qf serve", hashlib.sha256).hexdigest()

    def refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that may not come in, or that brings the token in its address. None lets it in."""
        headers = Headers(scope=scope)
        if self.hosts and _host(headers.get("host", "")) not in self.hosts:
            return problem(400, "this server is not called that; use the address that it printed")
        if scope["method"] not in READING and not _is_own(headers):
            return problem(403, "the request comes from another site")
        if self.token is None or scope["path"] in OPEN_PATHS:
            return None
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in pairs if name == "token"]
        if given and is_same(given[0], self.token) and scope["method"] in READING:
            rest = urlencode([(name, value) for name, value in pairs if name != "token"])
            path = "/" + scope["path"].lstrip("/")  # two slashes would name another host
            answer = RedirectResponse(path + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(COOKIE, self.cookie, httponly=True, samesite="strict")
            return answer
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and is_same(bearer.strip(), self.token):
            return None
        if is_same(_cookie(headers.get("cookie", "")), self.cookie):
            return None
        return problem(
            401, "give the token: ?token=… in the address, or a bearer header", {"WWW-Authenticate": "Bearer"}
        )


def _host(header: str) -> str | None:
    """The name or number in a Host header, without the port. None if there is none."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


def _is_own(headers: Headers) -> bool:
    """Whether a writing request comes from our own page, or from no page at all."""
    if (site := headers.get("sec-fetch-site")) is not None:  # browsers send it to this machine, and over HTTPS
        return site in ("none", "same-origin")
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2] == headers.get("host")


def _cookie(header: str) -> str:
    """The value of our cookie, empty if there is none."""
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def problem(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    """An error as FastAPI writes it."""
    return JSONResponse({"detail": text}, status, headers)


class Limits:
    """The application behind a door, with bodies of at most `max_bytes`, and our headers on every answer."""

    def __init__(self, app: ASGIApp, door: Door, max_bytes: int, body_seconds: float = BODY_SECONDS) -> None:
        self.app, self.door, self.max_bytes, self.body_seconds = app, door, max_bytes, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        has_body = "transfer-encoding" in headers or length != "0"

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answer.setdefault(name, value)
                if has_body and (scope["method"] in READING or message["status"] >= 400):
                    answer["Connection"] = "close"  # the rest of the body is not read
            await send(message)

        refusal = self.door.refusal(scope)
        if refusal is None and length.isdecimal() and int(length[:20]) > self.max_bytes:
            refusal = problem(413, f"the body has {length[:20]} bytes, the limit is {self.max_bytes}")
        await (refusal or self.app)(scope, self._counted(receive), send_with_headers)

    def _counted(self, receive: Receive) -> Receive:
        """`receive`, which raises an HTTPException once the body is too large or too slow."""
        count, more, began = 0, True, time.monotonic()

        async def counted() -> Message:
            nonlocal count, more
            if not more:
                return await receive()
            left = began + self.body_seconds - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.001))
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {self.body_seconds:g} seconds") from None
            count += len(message.get("body", b""))
            more = message.get("more_body", False)
            if count > self.max_bytes:
                raise HTTPException(413, f"the body is longer than {self.max_bytes} bytes")
            return message

        return counted
