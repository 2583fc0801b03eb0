# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Records: what is asked of a picture and answered. Read from JSON lines, COCO, YOLO folders and a scan's results.

A record is the official one, `{"image": …, "conversations": [{"from": "human", "value": …}, {"from": "gpt", …}, …]}`,
with a path, a picture or a list of them, or has `messages` as `processor.apply_chat_template` takes them. `name` is
what errors call it; `size`, where it is known, the (width, height) that its picture must have.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Things = dict[str, list[list[int]]]  # label → boxes in thousandths
ROLES = {"human": "user", "gpt": "assistant"}
_BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)
_COORDINATES = re.compile(r"(?:<[0-9]+>){2}|(?:<[0-9]+>){4}")


def messages_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A record as the processor's messages, with lists of items; pictures that no question names come first."""
    if "messages" in record:
        contents = [(each, each["content"]) for each in record["messages"]]
        return [
            {**each, "content": [{"type": "text", "text": c}] if isinstance(c, str) else c} for each, c in contents
        ]
    told = record.get("image_list") or record.get("image") or []
    messages, shown = [], 0
    for turn in record["conversations"]:
        text = str(turn["value"])
        while turn["from"] == "human" and "<image>" in text:  # numbered in order
            shown += 1
            text = text.replace("<image>", f"<image-{shown}>", 1)
        messages.append({"role": ROLES.get(turn["from"], turn["from"]), "content": [{"type": "text", "text": text}]})
    pictures = told if isinstance(told, (list, tuple)) else [told]
    messages[0]["content"][:0] = [{"type": "image", "image": picture} for picture in pictures]
    return messages


def check(record: Mapping[str, Any], none: str) -> None:
    """Raises:
    ValueError: turns that do not alternate from the user's, or an answer that is not in the answers' grammar.
    """
    name = record.get("name", "record")
    messages = [each for each in messages_of(record) if each["role"] != "system"]
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * max(1, len(roles) // 2):
        raise ValueError(f"{name}: turns are from {roles}; expected user (human), assistant (gpt), user, …")
    for answer in ("".join(item["text"] for item in message["content"]) for message in messages[1::2]):
        if answer.count("<box>") != answer.count("</box>") or answer.count("<ref>") != answer.count("</ref>"):
            raise ValueError(f"{name}: a <box> or <ref> without its end: {answer[:80]!r}")
        for inside in (inside for inside in _BOX.findall(answer) if inside != none):
            if inside.lower() == none.lower():
                raise ValueError(f"{name}: <box>{inside}</box>; this model's word for nothing found is {none!r}.")
            numbers = [int(number) for number in re.findall("[0-9]+", inside)]
            if not _COORDINATES.fullmatch(inside) or max(numbers) > 1000:
                raise ValueError(f"{name}: <box>{inside}</box>; expected two or four of <0> … <1000>, or {none!r}.")
            if any(first > last for first, last in zip(numbers[:2], numbers[2:], strict=False)):
                raise ValueError(f"{name}: <box>{inside}</box>; expected the top left corner first.")


def thousandths(place: Iterable[float], size: Sequence[float]) -> list[int]:
    """A box or point, x before y, as coordinate tokens have it. size: (width, height), in the same units."""
    pairs = zip(place, [*size, *size], strict=False)
    return [min(max(int(1000 * value / side + 0.5), 0), 1000) for value, side in pairs]


def answer_of(found: Iterable[tuple[str | None, Sequence[Sequence[int]]]], none: str = "None") -> str:
    """An answer in the model's grammar. found: (label, or None for points asked alone; boxes or points in thousandths)
    in the order of the question; boxes are sorted by their top left corner, x first."""
    said = []
    for label, boxes in found:
        spelt = ["".join(f"<{value}>" for value in box) for box in sorted(map(list, boxes))] or [none]
        said += ["" if label is None else f"<ref>{label}</ref>", *(f"<box>{inside}</box>" for inside in spelt)]
    return "".join(said)


def read(source: str | Path, build_question: Any, none: str, negatives: int = 1) -> Iterator[dict[str, Any]]:
    """The records of a file or folder; one that cannot be made out has an `error` instead.

    Args:
        source: the official JSON lines; a recipe of such (JSON); COCO (JSON); a `data.yaml` of YOLO, whose `train` and
            `val` may be added behind a colon (`data.yaml:val`); or the folder of a scan.
        build_question: the processor's. none: the config's word for nothing found.
        negatives: labels that a COCO or YOLO picture lacks, asked for beside those it has; at most so many.
    """
    name, _, split = str(source).partition(".yaml:")
    path = Path(f"{name}.yaml" if split else name)
    if path.suffix == ".jsonl":
        yield from _lines(path, path.parent)
        return
    if path.is_dir():
        yield from _scan(path, build_question, none)
        return
    if path.suffix in (".yaml", ".yml"):
        pictures, labels = _yolo(path, split or "train")
    else:
        told = json.loads(path.read_text(encoding="utf-8"))
        if "annotations" not in told:
            for each in told.values():
                for annotation in [each["annotation"]] if isinstance(each["annotation"], str) else each["annotation"]:
                    for _ in range(int(each.get("repeat_time", 1))):
                        yield from _lines(path.parent / annotation, path.parent / each.get("root", ""))
            return
        pictures, labels = _coco(told, path.parent)
    for record, things in pictures:
        rng = random.Random(record["name"])
        absent = [label for label in labels if label not in things]
        asked = [*things, *rng.sample(absent, min(negatives, len(absent)))]
        rng.shuffle(asked)
        if asked:
            answer = answer_of([(label, things.get(label, ())) for label in asked], none)
            record["conversations"] = _turns(build_question("detect", asked), answer)
        else:
            record.setdefault("error", "no label to ask for")
        yield record


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _lines(path: Path, root: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            name = f"{path.name}:{number}"
            try:
                record = {**json.loads(line), "name": name}
                told = record.pop("image_list", None) or record.get("image") or []
                record["image"] = [str(root / each) for each in ([told] if isinstance(told, str) else told)]
                yield record
            except (ValueError, TypeError) as error:
                yield {"name": name, "error": str(error)}


def _coco(told: dict[str, Any], root: Path) -> tuple[Iterable[tuple[dict[str, Any], Things]], list[str]]:
    labels = {each["id"]: each["name"] for each in told["categories"]}
    pictures: dict[Any, tuple[dict[str, Any], Things]] = {}
    for image in told["images"]:
        size = image["width"], image["height"]
        pictures[image["id"]] = {"name": image["file_name"], "image": str(root / image["file_name"]), "size": size}, {}
    for each in told["annotations"]:
        record, things = pictures[each["image_id"]]
        x, y, width, height = each["bbox"]
        if not each.get("iscrowd"):
            box = thousandths((x, y, x + width, y + height), record["size"])
            things.setdefault(labels[each["category_id"]], []).append(box)
    return pictures.values(), [*labels.values()]


def _yolo(path: Path, split: str) -> tuple[Iterable[tuple[dict[str, Any], Things]], list[str]]:
    import yaml  # type: ignore[import-untyped] # which transformers needs

    told = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = told["names"]  # a list, or a dict by number
    labels = names if isinstance(names, list) else [name for _, name in sorted(names.items())]
    folder = path.parent / told.get("path", "") / told[split]
    pictures = []
    for image in sorted(each for each in folder.rglob("*") if each.is_file()):
        record = {"name": str(image.relative_to(folder)), "image": str(image)}
        things: Things = {}
        beside = Path(*["labels" if part == "images" else part for part in image.parts]).with_suffix(".txt")
        try:
            for line in beside.read_text().splitlines() if beside.exists() else ():
                kind, x, y, width, height = map(float, line.split()[:5])
                box = thousandths((x - width / 2, y - height / 2, x + width / 2, y + height / 2), (1, 1))
                things.setdefault(labels[int(kind)], []).append(box)
        except (ValueError, IndexError) as error:
            record["error"] = f"{beside.name}: {error}"
        pictures.append((record, things))
    return pictures, labels


def _scan(folder: Path, build_question: Any, none: str) -> Iterator[dict[str, Any]]:
    from scan.records import read_manifest, read_records

    read_manifest(folder)  # FileNotFoundError for a folder that is no scan's
    for found in read_records(folder):
        record: dict[str, Any] = {"name": f"{found.source}: {found.query!r}", "image": found.source}
        if found.status != "ok" or found.frame is not None or not (found.width and found.height):
            yield {**record, "error": found.error or "not a picture"}
            continue
        size = found.width, found.height
        things: dict[str, list[list[int]]] = {found.query: []} if found.query else {}
        for each in found.detections:
            place = thousandths(each.box or each.point or (), size)
            things.setdefault((found.task != "point" and each.label) or found.query, []).append(place)
        said = [(None if found.task == "point" else label, places) for label, places in things.items()]
        question = build_question(found.task, [found.query] if found.query else [])
        yield {**record, "size": size, "conversations": _turns(question, answer_of(said, none))}
