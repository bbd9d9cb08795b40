"""The application: the page, the API, pictures and metrics."""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jinja2
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, Response
from starlette.types import ASGIApp

from ...pipeline.errors import ArtifactError, EncoderError, QfError
from ...pipeline.images import UnreadableImage
from .answers import (
    A_PAGE,
    MOST_HITS,
    Answer,
    Card,
    Chip,
    Health,
    Problem,
    Question,
    Uploaded,
    Words,
    address,
    cards,
    chips,
    first_cards,
    found,
    is_one_text,
)
from .collection import UPLOAD, Asked, Collection, Gone, Listener, Opened, Upload
from .limits import PICTURE_POLICY, Door, Limits, problem
from .metrics import Measured, Metrics
from .pool import Busy, Pool

PAGE = Path(__file__).parent / "page"
STATIC = {"style.css": "text/css", "app.js": "text/javascript", "icon.svg": "image/svg+xml"}
FIRST_CARDS = 40
UPLOADS_AT_ONCE = 4  # bodies in memory
PICTURES_AT_ONCE = 1024  # that wait to be read
POLL_SECONDS = 1.0
FOR_EVER = "private, max-age=31536000, immutable"
BUSY = "the server has too much to do; try again in a second"
T = TypeVar("T")

log = logging.getLogger(__name__)
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The question cannot be answered."},
    401: {"model": Problem, "description": "The token is missing."},
    410: {"model": Problem, "description": "The picture is not kept any more, or the index was rebuilt."},
    503: {"model": Problem, "description": "Too much to do; see Retry-After."},
}
BODY_ERRORS = ERRORS | {
    403: {"model": Problem, "description": "The request comes from another site."},
    408: {"model": Problem, "description": "The body came too slowly."},
    413: {"model": Problem, "description": "The body is too large."},
}
A_PICTURE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The bytes of a picture.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def image_response(kind: str, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """An answer that is a picture, for OpenAPI."""
    return {status: {"content": {kind: {"schema": {"type": "string", "format": "binary"}}}}, 404: {"model": Problem}}


class Server:
    """A collection, the pools in which it is searched, and what is counted."""

    def __init__(self, collection: Collection, queue: int) -> None:
        self.collection = collection
        self.search, self.pictures = Pool("search", queue), Pool("pictures", PICTURES_AT_ONCE)
        self.uploading = 0
        self.metrics = Metrics()
        self.metrics.waiting.set_function(lambda: self.search.waiting)
        self.metrics.images.set_function(lambda: len(collection.opened))
        self.static = {name: (PAGE / name).read_bytes() for name in STATIC}
        loader = jinja2.FileSystemLoader(PAGE)
        self.template = jinja2.Environment(
            loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
        ).get_template("index.html")
        self.static_version = hashlib.sha256(b"".join(self.static.values())).hexdigest()[:12]

    @contextlib.asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """Take up rebuilt indexes until the server ends."""
        task = asyncio.create_task(self._watch())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        self.search.close()
        self.pictures.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                if await asyncio.to_thread(self.collection.refresh):
                    self.metrics.reloads.inc()
            except Exception:  # the old index is still served; the next round tries again
                log.exception("the rebuilt index is not taken up")

    async def answer(self, asked: Asked) -> Answer:
        """The hits of a question, as the API gives them."""
        opened, began = self.collection.opened, time.perf_counter()

        def work() -> Answer:
            with Listener() as heard:
                hits = [found(opened, hit) for hit in opened.find(asked, self.collection.uploads)]
            return Answer(hits=hits, warnings=heard, seconds=round(time.perf_counter() - began, 6))

        return await self.search.run(work)

    async def uploaded(self, request: Request) -> tuple[Opened, Upload]:
        """The picture in the body of a request. Busy if others upload; UnreadableImage if it is none."""
        if self.uploading >= UPLOADS_AT_ONCE:
            raise Busy
        self.uploading += 1
        try:
            data, opened = await request.body(), self.collection.opened
            return opened, await self.search.run(partial(opened.seen, data))
        finally:
            self.uploading -= 1

    async def picture(self, version: str, work: Callable[[Opened], T]) -> T:
        """Something of one image. HTTPException 410 for the image of another build of the index, 404 if there is none."""
        opened = self.collection.opened
        if version not in ("", opened.version):
            raise HTTPException(410, "the index was rebuilt; search again")
        try:
            return await self.pictures.run(partial(work, opened))
        except IndexError:
            raise HTTPException(404, "the index has no such image") from None

    async def page(self, asked: Asked) -> Response:
        """The page with the hits of a question, or with some pictures."""
        opened, began, status, error = self.collection.opened, time.perf_counter(), 200, ""
        alone = is_one_text(asked)
        # the page keeps the box ticked while chips are there, and searches without it
        searched = asked if alone and opened.matches else Asked(**vars(asked) | {"rerank": False})

        def work() -> tuple[list[Card], list[Chip], list[str]]:
            if asked.is_empty:
                return first_cards(opened, FIRST_CARDS), [], []
            with Listener() as heard:
                hits = opened.find(searched, self.collection.uploads)
            return cards(opened, asked, hits), chips(opened, asked), heard

        try:
            shown, others, warnings = await self.search.run(work)
        except (QfError, Busy) as problem_met:
            status, error = _status(problem_met), str(problem_met) or BUSY
            shown, others, warnings = [], chips(opened, asked), []
        text = self.template.render(
            asked=asked,
            chips=others,
            likely=[card for card in shown if card.likely],
            unlikely=[card for card in shown if not card.likely],
            error=error,
            warnings=warnings,
            splits=list(opened.splits),
            matches=opened.matches,
            alone=alone,
            total=len(opened),
            milliseconds=round(1000 * (time.perf_counter() - began)),
            further=address(Asked(**vars(asked) | {"k": min(MOST_HITS, asked.k + A_PAGE)}))
            if not asked.is_empty and len(shown) == asked.k < min(MOST_HITS, len(opened))
            else "",
            version=self.static_version,
        )
        return HTMLResponse(
            text, status, {"Cache-Control": "no-store"} | ({"Retry-After": "1"} if status == 503 else {})
        )


def _status(error: Exception) -> int:
    """The HTTP status of an error that qf understands."""
    if isinstance(error, Busy):
        return 503
    if isinstance(error, Gone):
        return 410
    return 500 if isinstance(error, EncoderError | ArtifactError) else 400


def make_app(collection: Collection, door: Door, max_bytes: int, queue: int) -> ASGIApp:
    """The application that serves a collection behind a door. At most `queue` searches wait; bodies have at most `max_bytes`."""
    server = Server(collection, queue)
    app = FastAPI(
        title="qf serve",
        summary="Search pictures by texts and pictures.",
        lifespan=server.running,
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
        openapi_url="/openapi.json",
    )

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        return problem(503, BUSY, {"Retry-After": "1"})

    @app.exception_handler(QfError)
    @app.exception_handler(UnreadableImage)
    async def refused(request: Request, error: Exception) -> Response:
        return problem(_status(error), str(error))

    @app.get("/", include_in_schema=False)
    async def page(question: Annotated[Question, Query()]) -> Response:
        return await server.page(question.asked())

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in STATIC:
            raise HTTPException(404, "no such file")
        return Response(server.static[name], media_type=STATIC[name], headers={"Cache-Control": FOR_EVER})

    @app.get("/favicon.ico", include_in_schema=False)  # browsers ask for it beside a picture that is opened by itself
    async def favicon() -> Response:
        return await static("icon.svg")

    @app.get("/api/search")
    async def search(question: Annotated[Question, Query()]) -> Answer:
        """The images that fit texts and pictures best."""
        return await server.answer(question.asked())

    @app.get("/api/similar")
    async def similar(
        key: Annotated[Words, Query(description="The key of an image of the index.")],
        k: Annotated[int, Query(ge=1, le=MOST_HITS)] = A_PAGE,
        split: Words = "",
    ) -> Answer:
        """The images most like one of the index. It is the first of them."""
        if collection.opened.searcher.row(key) is None:
            raise HTTPException(400, "the index has no image with that key")
        return await server.answer(Asked(plus=(key,), k=k, split=split))

    @app.post("/api/similar", openapi_extra=A_PICTURE, responses=BODY_ERRORS)
    async def similar_to_upload(
        request: Request, k: Annotated[int, Query(ge=1, le=MOST_HITS)] = A_PAGE, split: Words = ""
    ) -> Answer:
        """The images most like the picture in the body."""
        _, upload = await server.uploaded(request)
        return await server.answer(Asked(plus=(collection.uploads.add(upload),), k=k, split=split))

    @app.post("/api/pictures", openapi_extra=A_PICTURE, responses=BODY_ERRORS)
    async def upload(request: Request) -> Uploaded:
        """Keep the picture in the body for a while, under a name for `plus` and `minus`."""
        _, upload = await server.uploaded(request)
        name = collection.uploads.add(upload)
        return Uploaded(name=name, thumbnail=f"/uploads/{name}")

    @app.get("/uploads/{name}", responses=image_response("image/jpeg"), response_class=Response)
    async def upload_thumbnail(name: str) -> Response:
        """An uploaded picture, small."""
        if not name.startswith(UPLOAD):
            raise HTTPException(404, "no such picture")
        return _picture(collection.uploads.get(name).thumbnail, "image/jpeg", True)

    @app.get("/images/{row}", responses=image_response("image/jpeg"), response_class=Response)
    async def image(row: int, size: Literal["thumbnail", "large"] = "thumbnail", v: Words = "") -> Response:
        """An image of the index by its row: its thumbnail, or larger if the dataset still has it."""
        work: Callable[[Opened], bytes] = (
            (lambda opened: opened.picture(row)) if size == "large" else (lambda opened: opened.row(row)["thumbnail"])
        )
        return _picture(await server.picture(v, work), "image/jpeg", bool(v))

    @app.get("/explain/{row}", responses=image_response("image/png"), response_class=Response)
    async def explain(row: int, q: Words, v: Words = "") -> Response:
        """What in an image speaks for a text, as a drawing."""
        opened = collection.opened
        if v not in ("", opened.version):
            raise HTTPException(410, "the index was rebuilt; search again")
        if not 0 <= row < len(opened):
            raise HTTPException(404, "the index has no such image")
        return _picture(await server.search.run(partial(opened.explanation, row, q)), "image/png", bool(v))

    @app.get("/healthz")
    async def health() -> Health:
        """Whether the server is up. It needs no token."""
        return Health(status="ok")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return Measured(Limits(app, door, max_bytes), server.metrics)


def _picture(data: bytes, kind: str, kept: bool) -> Response:
    """A picture, which a browser keeps if it never changes."""
    headers = {"Cache-Control": FOR_EVER if kept else "no-cache", "Content-Security-Policy": PICTURE_POLICY}
    return Response(data, media_type=kind, headers=headers)
