# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Questions; answers to labelled boxes and points with scores; when an answer goes round in circles."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

if TYPE_CHECKING:  # a clone's scripts import this file by itself
    from .configuration import TokenRoles

# docs/checkpoint.md, "Questions the model was trained on", word for word (its grammar slips included).
TASKS: dict[str, str] = {
    "detect": "Locate all the instances that matches the following description: {}.",
    "ground": "Locate all the instances that match the following description: {}.",
    "single": "Locate a single instance that matches the following description: {}.",
    "point": "Point to: {}.",
    "text": "Please locate the text referred as {}.",
    "gui": "Locate the region that matches the following description: {}.",
}
SEPARATOR = "</c>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
ANSWER_START = f"{TURN_START}assistant\n"

# What a token is to the grammar of answers: 0…1000 a coordinate, WORD and all below it words, the others marks.
WORD, REF, REF_END, BOX, BOX_END, IMAGE, TURN, TURN_STOP = range(-8, 0)
_GRAMMAR = {"<ref>": REF, "</ref>": REF_END, "<box>": BOX, "</box>": BOX_END}
_GRAMMAR.update({f"<{value}>": value for value in range(1001)})
_KINDS = {**_GRAMMAR, "<img>": IMAGE, TURN_START: TURN, TURN_END: TURN_STOP}
# Special tokens that carry an answer: what a reader keeps when the others are skipped.
ANSWER_TOKENS = frozenset([*_GRAMMAR, SEPARATOR])
_SHOWN_IMAGE = re.compile(r"<image [0-9]+><img><IMG_CONTEXT>")
_NAMED_IMAGE = re.compile(r"<image[ -]([0-9]{1,9})>")
FRACTIONS = ((1, 1),)  # the sizes of a row that is not scaled


def build_question(task: str, queries: str | Iterable[str] = ()) -> str:
    """The question the model was trained on (docs/checkpoint.md, "Prompt").

    Args:
        task: a key of `TASKS`.
        queries: what to look for; a final period is not doubled. "detect" takes one or several, which are known to get
            each other's labels (`GroundingMixin.questions` asks one each), "text" one or none, the others one.

    Raises:
        ValueError: an unknown task, an empty query, one with the separator `</c>`, or another number of queries.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}; expected one of {', '.join(TASKS)}.")
    texts = [text.strip().removesuffix(".") for text in _texts(queries)]
    if task == "text" and not texts:
        return "Detect all the text in box format."
    if not texts or (len(texts) > 1 and task != "detect"):
        raise ValueError(f"queries: got {len(texts)}; task {task!r} takes one (only 'detect' takes several).")
    return TASKS[task].format(SEPARATOR.join(texts))


def read_boxes(kinds: Sequence[int], begin: int = 0) -> list[tuple[range | None, range]]:
    """The one reader of the answer grammar (docs/stock-behaviour.md §1, "Output grammar"), in linear time.

    kinds: what each token is. begin: the first to read. `<ref>…</ref>` labels what follows, up to the next; a label
    that is not closed ends where the next box begins. For each `<box>` with its `</box>` it returns the places of the
    label's words (None for no label) and of what is inside.
    """
    said: list[tuple[range | None, range]] = []
    label = opened = start = None
    for place in range(begin, len(kinds)):
        kind = kinds[place]
        if kind >= 0 or kind <= WORD:
            continue
        if kind == BOX_END and start is not None:
            said.append((label, range(start, place)))
        elif kind in (BOX, REF_END) and opened is not None:
            label, opened = range(opened, place), None
        elif kind == REF:
            opened = place + 1
        start = place + 1 if kind == BOX else None
    return said


class GroundingMixin:
    """The side of a processor that asks the model's questions and reads its answers, by its `tokenizer`."""

    tokenizer: Any
    tasks = tuple(TASKS)
    build_question = staticmethod(build_question)

    @staticmethod
    def questions(image: Any, queries: str | Iterable[str], task: str = "detect") -> list[list[dict[str, Any]]]:
        """One conversation about an image for each query, to be answered in one batch and merged (`merge_grounding`).

        image: anything that an image item may hold. queries, task: as of `build_question`.
        """
        texts = [build_question(task, query) for query in _texts(queries)]
        item = {"type": "image", "image": image}
        return [[{"role": "user", "content": [item, {"type": "text", "text": text}]}] for text in texts]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """`batch_decode` of one row of ids, to a text; so streamers take the processor as their tokenizer."""
        ids = _listed(token_ids)
        ids = ids if _is_list(ids) else [ids]
        texts = self.batch_decode(ids, skip_special_tokens, **kwargs)
        return texts if ids and _is_list(_listed(ids[0])) else "".join(texts)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Ids to text, one per row.

        Args:
            sequences: ids `[rows, length]` or `[length]`, as a tensor, array or lists. Ids that no vocabulary has, as
                -100 for "ignore", say nothing.
            skip_special_tokens: drop padding, turn marks and image slots; the tokens that carry an answer (labels,
                boxes, coordinates) stay, although the vocabulary calls them special too.
        """
        rows = _id_rows(sequences, "sequences")
        if skip_special_tokens:
            added = self.tokenizer.added_tokens_decoder.items()
            dropped = {index for index, token in added if token.special and token.content not in ANSWER_TOKENS}
            rows = [[index for index in row if index not in dropped] for row in rows]
        return [_words(self.tokenizer, row, 0, len(row), **kwargs) for row in rows]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """`batch_decode`, as pipelines call it. A prompt's text is a prefix of that of the prompt with its answer."""
        return self.batch_decode(generated_outputs, skip_special_tokens, **kwargs)

    def post_process_grounding(
        self, outputs: Any, target_sizes: Any = None, threshold: float | None = None, queries: Any = None
    ) -> list[dict[str, Any]]:
        """Labelled boxes and points of each answer.

        Only the answer is read: what follows the last opening of an assistant's turn, up to its end, or all of a row
        without turns: a question cannot plant a box. A box is `<box>`, two or four coordinates and `</box>`; what is
        malformed is left out. Of ids, only the vocabulary's own tokens count: letters that spell `<7>` are words.

        Args:
            outputs: ids `[rows, length]` of prompts with their answers or of answers alone, a `ModelOutput` with such
                `sequences`, lists of ids, a text or a list of texts with special tokens kept.
            target_sizes: `[rows, 2]` or a list of (height, width) in pixels. A row of several images takes a list of
                them, one per image; its boxes lie in the image that the answer has named last, as `<image 2>`. None
                leaves fractions of the image's sides, 0…1.
            threshold: what scores lower is left out; needs `outputs.token_log_probs`, which
                `generate(return_dict_in_generate=True, output_scores=True)` returns.
            queries: what was asked for, a list of texts for all rows or a list of lists, one per row.

        Returns:
            Per row `boxes` float32 `[n, 4]` (x_min, y_min, x_max, y_max) and `labels` (n texts, "" for none); with
            `token_log_probs` also `scores` and `label_scores`, float32 in [0, 1], the geometric means of the
            probabilities of the coordinate tokens and of the label's tokens (1 for no label), as the model gave them
            when it accepted them; with `queries` also `class_ids`, long, the index of the query that the label is, but
            for case, spaces and a final period, or -1; with a list of sizes for the row also `images`, long, the index
            of the image, or -1. The same of `points` `[m, 2]` (x, y), with `point_` before the name.

        Raises:
            ValueError: outputs of another kind; sizes, queries, threshold or log-probabilities that do not fit; one
                size for several images, or sizes that differ for an answer that does not name the image.
        """
        absent = set() if queries is not None else {"class_ids"}
        absent |= {"scores", "label_scores"} if getattr(outputs, "token_log_probs", None) is None else set()
        rows = self._read(outputs, target_sizes, threshold, queries)
        return [{name: row[name] for name in row if name.removeprefix("point_") not in absent} for row in rows]

    def post_process_grounded_object_detection(
        self, outputs: Any, threshold: float | None = None, target_sizes: Any = None, text_labels: Any = None
    ) -> list[dict[str, Any]]:
        """`post_process_grounding` in the shape that transformers' detectors give and other tools take:

            supervision.Detections.from_transformers(found[0], id2label=dict(enumerate(queries)))

        text_labels: the queries. Per row it returns `boxes`, `scores` (NaN without `token_log_probs`), `text_labels`
        (the model's words), `labels` (the class ids, -1 without queries), `label_scores`, `images` as there, and the
        same of `points`, with `point_` before the name.
        """
        names = {"labels": "text_labels", "class_ids": "labels"}
        names.update({f"point_{old}": f"point_{new}" for old, new in names.items()})
        rows = self._read(outputs, target_sizes, threshold, text_labels)
        return [{names.get(name, name): value for name, value in row.items()} for row in rows]

    @staticmethod
    def merge_grounding(results: Sequence[Mapping[str, Any]], iou_threshold: float = 0.5) -> dict[str, Any]:
        """One result of those of several questions about one image.

        Args:
            results: rows of `post_process_grounding` or `post_process_grounded_object_detection`, one or more.
            iou_threshold: of two boxes with one label (but for case, spaces and a final period) and more intersection
                over union, the one with the higher score stays, or the first. Points are merged where they are equal.
        """
        merged: dict[str, Any] = {}
        for kind, prefix in (("boxes", ""), ("points", "point_")):
            own = [name for name in results[0] if name.startswith("point") == bool(prefix)]
            columns = {name: [value for row in results for value in _listed(row[name])] for name in own}
            places, none = columns[kind], [0] * len(columns[kind])
            words = columns.get(f"{prefix}text_labels", columns[f"{prefix}labels"])
            scores, images = (columns.get(prefix + name, none) for name in ("scores", "images"))
            kept: dict[Any, list[int]] = {}
            for i in sorted(range(len(places)), key=lambda i: -scores[i]):
                rivals = kept.setdefault((_plain(words[i]), images[i]), [])
                if all(_iou(places[i], places[other]) <= iou_threshold for other in rivals):
                    rivals.append(i)
            for name, values in columns.items():
                one, stay = results[0][name], [values[i] for i in sorted(chain.from_iterable(kept.values()))]
                merged[name] = stay if _is_list(one) else one.new_tensor(stay).view(-1, *one.shape[1:])
        return merged

    def _read(self, outputs: Any, target_sizes: Any, threshold: Any, queries: Any) -> list[dict[str, Any]]:
        """What `post_process_grounding` returns, with scores and class ids in any case."""
        log_probs: Any = getattr(outputs, "token_log_probs", None)
        if threshold is not None and not (isinstance(threshold, Real) and 0 <= float(threshold) <= 1):
            raise ValueError(f"threshold: got {threshold!r}; expected a number from 0 to 1.")
        if threshold is not None and log_probs is None:
            raise ValueError("threshold: needs token_log_probs, as generate(…, output_scores=True) returns them.")
        outputs = getattr(outputs, "sequences", outputs)
        outputs = [outputs] if isinstance(outputs, str) else outputs
        if _is_list(outputs) and outputs and all(isinstance(text, str) for text in outputs):
            texts = [text.encode(errors="replace").decode() for text in outputs]  # lone surrogates are no text
            outputs = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        rows = _id_rows(outputs, "outputs")
        values = torch.zeros(len(rows), 0) if log_probs is None else torch.as_tensor(log_probs)
        if values.ndim != 2 or len(values) != len(rows) or values.shape[1] > min(map(len, rows), default=0):
            raise ValueError(
                f"outputs: got token_log_probs {list(values.shape)} for {len(rows)} rows of other lengths."
            )
        lines = [None] * len(rows) if log_probs is None else values.tolist()
        each = zip(rows, lines, _sizes(target_sizes, len(rows)), _classes(queries, len(rows)), strict=True)
        added = self.tokenizer.added_tokens_decoder.items()
        marks = {index: _KINDS[token.content] for index, token in added if token.content in _KINDS}
        results = []
        for ids, line, sizes, index_of in each:
            words = functools.partial(_words, self.tokenizer, ids)
            kinds = [marks.get(index, WORD) for index in ids]
            turns = [place for place, kind in enumerate(kinds) if kind == TURN]
            opened = (place + 1 for place in reversed(turns) if words(place, place + 11).startswith(ANSWER_START))
            begin = next(opened, len(ids) if turns else 0) if line is None else len(ids) - len(line)
            shown = len(_SHOWN_IMAGE.findall(words(0, begin))) if kinds[:begin].count(IMAGE) > 1 else 0
            if shown > 1 and shown != len(sizes) and sizes != FRACTIONS:
                raise ValueError(f"target_sizes: got {sizes} for a row of {shown} images; expected a list of as many.")
            found = _found(kinds, words, begin, line, sizes, index_of)
            results.append(_columns(found, isinstance(sizes, list), threshold))
        return results


def _found(kinds: Any, words: Any, begin: int, log_probs: Any, sizes: Any, classes: Any) -> Iterator[Any]:
    """The places, in pixels, of the boxes and points of an answer that begins there, and what is told of each."""

    def score(places: Sequence[int]) -> float:
        """Geometric mean, in float32 as it is told. Rounding may have made log-probabilities above 0."""
        if log_probs is None:
            return math.nan
        mean = sum(min(0.0, log_probs[place - begin]) for place in places) / (len(places) or 1)
        return torch.tensor(math.exp(mean), dtype=torch.float32).item()

    end = next((place for place in range(begin, len(kinds)) if kinds[place] == TURN_STOP), len(kinds))
    last, read, image = None, begin, 0 if len(sizes) == 1 else -1
    label = {"labels": "", "label_scores": score(()), "class_ids": -1}
    for said, inside in read_boxes(kinds[:end], begin):
        corners = kinds[inside.start : inside.stop]
        if len(corners) not in (2, 4) or min(corners) < 0:
            continue
        if said is not None and said is not last:  # once, however many boxes it has
            last, text = said, words(said.start, said.stop).strip()
            label = {"labels": text, "label_scores": score(said), "class_ids": classes.get(_plain(text), -1)}
        if len(sizes) > 1:
            for number in map(int, _NAMED_IMAGE.findall(words(read, inside.start))):
                image = number - 1 if 0 < number <= len(sizes) else -1
            read = inside.stop
        if image < 0 and len(set(sizes)) > 1:
            raise ValueError(
                f"target_sizes: got {sizes} for an answer that does not name the image of a box; expected that "
                "image's size for each of them, or None, which leaves fractions."
            )
        height, width = sizes[image]
        xs, ys = sorted(width * x / 1000 for x in corners[::2]), sorted(height * y / 1000 for y in corners[1::2])
        place = tuple(chain.from_iterable(zip(xs, ys, strict=True)))
        yield place, {**label, "scores": score(inside), "images": image}


def _columns(found: Iterable[Any], several: bool, threshold: Any) -> dict[str, Any]:
    """Boxes and points apart, in tensors. several: whether to tell the image."""
    result: dict[str, Any] = {}
    found = [one for one in found if threshold is None or one[1]["scores"] >= threshold]
    for kind, prefix, length in (("boxes", "", 4), ("points", "point_", 2)):
        own = [one for one in found if len(one[0]) == length]
        result[kind] = torch.tensor([place for place, _ in own], dtype=torch.float32).view(-1, length)
        result[f"{prefix}labels"] = [told["labels"] for _, told in own]
        for name in ("scores", "label_scores", "class_ids", *(["images"] if several else [])):
            dtype = torch.float32 if name.endswith("scores") else torch.long
            result[prefix + name] = torch.tensor([told[name] for _, told in own], dtype=dtype)
    return result


def _iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes; 1 for equal places, which may be points."""
    if one == other or len(one) == 2:
        return float(one == other)
    width, height = (max(0.0, min(one[a + 2], other[a + 2]) - max(one[a], other[a])) for a in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / ((sum(areas) - width * height) or 1)


def _plain(words: str) -> str:
    """Words as labels are compared: without case, spaces around and a final period."""
    return " ".join(unicodedata.normalize("NFC", words).casefold().split()).removesuffix(".").rstrip()


def _texts(queries: Any) -> list[str]:
    texts = list(queries) if isinstance(queries, Iterable) and not isinstance(queries, str) else [queries]
    for text in texts:
        if not isinstance(text, str) or not _plain(text) or SEPARATOR in text:
            raise ValueError(f"queries: got {text!r}; expected texts that are not empty and hold no {SEPARATOR}.")
    return texts


def _classes(queries: Any, rows: int) -> list[dict[str, int]]:
    """For each row, a query's plain words → its index."""
    per_row = _is_list(queries) and any(map(_is_list, queries))
    lists = list(map(_texts, queries)) if per_row else [[] if queries is None else _texts(queries)] * rows
    if len(lists) != rows:
        raise ValueError(f"queries: got {len(lists)} lists for {rows} row(s); expected one per row, or one for all.")
    return [{_plain(text): index for index, text in reversed([*enumerate(texts)])} for texts in lists]


def _sizes(target_sizes: Any, rows: int) -> list[Any]:
    """The (height, width) of each row's images, in a list where they came in one, else in a tuple of one."""
    lines = [FRACTIONS[0]] * rows if target_sizes is None else _listed(target_sizes)
    if not _is_list(lines) or len(lines) != rows:
        raise ValueError(f"target_sizes: got {lines!r} for {rows} row(s); expected one (height, width) per row.")
    sizes: list[Any] = []
    for line in map(_listed, lines):
        pairs = [_listed(pair) for pair in line] if _is_list(line) else []
        sizes.append([tuple(pair) for pair in pairs] if pairs and all(map(_is_list, pairs)) else (tuple(pairs),))
        for pair in sizes[-1]:
            if len(pair) != 2 or not all(isinstance(n, Real) for n in pair) or not all(0 < n < 1e9 for n in pair):
                raise ValueError(f"target_sizes: got {line!r}; expected (height, width) in pixels, or a list of them.")
    return sizes


def _words(tokenizer: Any, ids: Sequence[int], start: int, stop: int, **kwargs: Any) -> str:
    """The text of ids from … to, special tokens kept. Ids that no vocabulary has say nothing."""
    size = len(tokenizer)
    known = [index for index in ids[start:stop] if 0 <= index < size]
    return tokenizer.decode(known, skip_special_tokens=False, **kwargs)


def _id_rows(ids: Any, name: str) -> list[list[int]]:
    """Ids `[rows, length]` or `[length]`, as a tensor, array or lists → one list a row."""
    rows: Any = [_listed(row) for row in _listed(ids)] if _is_list(_listed(ids)) else [None]
    rows = [rows] if rows and all(isinstance(row, Integral) for row in rows) else rows
    if not all(_is_list(row) and all(isinstance(index, Integral) for index in row) for row in rows):
        raise ValueError(f"{name}: got {type(ids).__name__}; expected token ids [rows, length] or lists of them.")
    return [list(map(int, row)) for row in rows]


def _listed(value: Any) -> Any:
    """A tensor or array in lists, anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


class DegenerateAnswerCriteria(StoppingCriteria):
    """Ends a row that repeats a box, cycles through boxes, or marches a sliver along an axis.

    Made by `model.degenerate_answer_criteria()`. In the drop-in's `generate` the answer keeps what came before the
    first repetition (of a march, its first box); elsewhere it ends with what is said, and `answer_to_keep` tells where
    to cut. What the row would have said after its repetitions is lost.

    Args:
        roles: the checkpoint's token roles.
        period: cycles of up to so many boxes, with their labels, are looked for.
        times: how often a box or cycle must have been said, 2 or more.
        tolerance: a box is that of the cycle before if no coordinate differs by more, in thousandths of the image's
            side, nor by more than a quarter of the box's side: small things in a row are not the same. A point may
            differ by 1. 0 for equal boxes only.
        march: slivers in a row that make a march: they touch or overlap, in equal steps, and are alike on the other
            axis; 0 for none, or 3 and more.
        thin: how wide a sliver is at most, in thousandths of the image's side.
        prompt_length: tokens that are not the answer, where rows are not asked by the drop-in's `generate`.
    """

    def __init__(
        self,
        roles: TokenRoles,
        *,
        period: int = 8,
        times: int = 3,
        tolerance: int = 3,
        march: int = 10,
        thin: int = 5,
        prompt_length: int = 0,
    ):
        least = {"period": 1, "times": 2, "tolerance": 0, "march": 0, "thin": 0, "prompt_length": 0}
        for name, value in zip(least, (period, times, tolerance, march, thin, prompt_length), strict=True):
            if isinstance(value, bool) or not isinstance(value, int) or value < least[name]:
                raise ValueError(f"{name}={value!r}: expected a whole number of {least[name]} or more.")
        if 0 < march < 3:
            raise ValueError(f"march={march}: two boxes are no march; expected 0 for none, or 3 or more.")
        self.period, self.times, self.tolerance = period, times, tolerance
        self.march, self.thin, self.prompt_length = march, thin, prompt_length
        self.box_end = roles.box_end
        self.kinds = {index: index - roles.coord_start for index in range(roles.coord_start, roles.coord_end + 1)}
        self.kinds.update({roles.ref_start: REF, roles.ref_end: REF_END, roles.box_start: BOX, roles.box_end: BOX_END})

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """input_ids: `[rows, n]`. Returns `[rows]` bool, True for a row to end."""
        done = input_ids[:, -1] == self.box_end
        for row in done.nonzero().flatten().tolist():
            done[row] = self.answer_to_keep(input_ids[row, self.prompt_length :]) is not None
        return done

    def answer_to_keep(self, answer: Sequence[int] | torch.Tensor) -> int | None:
        """How many tokens of an answer to keep if its last token completes a repetition, else None."""
        if not len(answer) or answer[-1] != self.box_end or not self._may_end(answer):
            return None
        kinds = [self.kinds.get(index, WORD - 1 - index) for index in _listed(answer)]  # words by their ids
        places = read_boxes(kinds)[-max(self.period * self.times, self.march) :]
        said = [(label and kinds[label.start : label.stop], kinds[at.start : at.stop]) for label, at in places]
        for period in range(1, min(self.period, len(said) // self.times) + 1):
            first = len(said) - period * (self.times - 1)
            if all(self._same(said[place], said[place - period]) for place in range(first, len(said))):
                break
        else:
            first = len(said) - self.march + 1
            if not 0 < self.march <= len(said) or not self._marches(said[-self.march :]):
                return None
        label, inside = places[first]
        # a label right before it is said again, too
        return (inside if label is None or inside.start - label.stop > 2 else label).start - 1

    def _may_end(self, answer: Sequence[int] | torch.Tensor) -> bool:
        """Whether its last box is a sliver, or ends where one of those before it did: most do not, which costs little.

        Cycles of more than `32 * period` tokens are not seen.
        """
        back = [*_listed(answer[-32 * self.period :])[::-1], 0, 0, 0, 0]
        y, x = back[1:3]
        if self.march and min(abs(x - back[4]), abs(y - back[3])) <= self.thin:
            return True
        end = 0
        with contextlib.suppress(ValueError):  # no more boxes
            for _ in range(self.period):
                end = back.index(self.box_end, end + 1)
                if abs(x - back[end + 2]) <= self.tolerance and abs(y - back[end + 1]) <= self.tolerance:
                    return True
        return False

    def _same(self, one: tuple[Any, list[int]], other: tuple[Any, list[int]]) -> bool:
        """Whether two (label, box or point) are the same, but for the tolerance."""
        (label, box), (other_label, other_box) = one, other
        if label != other_label or len(box) != len(other_box) or len(box) not in (2, 4) or min(*box, *other_box) < 0:
            return one == other
        room = (1, 1) if len(box) == 2 else (abs(box[2] - box[0]) // 4, abs(box[3] - box[1]) // 4) * 2
        return all(abs(a - b) <= min(most, self.tolerance) for a, b, most in zip(box, other_box, room, strict=True))

    def _marches(self, said: Sequence[tuple[Any, list[int]]]) -> bool:
        """Whether slivers of one label go along x or y in equal steps, side by side."""
        if any(label != said[0][0] or len(box) != 4 or min(box) < 0 for label, box in said):
            return False
        for axis in (0, 1):
            along = [sorted(box[axis::2]) for _, box in said]
            across = [sorted(box[1 - axis :: 2]) for _, box in said]
            widths = [stop - start for start, stop in along]
            steps = [after[0] - before[0] for before, after in pairwise(along)]
            alike = max(max(side) - min(side) for side in (*zip(*across, strict=True), widths, steps)) <= 1
            touching = 0 not in steps and max(map(abs, steps)) <= max(*widths, 1)
            if alike and touching and max(widths) <= self.thin:
                return True
        return False
