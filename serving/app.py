# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""The routes: chat completions, locate, models, health, metrics, the page."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from .engine import Engine, Job, StopTexts
from .guard import Guard
from .openai import ANSWER_EXAMPLE, APIError, ChatRequest, Choice, Completion, LocateRequest, refusal, usage

PAGE = Path(__file__).parent / "page.html"
# Scripts and pictures from nowhere else: what a label says cannot load or send anything
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
POLICY += "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
LOCATE = LocateRequest.model_json_schema()
UPLOAD = {**LOCATE["properties"], "image": {"type": "string", "format": "binary"}}
LOCATE_BODY = {
    "application/json": {"schema": LOCATE},
    "multipart/form-data": {"schema": {"type": "object", "properties": UPLOAD, "required": ["image"]}},
}


async def _cleanup() -> AsyncIterator[AsyncExitStack]:
    """What a request holds until its answer is sent, or its client gone."""
    async with AsyncExitStack() as stack:
        yield stack


Cleanup = Annotated[AsyncExitStack, Depends(_cleanup)]


class Metrics:
    """What /metrics tells; a registry of its own, so that several applications fit into a process."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "locateanything"}
        buckets = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
        labels = ["route", "status"]
        self.requests = Histogram("request_seconds", "From headers to end.", labels, buckets=buckets, **own)
        self.rows = Counter("rows", "Rows answered, by why they ended.", ["finish_reason"], **own)
        self.tokens = Counter("tokens", "Tokens of the rows answered.", ["kind"], **own)
        Gauge("rows_admitted", "Rows being answered or waiting.", **own).set_function(lambda: engine.admitted)

    def request(self, route: Any, status: int, seconds: float) -> None:
        self.requests.labels(getattr(route, "path", "other"), str(status)).observe(seconds)

    def row(self, output: Any) -> None:
        if output.is_finished():
            self.rows.labels(output.finish_reason).inc()
            self.tokens.labels("prompt").inc(len(output.prompt_ids))
            self.tokens.labels("answer").inc(len(output.generated_tokens))


def build_app(engine: Engine, *, name: str, api_key: str | None = None) -> Guard:
    """The ASGI application around an engine, which it starts and stops.

    name: of the model, as clients write it. api_key: what they must send, None for nothing.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    app = FastAPI(title="LocateAnything", version="1", lifespan=lifespan, redoc_url=None)
    limits, metrics = engine.limits, Metrics(engine)
    for kind in (APIError, RequestValidationError, HTTPException, ValueError, Exception):
        app.add_exception_handler(kind, _tell)

    def check(field: str, number: int, most: int) -> None:
        if number > most:
            raise APIError(400, f"{field}: got {number}; expected at most {most}.", param=field)

    def settings(request: ChatRequest | LocateRequest) -> dict[str, Any]:
        check("max_tokens", request.limit or 0, limits.tokens)
        told = {"generation_mode": request.mode, "verify_labels": request.verify_labels}
        return {**told, "max_new_tokens": request.limit or limits.tokens}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, cleanup: Cleanup) -> Response:
        """OpenAI's chat completions. The text keeps the tokens of the answer: `<ref>label</ref><box><x1><y1>…</box>`,
        in thousandths of the picture's sides."""
        if request.model != name:
            message = f"model: there is no {request.model[:100]!r} here"
            raise APIError(404, message, param="model", code="model_not_found")
        conversation = request.conversation()
        parts = [item for turn in conversation for item in turn["content"]]
        check("n", request.n, limits.choices)
        check("messages", sum(len(part.get("text", "")) for part in parts), limits.text)
        check("messages", sum(part["type"] == "image" for part in parts), limits.images)
        told = {**settings(request), "temperature": request.temperature, "top_p": request.top_p}
        cleanup.enter_context(engine.admission(request.n))
        await cleanup.enter_async_context(engine.places)
        row = {**await engine.chat_row(conversation), **told}
        prompt = len(row["input_ids"])
        stops = [StopTexts(request.stops, engine.processor, prompt)] if request.stops else []
        draws = [_generator(engine, request.seed, index) for index in range(request.n)]
        rows = [{**row, "stopping_criteria": stops, "generator": generator} for generator in draws]
        job = engine.submit(rows, streaming=request.stream)
        cleanup.callback(job.cancel)
        choices = [Choice(i, engine.text_of, request.stops, request.logprobs) for i in range(request.n)]
        completion = Completion(name, prompt)
        if request.stream:
            return await _events(chunks(job, choices, completion, request.stream_options.get("include_usage", False)))
        async for index, output in job:
            choices[index].take(output)
            metrics.row(output)
        return JSONResponse(completion.whole(choices))

    async def chunks(job: Job, choices: list[Choice], completion: Completion, usage: bool) -> AsyncIterator[Any]:
        roles = [completion.chunk(choice, {"role": "assistant", "content": ""}) for choice in choices]
        async for index, output in job:
            while roles:  # not before, as the request may be refused
                yield roles.pop(0)
            choice = choices[index]
            if text := choice.take(output):
                yield completion.chunk(choice, {"content": text})
            metrics.row(output)
            if choice.finish_reason:
                yield completion.chunk(choice, {})
        if usage:
            yield completion.last(choices)

    example: dict[int | str, Any] = {200: {"content": {"application/json": {"example": ANSWER_EXAMPLE}}}}

    @app.post("/v1/locate", openapi_extra={"requestBody": {"content": LOCATE_BODY}}, responses=example)
    async def locate(request: Request, cleanup: Cleanup) -> Response:
        """Boxes and points of what the queries describe, in pixels of the upright picture, with scores in [0, 1].

        As JSON, or as a form with the file `image`, `queries` as often as needed, and the other fields."""
        asked, upload = await _locate_request(request)
        check("queries", len(asked.queries), limits.queries)
        check("queries", sum(map(len, asked.queries)), limits.text)
        told = {**settings(asked), "stopping_criteria": [engine.criterion]}
        cleanup.enter_context(engine.admission(max(1, len(asked.queries))))
        await cleanup.enter_async_context(engine.places)
        rows, picture = await engine.locate_rows(upload or asked.image, asked.queries, asked.task)
        job = engine.submit([{**row, **told} for row in rows], streaming=asked.stream)
        cleanup.callback(job.cancel)
        pieces = located(job, asked, picture.size)
        if asked.stream:
            return await _events(pieces)
        return JSONResponse([piece async for piece in pieces][-1])

    async def located(job: Job, asked: LocateRequest, size: tuple[int, int]) -> AsyncIterator[Any]:
        """New detections as they are accepted, if they are streamed; at the end all that is told of the picture."""
        outputs: list[Any] = [None] * len(job.open)
        read, seen = [0] * len(outputs), [[] for _ in outputs]  # type: ignore[var-annotated]

        def found_in(index: int) -> list[Any]:
            return engine.detections(outputs[index], size, index if asked.queries else -1)  # where none was asked for

        async for index, output in job:
            metrics.row(output)
            outputs[index] = output
            new, read[index] = output.generated_tokens[read[index] :], len(output.generated_tokens)
            if asked.stream and engine.box_end in new:
                found = [one for one in found_in(index) if one["score"] >= asked.threshold]
                fresh = [one for one in found if one not in seen[index]]
                seen[index] += fresh
                if fresh:
                    yield {"detections": fresh}
        found = [one for index in range(len(outputs)) for one in found_in(index)]
        answers = [
            {
                "query": query,
                "text": engine.text_of(output.generated_tokens),
                "finish_reason": output.finish_reason,
                "tokens": len(output.generated_tokens),
            }
            for query, output in zip(asked.queries or [""], outputs, strict=True)
        ]
        told = {"model": name, "task": asked.task, "mode": asked.mode, "width": size[0], "height": size[1]}
        yield told | {
            "detections": [one for one in found if one["score"] >= asked.threshold],
            "answers": answers,
            "usage": usage(sum(len(o.prompt_ids) for o in outputs), sum(answer["tokens"] for answer in answers)),
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": 0, "owned_by": "locateanything"}
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while the engine runs, else 503."""
        running = engine.manager.is_running()
        return JSONResponse({"status": "ok" if running else "failed"}, 200 if running else 503)

    @app.get("/metrics")
    async def metrics_of_prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    return Guard(app, key=api_key, limits=limits, requests=2 * engine.most, observe=metrics.request)


async def _tell(_: Request, error: Any) -> JSONResponse:
    """What went wrong, in OpenAI's shape. The input is not told: it may be a picture."""
    if isinstance(error, (RequestValidationError, ValidationError)):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        error = APIError(400, f"{place}: {first['msg']}", param=place)
    elif isinstance(error, HTTPException):
        error = APIError(error.status_code, str(error.detail))
    elif isinstance(error, ValueError):
        error = refusal(str(error))
    elif not isinstance(error, APIError):
        error = APIError(500, "an error of the server, which its log tells of")
    return JSONResponse(error.body(), error.status, error.headers)


def _generator(engine: Engine, seed: int | None, index: int) -> torch.Generator:
    """Of a choice; a seed of its own where none is told, so that rows do not draw from each other's."""
    generator = torch.Generator(device=engine.model.device)
    return generator.manual_seed(generator.seed() if seed is None else (seed + index) % 2**63)


async def _locate_request(request: Request) -> tuple[LocateRequest, bytes]:
    """The request, and the picture if it was uploaded."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return LocateRequest.model_validate_json(await request.body()), b""
    async with request.form(max_files=1) as form:
        upload = form.get("image")
        if upload is None or isinstance(upload, str):
            raise ValueError("image: expected a file in the form.")
        fields: dict[str, Any] = {**form, "image": "upload", "queries": form.getlist("queries")}
        return LocateRequest.model_validate(fields), await upload.read()


async def _events(pieces: AsyncIterator[Any]) -> StreamingResponse:
    """Server-sent events, each a JSON object; what goes wrong behind the first is one with an `error`."""
    first = await anext(pieces)

    async def lines() -> AsyncIterator[str]:
        yield f"data: {json.dumps(first)}\n\n"
        try:
            async for piece in pieces:
                yield f"data: {json.dumps(piece)}\n\n"
        except APIError as error:
            yield f"data: {json.dumps(error.body())}\n\n"
        yield "data: [DONE]\n\n"

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # of proxies
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)
