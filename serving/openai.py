# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""OpenAI's shapes: what requests may say, how answers, their pieces and errors are written; and /v1/locate's request.

Source: https://platform.openai.com/docs/api-reference/chat/create, fields of 2026.
"""

import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

Mode = Literal["hybrid", "fast", "slow", "verified"]
Task = Literal["detect", "ground", "single", "point", "text", "gui"]
# OpenAI's fields that say nothing with these values, and are refused with others
NEUTRAL: dict[str, Any] = dict.fromkeys(("frequency_penalty", "presence_penalty", "top_logprobs"), 0)
NEUTRAL |= {"logit_bias": {}, "tools": [], "response_format": {"type": "text"}}
FINISH = {"end": "stop", "stop": "stop", "limit": "length"}

PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
QUESTION = "Locate all the instances that matches the following description: red circle."
CONTENT = [{"type": "image_url", "image_url": {"url": PIXEL}}, {"type": "text", "text": QUESTION}]
CHAT_EXAMPLE: Any = {
    "model": "LocateAnything-3B",
    "messages": [{"role": "user", "content": CONTENT}],
    "max_tokens": 64,
}
LOCATE_EXAMPLE: Any = {"image": PIXEL, "queries": ["red circle", "orange square"], "task": "detect", "threshold": 0.2}
FOUND = {"label": "red circle", "class_id": 0, "box": [4.5, 9.0, 30.1, 41.0], "point": None, "score": 0.93}
ANSWER_EXAMPLE = {"width": 56, "height": 56, "detections": [{**FOUND, "label_score": 0.99}]}


class APIError(Exception):
    """What a client is told in OpenAI's shape. param: the field that is wrong. code: OpenAI's word for it."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        # what is quoted of a request may be long, and half of a character
        told = [
            None if text is None else text[:500].encode(errors="backslashreplace").decode()
            for text in (message, param)
        ]
        super().__init__(told[0])
        self.status, self.param, self.code = status, told[1], code
        self.headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(status, {})

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refusal(message: str) -> APIError:
    """Of a request, by a message that begins with the field that is wrong."""
    field = message.partition(":")[0]
    return APIError(400, message, param=field if field.isidentifier() else None)


# ---- requests


class Strict(BaseModel):
    """Unknown fields are refused by name; null says nothing."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_what_says_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None and value != NEUTRAL.get(name)}


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageURL(Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # changes no pixel


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(min_length=1)]
    name: str = ""  # said by some clients, and not shown to the model


class ChatRequest(Strict):
    """Temperature 0, the default, is greedy; choice i of `n` draws with seed + i."""

    model_config = ConfigDict(json_schema_extra={"examples": [CHAT_EXAMPLE]})
    model: str
    messages: list[Message] = Field(min_length=1, max_length=100)
    limit: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stops: list[Annotated[str, Field(min_length=1, max_length=100)]] = Field([], max_length=4, alias="stop")
    n: int = Field(1, ge=1)
    logprobs: bool = False
    stream: bool = False
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] = {}
    mode: Mode = Field("hybrid", alias="generation_mode")
    verify_labels: bool = False
    # OpenAI's fields about the sender, which change no answer
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @field_validator("stops", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as the processor takes them, but each image as the client's URL."""

        def item(part: TextPart | ImagePart) -> dict[str, Any]:
            if isinstance(part, TextPart):
                return {"type": "text", "text": part.text}
            return {"type": "image", "image": part.image_url.url}

        turns = []
        for turn in self.messages:
            said = [TextPart(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
            role = "system" if turn.role == "developer" else turn.role
            turns.append({"role": role, "content": list(map(item, said))})
        return turns


class LocateRequest(Strict):
    """One question for each query, as `processor.questions` asks them."""

    model_config = ConfigDict(json_schema_extra={"examples": [LOCATE_EXAMPLE]})
    image: str = Field(description="A data URI; an http(s) address where the server fetches those.")
    queries: list[str] = Field([], description="What to look for. Only task text can do without.")
    task: Task = "detect"
    threshold: float = Field(0.0, ge=0, le=1, description="Boxes and points that score lower are left out.")
    mode: Mode = "hybrid"
    verify_labels: bool = False
    limit: int | None = Field(None, ge=1, alias="max_tokens")
    stream: bool = False

    @field_validator("queries", mode="before")
    @classmethod
    def _one_query(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


# ---- answers


class Choice:
    """One row's answer as it grows: its text, what of it was sent, its tokens' log-probabilities if they are wanted.

    Args:
        decode: ids to text. stops: texts that end the answer before them. They may lie across tokens, so what could
            begin one waits to be sent.
    """

    def __init__(self, index: int, decode: Callable[[Sequence[int]], str], stops: Sequence[str], logprobs: bool):
        self.index, self.decode, self.stops = index, decode, stops
        self.text, self.tokens, self.sent = "", 0, 0
        self.logprobs: list[dict[str, Any]] | None = [] if logprobs else None
        self.finish_reason: str | None = None

    def take(self, output: Any) -> str:
        """The text that an engine's output lets be sent."""
        new = self.decode(output.generated_tokens[self.tokens :])
        done = output.is_finished()
        if done or not new.endswith("\ufffd"):  # half of a character
            pairs = zip(output.generated_tokens, output.logprobs, strict=True)
            if self.logprobs is not None:
                told = [self._logprob(*pair) for pair in list(pairs)[self.tokens :]]
                self.logprobs += [one for one in told if one["token"]]  # but the end of turn
            self.text, self.tokens = self.text + new, len(output.generated_tokens)
        ends = [at for at in map(self.text.find, self.stops) if at >= 0]
        if ends:  # the engine ends the row at this token
            self.text = self.text[: min(ends)]
        if done:
            self.finish_reason = FINISH[output.finish_reason]
        free = len(self.text) - (0 if done else max(map(len, self.stops), default=1) - 1)
        piece, self.sent = self.text[self.sent : max(free, 0)], max(self.sent, free)
        return piece

    def _logprob(self, token_id: int, value: float) -> dict[str, Any]:
        token = self.decode([token_id])
        value = max(value, -9999.0) if value == value else -9999.0  # OpenAI's for impossible; JSON has no infinities
        return {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Completion:
    """The envelope that a response and all its chunks share. prompt: its tokens."""

    def __init__(self, model: str, prompt: int):
        self.head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": model}
        self.prompt = prompt

    def _usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        return usage(self.prompt, sum(choice.tokens for choice in choices))

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        told = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": None if choice.logprobs is None else {"content": choice.logprobs, "refusal": None},
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return {**self.head, "object": "chat.completion", "choices": told, "usage": self._usage(choices)}

    def chunk(self, choice: Choice, delta: dict[str, Any]) -> dict[str, Any]:
        """A piece of a choice, with the log-probabilities that came with it; an empty one ends it."""
        told = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        if choice.logprobs and "content" in delta:
            told["logprobs"], choice.logprobs = {"content": choice.logprobs, "refusal": None}, []
        if not delta:
            told["finish_reason"] = choice.finish_reason
        return {**self.head, "object": "chat.completion.chunk", "choices": [told]}

    def last(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage(choices)}
