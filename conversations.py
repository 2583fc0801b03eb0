# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Conversations as users write them: checked, turned into the model card's text (checkpoint.md, "Prompt")."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .grounding import ANSWER_START, TURN_END, TURN_START
from .image_processing import is_list
from .media import shorten

DEFAULT_SYSTEM = "You are a helpful assistant.\n"


@dataclass(frozen=True)
class Placeholders:
    """The words of `<image-1>` and `<video-1>`."""

    image: str
    video: str

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(f"<({re.escape(self.image)}|{re.escape(self.video)})-([0-9]+)>")


def prompt_text(
    conversation: Sequence[Mapping[str, Any]],
    placeholders: Placeholders,
    generate: bool,
    continue_final: bool = False,
) -> str:
    """The model card's text of a conversation.

    Args:
        generate: end with the opening of the assistant's turn. continue_final: leave the last message open.
    """
    # A user's text that names <image-1> puts the image there; other roles' texts do not.
    named = {
        placeholder[0]
        for message in conversation
        if message["role"] == "user"
        for item in items_of(message)
        if kind_of(item) == "text"
        for placeholder in placeholders.pattern.finditer(text_of(item))
    }
    counts = {placeholders.image: 0, placeholders.video: 0}
    pieces = []
    if conversation[0]["role"] != "system":
        pieces.append(f"{TURN_START}system\n{DEFAULT_SYSTEM}{TURN_END}\n")
    for message in conversation:
        pieces.append(f"{TURN_START}{message['role']}\n")
        for item in items_of(message):
            kind = kind_of(item)
            if kind == "text":
                pieces.append(text_of(item))
                continue
            word = placeholders.image if kind == "image" else placeholders.video
            counts[word] += 1
            placeholder = f"<{word}-{counts[word]}>"
            if placeholder not in named:
                pieces.append(placeholder)
        pieces.append(f"{TURN_END}\n")
    if continue_final:
        pieces.pop()
    if generate:
        pieces.append(ANSWER_START)
    return "".join(pieces)


def refuse_repeated(text: str, placeholders: Placeholders, name: str) -> None:
    """Each image and video fills one run of slots: what a user writes may say where, but not add a second one.

    Args:
        text: the prompt. name: of its conversation, for the message.

    Raises:
        ValueError: a placeholder that the prompt holds more than once.
    """
    seen = set()
    for found in placeholders.pattern.finditer(text):
        key = (found[1], found[2].lstrip("0"))
        if key in seen:
            raise ValueError(
                f"{name}: has {shorten(found[0], 30)} more than once, and would show it as often. Write it once, "
                f"where it stands, or not at all; other mentions as <{found[1]} {shorten(key[1], 12)[1:-1]}>."
            )
        seen.add(key)


@dataclass(frozen=True)
class Vision:
    """The items of a conversation that show something, in order of appearance."""

    images: list[Mapping[str, Any]]
    videos: list[Mapping[str, Any]]

    @classmethod
    def of(cls, conversation: Sequence[Mapping[str, Any]]) -> Vision:
        items = [item for message in conversation for item in items_of(message)]
        return cls(*([item for item in items if kind_of(item) == kind] for kind in ("image", "video")))


def read_conversations(messages: Any, slot_tokens: Sequence[str]) -> tuple[list[list[Mapping[str, Any]]], bool]:
    """The conversations of a call, checked, and whether it was a list of them.

    Args:
        slot_tokens: what stands for an image's features in a prompt; no message may hold it, nor a turn's marks.
    """
    if not is_list(messages) or not messages:
        raise ValueError(f"messages: got {messages!r}; expected a list of messages, or a list of conversations.")
    is_batch = is_list(messages[0])
    conversations = list(messages) if is_batch else [messages]
    for index, conversation in enumerate(conversations):
        if not is_list(conversation) or not conversation:
            raise ValueError(f"conversation {index}: got {conversation!r}; expected a list of messages.")
        for message in conversation:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"conversation {index}: got a message without a role; expected role and content.")
            if not isinstance(message.get("content"), (str, list, tuple)):
                raise ValueError(
                    f"conversation {index}: the content of a {message['role']} message is a "
                    f"{type(message.get('content')).__name__}; expected a text or a list of items."
                )
            _refuse_markup(message, f"conversation {index}", slot_tokens)
    return conversations, is_batch


def _refuse_markup(message: Mapping[str, Any], name: str, slot_tokens: Sequence[str]) -> None:
    """What a user writes may not end a turn, open another or stand for an image."""
    # side by side as in the prompt, where the halves of a token meet
    words = "".join([message["role"], "\n", *(text_of(item) for item in items_of(message) if kind_of(item) == "text")])
    if message["role"] == "assistant":
        words = words.removesuffix(TURN_END)  # an answer as the model gave it
    for token in (TURN_START, TURN_END, *slot_tokens):
        if token in words:
            raise ValueError(
                f"{name}: a {shorten(message['role'], 20)} message holds {token}, which is a mark of the prompt "
                "itself; leave it out, or write it with a space inside."
            )


def items_of(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message["content"]
    return [content] if isinstance(content, str) else content


def kind_of(item: Any) -> str:
    """text, image or video. Keys without a value do not count: datasets fill items up with them."""
    if isinstance(item, str):
        return "text"
    if isinstance(item, Mapping):
        named = item.get("type")
        for kind, keys in (("image", ("image", "image_url")), ("video", ("video",)), ("text", ("text",))):
            if any(item.get(key) is not None for key in keys):
                return kind
        if named in ("image", "image_url"):
            return "image"
        if named in ("video", "text"):
            return named
    shown = sorted(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
    raise ValueError(f"content: got an item {shown}; expected a text, or a dict with a text, an image or a video.")


def text_of(item: str | Mapping[str, Any]) -> str:
    text = item if isinstance(item, str) else item.get("text", "")
    if not isinstance(text, str):
        raise ValueError(f"content: the text of an item is a {type(text).__name__}; expected a string.")
    return text


def video_of(item: Mapping[str, Any]) -> Any:
    for key in ("video", "url", "path"):
        if item.get(key) is not None:
            return item[key]
    raise ValueError(f"content: got a video item with the keys {sorted(map(str, item))}; expected its frames.")
