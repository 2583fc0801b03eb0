# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Records: what is asked of a picture and answered. Read from JSON lines, COCO, YOLO and a scan's results.

A record is the official one, `{"image": …, "conversations": [{"from": "human", "value": …}, {"from": "gpt", …}, …]}`,
with a path, a picture or a list of them, or has `messages` as `processor.apply_chat_template` takes them; `name` is
what errors call it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from training.objective import quantise

ROLES = {"human": "user", "gpt": "assistant"}
_BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)
_COORDINATES = re.compile(r"(?:<[0-9]+>){2}|(?:<[0-9]+>){4}")


def messages_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A record as the processor's messages: pictures that no question names stand before the first."""
    if "messages" in record:
        return list(record["messages"])
    told = record.get("image_list") or record.get("image") or []
    pictures = told if isinstance(told, (list, tuple)) else [told]
    messages, shown = [], 0
    for turn in record["conversations"]:
        text = str(turn["value"])
        if turn["from"] == "human":
            while "<image>" in text:  # numbered in order
                shown += 1
                text = text.replace("<image>", f"<image-{shown}>", 1)
        messages.append({"role": ROLES.get(turn["from"], turn["from"]), "content": [{"type": "text", "text": text}]})
    messages[0]["content"][:0] = [{"type": "image", "image": picture} for picture in pictures]
    return messages


def check(record: Mapping[str, Any], none: str) -> None:
    """Raises:
    ValueError: turns that do not alternate from the human's, or an answer that is not in the answers' grammar.
    """
    name = record.get("name", "record")
    turns = [(turn["from"], turn["value"]) for turn in record.get("conversations") or ()]
    if "messages" not in record and [who for who, _ in turns] != ["human", "gpt"] * max(1, len(turns) // 2):
        raise ValueError(f"{name}: conversations are from {[who for who, _ in turns]}; expected human, gpt, human, …")
    for answer in (text for who, text in turns if who == "gpt"):
        if answer.count("<box>") != answer.count("</box>") or answer.count("<ref>") != answer.count("</ref>"):
            raise ValueError(f"{name}: a <box> or <ref> without its end: {answer[:80]!r}")
        for inside in _BOX.findall(answer):
            numbers = [int(number) for number in re.findall("[0-9]+", inside)]
            if inside != none and inside.lower() == none.lower():
                raise ValueError(f"{name}: <box>{inside}</box>; this model's word for nothing found is {none!r}.")
            if inside == none:
                continue
            if not _COORDINATES.fullmatch(inside) or max(numbers) > 1000:
                raise ValueError(f"{name}: <box>{inside}</box>; expected two or four of <0> … <1000>, or {none!r}.")
            if any(first > last for first, last in zip(numbers[:2], numbers[2:], strict=False)):
                raise ValueError(f"{name}: <box>{inside}</box>; expected the top left corner first.")


def answer_of(found: Iterable[tuple[str | None, Sequence[Sequence[int]]]], none: str = "None") -> str:
    """An answer in the model's grammar. found: (label, or None for points asked alone; boxes or points in thousandths)
    in the order of the question; boxes are sorted by their top left corner, x first."""
    said = []
    for label, boxes in found:
        spelt = ["".join(f"<{value}>" for value in box) for box in sorted(map(list, boxes))] or [none]
        said.append(
            ("" if label is None else f"<ref>{label}</ref>") + "".join(f"<box>{inside}</box>" for inside in spelt)
        )
    return "".join(said)


__all__ = ["answer_of", "check", "messages_of", "quantise"]
