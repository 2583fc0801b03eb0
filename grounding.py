# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Questions; answers to labelled boxes and points with scores; when an answer goes round in circles."""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

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
ALL_TEXT = "Detect all the text in box format."
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
Words = Callable[[int, int], str]  # the text of tokens from … to
Sizes = Sequence[tuple[float, float]]
FRACTIONS = ((1, 1),)  # of a row whose size is not told


def build_question(task: str, queries: str | Iterable[str] = ()) -> str:
    """The question the model was trained on (docs/checkpoint.md, "Prompt").

    Args:
        task: a key of `TASKS`.
        queries: what to look for; a final period is not doubled. "detect" takes one or several (which are known to get
            each other's labels: `GroundingMixin.questions` asks one each), "text" one or none (then: all the text
            there is), the others one.

    Raises:
        ValueError: an unknown task, an empty query or one with the separator `</c>`, or another number of queries than
            the task takes.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}; expected one of {', '.join(TASKS)}.")
    texts = [text.strip().removesuffix(".") for text in _texts(queries)]
    if task == "text" and not texts:
        return ALL_TEXT
    if not texts or (len(texts) > 1 and task != "detect"):
        raise ValueError(f"queries: got {len(texts)}; task {task!r} takes one (only 'detect' takes several).")
    return TASKS[task].format(SEPARATOR.join(texts))


def read_boxes(kinds: Sequence[int], begin: int = 0) -> list[tuple[range | None, range]]:
    """The one reader of the answer grammar (docs/stock-behaviour.md §1, "Output grammar"), in linear time.

    `<ref>…</ref>` labels what follows, up to the next; a label that is not closed ends where the next box begins.

    Args:
        kinds: what each token is. begin: the first to read.

    Returns:
        For each `<box>` with its `</box>` the places of the label's words (None for no label) and of what is inside.
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
        """One conversation for each query, to be answered in one batch; `merge_grounding` makes one result of theirs.

        Args:
            image: anything that an image item may hold; it is encoded once for all of its questions.
            queries, task: as of `build_question`.
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
            skip_special_tokens: drop padding, turn marks and image slots. The tokens that carry an answer (labels,
                boxes, coordinates) stay, although the vocabulary calls them special too.
            kwargs: for the tokenizer's `decode`.

        Raises:
            ValueError: something else than ids.
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
        that holds no turns. So a question cannot plant a box. A box is `<box>`, two or four coordinates and `</box>`;
        anything malformed is left out. Of ids, only the vocabulary's own tokens make one: letters that spell `<box>`
        or `<7>` are words.

        Args:
            outputs: ids `[rows, length]` of prompts with their answers or of answers alone, a `ModelOutput` with such
                `sequences`, lists of ids, a text or a list of texts with special tokens kept.
            target_sizes: `[rows, 2]` or a list of (height, width) in pixels. A row of several images takes a list of
                them, one per image; its boxes lie in the image that the answer has named last, as `<image 2>`. None
                leaves fractions of the image's sides, 0…1.
            threshold: boxes and points with a lower score are left out; needs `outputs.token_log_probs`, which
                `generate(return_dict_in_generate=True, output_scores=True)` returns.
            queries: what was asked for, a list of texts for all rows or a list of lists, one per row.

        Returns:
            Per row `boxes` float32 `[n, 4]` (x_min, y_min, x_max, y_max), `labels` (n texts, "" for none), `points`
            float32 `[m, 2]` (x, y) and `point_labels` (m texts), in pixels, or fractions without `target_sizes`; and
            these, of points with `point_` before the name:

            - with `token_log_probs`, `scores` and `label_scores`, float32 in [0, 1]: the geometric mean of the
              probabilities of the coordinate tokens, and of the label's tokens (1 for no label), as the model gave
              them when it accepted them;
            - with `queries`, `class_ids`, long: the index of the query that the label is, but for case, spaces and a
              final period, or -1;
            - with a list of sizes for the row, `images`, long: the index of the image, -1 if the answer does not tell.

        Raises:
            ValueError: outputs of another kind; sizes, queries or log-probabilities that do not fit them, as one size
                for a prompt of several images; sizes that differ where the answer does not name the image; a threshold
                outside of 0…1, or without log-probabilities.
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

        Args:
            outputs, threshold, target_sizes: as there. text_labels: the queries.

        Returns:
            Per row `boxes`, `scores` (NaN without `token_log_probs`), `text_labels` (the model's words), `labels` (the
            `class_ids`, -1 without queries), `label_scores`, the same of points with `point_` before the name, and
            `images` as there.
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
            names = [name for name in results[0] if name.startswith("point") == bool(prefix)]
            columns = {name: [value for row in results for value in _listed(row[name])] for name in names}
            places, none = columns[kind], [0] * len(columns[kind])
            words = columns.get(f"{prefix}text_labels", columns[f"{prefix}labels"])
            scores, images = (columns.get(f"{prefix}{name}", none) for name in ("scores", "images"))
            kept: dict[Any, list[int]] = {}
            for i in sorted(range(len(places)), key=lambda i: -scores[i]):
                rivals = kept.setdefault((_plain(words[i]), images[i]), [])
                if all(_iou(places[i], places[other]) <= iou_threshold for other in rivals):
                    rivals.append(i)
            for name, values in columns.items():
                one = results[0][name]
                stay = [values[i] for i in sorted(chain.from_iterable(kept.values()))]
                merged[name] = stay if _is_list(one) else one.new_tensor(stay).view(-1, *one.shape[1:])
        return merged

    def _read(self, outputs: Any, target_sizes: Any, threshold: Any, queries: Any) -> list[dict[str, Any]]:
        """What `post_process_grounding` returns, with scores and class ids in any case."""
        log_probs = getattr(outputs, "token_log_probs", None)
        if threshold is not None and (not isinstance(threshold, Real) or not 0 <= threshold <= 1):
            raise ValueError(f"threshold: got {threshold!r}; expected a number from 0 to 1.")
        if threshold is not None and log_probs is None:
            raise ValueError(
                f"threshold: got {threshold} for outputs without token_log_probs; pass what generate(…, "
                "return_dict_in_generate=True, output_scores=True) returned."
            )
        outputs = getattr(outputs, "sequences", outputs)
        outputs = [outputs] if isinstance(outputs, str) else outputs
        if _is_list(outputs) and outputs and all(isinstance(text, str) for text in outputs):
            texts = [text.encode(errors="replace").decode() for text in outputs]  # lone surrogates are no text
            outputs = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        rows = _id_rows(outputs, "outputs")
        lines = [None] * len(rows) if log_probs is None else list(torch.as_tensor(log_probs))
        if len(lines) != len(rows) or any(
            len(ids) < len(line) for ids, line in zip(rows, lines, strict=True) if line is not None
        ):
            raise ValueError(
                f"outputs: got token_log_probs {log_probs!r}; expected [rows, new ids] of their sequences."
            )
        each = zip(rows, lines, _sizes(target_sizes, len(rows)), _classes(queries, len(rows)), strict=True)
        added = self.tokenizer.added_tokens_decoder.items()
        marks = {index: _KINDS[token.content] for index, token in added if token.content in _KINDS}
        results = []
        for ids, line, sizes, index_of in each:
            words = functools.partial(_words, self.tokenizer, ids)
            kinds = [marks.get(index, WORD) for index in ids]
            begin = _begin(kinds, words) if line is None else len(ids) - len(line)
            several = kinds[:begin].count(IMAGE) > 1 and sizes is not FRACTIONS
            shown = len(_SHOWN_IMAGE.findall(words(0, begin))) if several else 0
            if shown > 1 and shown != len(sizes):
                raise ValueError(
                    f"target_sizes: got {sizes} for {shown} images in a row; expected a list, one for each."
                )
            found = list(_found(kinds, words, begin, line if line is None else line.tolist(), sizes, index_of))
            if threshold is not None:
                found = [one for one in found if one.score >= threshold]
            results.append(_columns(found, isinstance(sizes, list)))
        return results


def _begin(kinds: Sequence[int], words: Words) -> int:
    """Where the answer begins: behind the last opening of an assistant's turn, or at once where there are no turns."""
    turns = [place for place, kind in enumerate(kinds) if kind == TURN]
    opened = (place + 1 for place in reversed(turns) if words(place, place + 11).startswith(ANSWER_START))
    return next(opened, len(kinds)) if turns else 0


class Found(NamedTuple):
    """A box or point in pixels, with what the columns of a result tell of it."""

    place: tuple[float, ...]
    label: str
    score: float
    label_score: float
    class_id: int
    image: int


def _found(
    kinds: Sequence[int],
    words: Words,
    begin: int,
    log_probs: Sequence[float] | None,
    sizes: Sizes,
    classes: Mapping[str, int],
) -> Iterator[Found]:
    """The boxes and points of the answer that begins there, with its tokens' log-probabilities."""

    def score(places: Sequence[int]) -> float:
        """Geometric mean, in float32 as it is told. Rounding may have made log-probabilities above 0."""
        if log_probs is None:
            return math.nan
        mean = sum(min(0.0, log_probs[place - begin]) for place in places) / (len(places) or 1)
        return torch.tensor(math.exp(mean), dtype=torch.float32).item()

    end = next((place for place in range(begin, len(kinds)) if kinds[place] == TURN_STOP), len(kinds))
    last, label, label_score, class_id = None, "", score(()), -1
    read, image = begin, 0 if len(sizes) == 1 else -1
    for said, inside in read_boxes(kinds[:end], begin):
        corners = kinds[inside.start : inside.stop]
        if len(corners) not in (2, 4) or min(corners) < 0:
            continue
        if said is not None and said is not last:  # once, however many boxes it has
            last, label, label_score = said, words(said.start, said.stop).strip(), score(said)
            class_id = classes.get(_plain(label), -1)
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
        xs = sorted(width * x / 1000 for x in corners[::2])
        ys = sorted(height * y / 1000 for y in corners[1::2])
        place = tuple(chain.from_iterable(zip(xs, ys, strict=True)))
        yield Found(place, label, score(inside), label_score, class_id, image)


def _columns(found: Sequence[Found], several: bool) -> dict[str, Any]:
    """Boxes and points apart, in tensors. several: whether to tell the image."""
    result: dict[str, Any] = {}
    for kind, prefix, length in (("boxes", "", 4), ("points", "point_", 2)):
        own = [one for one in found if len(one.place) == length]
        result[kind] = torch.tensor([one.place for one in own], dtype=torch.float32).view(-1, length)
        result[f"{prefix}labels"] = [one.label for one in own]
        result[f"{prefix}scores"] = torch.tensor([one.score for one in own], dtype=torch.float32)
        result[f"{prefix}label_scores"] = torch.tensor([one.label_score for one in own], dtype=torch.float32)
        result[f"{prefix}class_ids"] = torch.tensor([one.class_id for one in own], dtype=torch.long)
        if several:
            result[f"{prefix}images"] = torch.tensor([one.image for one in own], dtype=torch.long)
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
    lists = queries if per_row else [[] if queries is None else queries] * rows
    if len(lists) != rows:
        raise ValueError(f"queries: got {len(lists)} lists for {rows} row(s); expected one per row, or one for all.")
    return [{_plain(text): index for index, text in reversed([*enumerate(_texts(own))])} for own in lists]


def _sizes(target_sizes: Any, rows: int) -> list[Sizes]:
    """The (height, width) of each row's images, in a list where they came in one, else in a tuple of one."""
    if target_sizes is None:
        return [FRACTIONS] * rows
    lines = _listed(target_sizes)
    if not _is_list(lines) or len(lines) != rows:
        raise ValueError(f"target_sizes: got {lines!r} for {rows} row(s); expected one (height, width) per row.")
    sizes: list[Sizes] = []
    for line in map(_listed, lines):
        pairs = list(map(_listed, line)) if _is_list(line) else []
        sizes.append([tuple(pair) for pair in pairs] if pairs and all(map(_is_list, pairs)) else (tuple(pairs),))
        for pair in sizes[-1]:
            if len(pair) != 2 or not all(isinstance(side, Real) and 0 < side < 1e9 for side in pair):
                raise ValueError(f"target_sizes: got {line!r}; expected (height, width) in pixels, or a list of them.")
    return sizes


def _words(tokenizer: Any, ids: Sequence[int], start: int, stop: int, **kwargs: Any) -> str:
    """The text of ids from … to, special tokens kept. Ids that no vocabulary has say nothing."""
    size = len(tokenizer)
    known = [index for index in ids[start:stop] if 0 <= index < size]
    return tokenizer.decode(known, skip_special_tokens=False, **kwargs)


def _id_rows(ids: Any, name: str) -> list[list[int]]:
    """Ids `[rows, length]` or `[length]`, as a tensor, array or lists → one list a row."""
    rows = [_listed(row) for row in _listed(ids)] if _is_list(_listed(ids)) else [None]
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
        period: cycles of up to so many boxes are looked for; 1 finds only one box repeated at once. Boxes are the same
            if their labels are too.
        times: how often a box or cycle must have been said, 2 or more.
        tolerance: a box is the same as that of the cycle before if no coordinate differs by more, in thousandths of
            the image's side, nor by more than a quarter of the box's own side: small things in a row are not the same.
            A point may differ by 1. 0 for equal boxes only.
        march: slivers in a row that make a march: they touch or overlap, in equal steps, and are alike on the other
            axis; 0 for none.
        thin: how wide a sliver is at most, in thousandths of the image's side.
        prompt_length: tokens that are not the answer, where rows are not asked by the drop-in's `generate`.

    Raises:
        ValueError: a number out of range.
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
        said = read_boxes(kinds)[-max(self.period * self.times, self.march) :]
        labels = [label and kinds[label.start : label.stop] for label, _ in said]
        boxes = [kinds[inside.start : inside.stop] for _, inside in said]
        count = len(said)
        repeated = (
            count - period * (self.times - 1)
            for period in range(1, min(self.period, count // self.times) + 1)
            if all(
                labels[place] == labels[place - period] and self.agree(boxes[place], boxes[place - period])
                for place in range(count - period * (self.times - 1), count)
            )
        )
        first = next(repeated, None)
        if first is None and 0 < self.march <= count and self.marches(boxes[-self.march :]):
            first = count - self.march + 1 if all(label == labels[-1] for label in labels[-self.march :]) else None
        if first is None:
            return None
        label, inside = said[first]
        said_again = label is not None and inside.start - label.stop <= 2  # right before the box
        return label.start - 1 if said_again else inside.start - 1

    def _may_end(self, answer: Sequence[int] | torch.Tensor) -> bool:
        """Whether to read an answer: its last box is a sliver, or ends where one of those before it did.

        Most boxes do not, and this looks at few tokens: cycles of more than `32 * period` are not seen.
        """
        near = [0] * 4 + _listed(answer[-32 * self.period :])
        x, y = near[-3:-1]
        if self.march and min(abs(x - near[-5]), abs(y - near[-4])) <= self.thin:
            return True
        ends = [place for place, token in enumerate(near) if token == self.box_end][-self.period - 1 : -1]
        return any(max(abs(near[end - 2] - x), abs(near[end - 1] - y)) <= self.tolerance for end in ends)

    def agree(self, one: Sequence[int], other: Sequence[int]) -> bool:
        """Whether two boxes or points are the same, but for the tolerance."""
        if one == other:
            return True
        if len(one) != len(other) or len(one) not in (2, 4) or min(*one, *other) < 0:
            return False
        room = (1, 1) if len(one) == 2 else (abs(one[2] - one[0]) // 4, abs(one[3] - one[1]) // 4) * 2
        return all(abs(a - b) <= min(most, self.tolerance) for a, b, most in zip(one, other, room, strict=True))

    def marches(self, boxes: Sequence[Sequence[int]]) -> bool:
        """Whether slivers go along x or y in equal steps, side by side."""
        if any(len(box) != 4 or min(box) < 0 for box in boxes):
            return False
        for axis in (0, 1):
            along = [sorted(box[axis::2]) for box in boxes]
            across = [sorted(box[1 - axis :: 2]) for box in boxes]
            widths = [stop - start for start, stop in along]
            steps = [after[0] - before[0] for before, after in pairwise(along)]
            alike = max(max(side) - min(side) for side in (*zip(*across, strict=True), widths, steps)) <= 1
            touching = 0 not in steps and max(map(abs, steps)) <= max(*widths, 1)
            if alike and touching and max(widths) <= self.thin:
                return True
        return False


__all__ = ["ANSWER_TOKENS", "TASKS", "DegenerateAnswerCriteria", "GroundingMixin", "build_question"]
