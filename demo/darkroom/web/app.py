"""The web application: its routes, and what is checked of every request before one of them sees it."""

import hmac
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from darkroom.errors import DarkroomError
from darkroom.web import gallery, openai, webui
from darkroom.web.api import Refused, refusal_of
from darkroom.web.models import Models

PAGE = Path(__file__).with_name("page")
LARGEST_BODY, LARGEST_UPLOAD = 2**20, 2**25
"""Bytes of a request, and of one that brings pictures."""

UPLOADS = ("/v1/images/edits", "/sdapi/v1/img2img")

COOKIE = "darkroom_key"
OPEN = ("/", "/page/", "/health/", "/login")
"""What is there for everybody: the page, which asks for the key itself, and whether the server is well."""

POLICY = "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Refuses what comes from another site's page, without the key, or with too large a body.

    A page of another site can have a browser send requests here: those name their origin. With an `api_key`, each
    request carries it: as OpenAI's clients send it, or in the cookie that the page gets for it.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app, self._key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = HttpRequest(scope)
        most = LARGEST_UPLOAD if request.url.path in UPLOADS else LARGEST_BODY
        if (refused := self._refusal(request, most)) is not None:
            await answer_of(request, refused)(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise Refused(413, f"the body is larger than {most} bytes.", code="too_large")
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        await self._app(scope, counted, with_headers)

    def _refusal(self, request: HttpRequest, most: int) -> Refused | None:
        origin, host = request.headers.get("origin"), request.headers.get("host")
        if (origin and urlsplit(origin).netloc != host) or request.headers.get("sec-fetch-site") == "cross-site":
            if request.method != "GET" or request.url.path not in OPEN:
                return Refused(403, "pages of other sites may not use this server.", code="other_origin")
        if not request.headers.get("content-length", "0").isdigit():
            return Refused(400, "Content-Length is no number.", code="invalid_header")
        if int(request.headers.get("content-length", "0")) > most:
            return Refused(413, f"the body is larger than {most} bytes.", code="too_large")
        path = request.url.path
        if self._key is None or path in OPEN or path.startswith(tuple(each for each in OPEN if len(each) > 1)):
            return None
        if any(same(each, self._key) for each in keys_of(request)):
            return None
        return Refused(401, "this server wants its API key: Authorization: Bearer KEY.", code="invalid_api_key")


def keys_of(request: HttpRequest) -> Iterable[str]:
    """The keys that a request carries."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    yield key.strip() if kind.lower() == "bearer" else ""
    yield request.cookies.get(COOKIE, "")


def same(given: str, key: str) -> bool:
    """Whether a key is the right one, in a time that tells nothing about it."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode())


def answer_of(request: HttpRequest, refused: Refused) -> Response:
    """An error in the shape of the API that was called."""
    return (webui.error if request.url.path.startswith("/sdapi/") else openai.error)(refused)


async def on_error(request: HttpRequest, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # no such path, or not with this method
        error = Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}.", code="no_such_path")
    return answer_of(request, refusal_of(error))


async def index(request: HttpRequest) -> Response:
    return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})


async def login(request: HttpRequest) -> Response:
    """Gives the page a cookie for the key, so that pictures can be shown, too."""
    given = keys_of(request)
    key = request.app.state.api_key
    if key is not None and not any(same(each, key) for each in given):
        raise Refused(401, "this is not the server's API key.", code="invalid_api_key")
    response = JSONResponse({"key": key is not None})
    if key is not None:
        response.set_cookie(COOKIE, key, httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return response


async def live(request: HttpRequest) -> Response:
    """The process answers."""
    return JSONResponse({"status": "live"})


async def ready(request: HttpRequest) -> Response:
    """It takes requests: not while it is stopping."""
    stopping = request.app.state.stopping()
    return JSONResponse({"status": "stopping" if stopping else "ready"}, 503 if stopping else 200)


async def metrics(request: HttpRequest) -> Response:
    return PlainTextResponse(generate_latest(request.app.state.registry), media_type="text/plain; version=0.0.4")


class Counted(Collector):
    """What the batchers count, at the moment when it is asked for."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterable[Any]:
        gauges = {"waiting": ("queue_images", "Images that wait for a slot")}
        gauges |= {"occupied": ("slots_occupied", "Images in slots")}
        counters = {"steps": ("steps", "Denoising steps made, of all images")}
        counters |= {"calls": ("denoiser_calls", "Calls of the denoiser, of whole batches")}
        counters |= {"finished": ("images", "Images that left the batch")}
        counts = {name: model.counts() for name, model in self._models.items()}
        for kind, metrics in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for field, (name, words) in metrics.items():
                family = kind(f"darkroom_{name}", words, labels=["model"])
                for model, count in counts.items():
                    family.add_metric([model], getattr(count, field))
                yield family
        stages = SummaryMetricFamily("darkroom_stage_seconds", "What finished images took", labels=["model", "stage"])
        for name, model in self._models.items():
            for stage, (count, seconds) in sorted(model.times.items()):
                stages.add_metric([name, stage], count, seconds)
        yield stages


def application(models: Models, hosts: Sequence[str], api_key: str | None) -> Starlette:
    """The studio's application. `hosts` are the names that it may be called by, "*" for any."""
    routes = [
        Route("/", index),
        Mount("/page", StaticFiles(directory=PAGE)),
        Route("/login", login, methods=["POST"]),
        Route("/health/live", live),
        Route("/health/ready", ready),
        Route("/metrics", metrics),
        *openai.ROUTES,
        *webui.ROUTES,
        *gallery.ROUTES,
    ]
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)), Middleware(Guard, api_key=api_key)]
    known = dict.fromkeys((Refused, DarkroomError, HTTPException), on_error)
    app = Starlette(routes=routes, middleware=guards, exception_handlers=known | {Exception: on_error})
    app.state.models, app.state.api_key = models, api_key
    app.state.stopping = lambda: False
    app.state.registry = CollectorRegistry()
    app.state.registry.register(Counted(models))
    return app
