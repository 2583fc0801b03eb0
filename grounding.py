# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""The questions that the model was trained on; its answers to labelled boxes and points with scores."""

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch

from .answers import ANSWER_START, ANSWER_TOKENS, IMAGE, KINDS, SEPARATOR, TURN, WORD, read_boxes

# docs/checkpoint.md, "Questions the model was trained on", word for word (its grammar slips included).
TASKS: dict[str, str] = {
    "detect": "Locate all the instances that matches the following description: {}.",
    "ground": "Locate all the instances that match the following description: {}.",
    "single": "Locate a single instance that matches the following description: {}.",
    "point": "Point to: {}.",
    "text": "Please locate the text referred as {}.",
    "gui": "Locate the region that matches the following description: {}.",
}
_SHOWN_IMAGE = re.compile(r"<image [0-9]+><img><IMG_CONTEXT>")
_NAMED_IMAGE = re.compile(r"<image[ -]([0-9]{1,9})>")
FRACTIONS = ((1, 1),)  # the sizes of a row that is not scaled


class GroundingMixin:
    """The side of a processor that asks the model's questions and reads its answers, by its `tokenizer`."""

    tokenizer: Any
    tasks = tuple(TASKS)

    @staticmethod
    def build_question(task: str, queries: str | Iterable[str] = ()) -> str:
        """The question the model was trained on (docs/checkpoint.md, "Prompt").

        Args:
            task: a key of `TASKS`.
            queries: what to look for; a final period is not doubled. "detect" takes one or several, which are known to
                get each other's labels (`questions` asks one each), "text" one or none, the others one.

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

    @staticmethod
    def questions(image: Any, queries: str | Iterable[str], task: str = "detect") -> list[list[dict[str, Any]]]:
        """One conversation about an image for each query, to be answered in one batch and merged (`merge_grounding`).

        image: anything that an image item may hold. queries, task: as of `build_question`.
        """
        texts = [GroundingMixin.build_question(task, query) for query in _texts(queries)]
        item = {"type": "image", "image": image}
        return [[{"role": "user", "content": [item, {"type": "text", "text": text}]}] for text in texts]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """`batch_decode` of one row of ids, to a text; so streamers take the processor as their tokenizer."""
        ids = _listed(token_ids)
        texts = self.batch_decode(ids if isinstance(ids, list) else [ids], skip_special_tokens, **kwargs)
        return texts if isinstance(ids, list) and ids and isinstance(ids[0], list) else "".join(texts)

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
            dropped = _unsaid(self.tokenizer, len(self.tokenizer))
            rows = [[index for index in row if index not in dropped] for row in rows]
        return [self._text(row, **kwargs) for row in rows]

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
                `sequences`, a list of `GenerationOutput`s of requests, lists of ids, a text or a list of texts with
                special tokens kept.
            target_sizes: `[rows, 2]` or a list of (height, width) in pixels. A row of several images takes a list of
                them, one per image; its boxes lie in the image that the answer has named last, as `<image 2>`. None
                leaves fractions of the image's sides, 0…1.
            threshold: what scores lower is left out; needs `outputs.token_log_probs`, which
                `generate(return_dict_in_generate=True, output_scores=True)` returns; requests' outputs have them.
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
        outputs = _of_requests(outputs)
        scores = () if getattr(outputs, "token_log_probs", None) is None else ("scores", "label_scores")
        names = scores if queries is None else (*scores, "class_ids")
        return self._read(outputs, target_sizes, threshold, queries, *names)

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
        names_read = "scores", "label_scores", "class_ids"
        rows = self._read(_of_requests(outputs), target_sizes, threshold, text_labels, *names_read)
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
                merged[name] = stay if isinstance(one, list) else one.new_tensor(stay).view(-1, *one.shape[1:])
        return merged

    def _text(self, ids: Sequence[int], **kwargs: Any) -> str:
        """The text of ids, special tokens kept. Ids that no vocabulary has say nothing."""
        size = len(self.tokenizer)
        return self.tokenizer.decode([i for i in ids if 0 <= i < size], skip_special_tokens=False, **kwargs)

    def _read(self, outputs: Any, target_sizes: Any, threshold: Any, queries: Any, *names: str) -> list[Any]:
        """What `post_process_grounding` returns, with these columns beside the boxes, points and labels."""
        log_probs: Any = getattr(outputs, "token_log_probs", None)
        if threshold is not None and log_probs is None:
            raise ValueError("threshold: needs token_log_probs, as generate(…, output_scores=True) returns them.")
        outputs = getattr(outputs, "sequences", outputs)
        outputs = [outputs] if isinstance(outputs, str) else outputs
        if isinstance(outputs, (list, tuple)) and outputs and isinstance(outputs[0], str):
            outputs = self.tokenizer(list(outputs), add_special_tokens=False, verbose=False)["input_ids"]
        rows = _id_rows(outputs, "outputs")
        lines = [None] * len(rows) if log_probs is None else _listed(log_probs)
        if len(lines) != len(rows) or any(len(line or ()) > len(ids) for line, ids in zip(lines, rows, strict=True)):
            raise ValueError(f"outputs: got token_log_probs of {len(lines)} other sequences.")
        marks = _marks(self.tokenizer, len(self.tokenizer))
        kinds = [[marks.get(index, WORD) for index in ids] for ids in rows]
        sizes, classes = _sizes(target_sizes, len(rows)), _classes(queries, len(rows))
        found = map(self._found, rows, kinds, lines, sizes, classes)
        several = [("images",) if isinstance(size, list) else () for size in sizes]
        return [_columns(own, threshold, names + images) for own, images in zip(found, several, strict=True)]

    def _found(self, ids: list[int], kinds: list[int], log_probs: Any, sizes: Any, classes: Any) -> Iterator[Any]:
        """The places, in pixels, of the boxes and points of a row's answer, and what is told of each."""

        def score(places: Sequence[int]) -> float:
            """Geometric mean, in float32 as it is told. Rounding may have made log-probabilities above 0."""
            if log_probs is None:
                return math.nan
            mean = sum(min(0.0, log_probs[place - begin]) for place in places) / (len(places) or 1)
            return torch.tensor(math.exp(mean), dtype=torch.float32).item()

        text = self._text
        turns = [place for place, kind in enumerate(kinds) if kind == TURN]
        opened = (place + 1 for place in reversed(turns) if text(ids[place : place + 11]).startswith(ANSWER_START))
        begin = next(opened, len(ids) if turns else 0) if log_probs is None else len(ids) - len(log_probs)
        shown = len(_SHOWN_IMAGE.findall(text(ids[:begin]))) if kinds[:begin].count(IMAGE) > 1 else 0
        if shown > 1 and shown != len(sizes) and sizes != FRACTIONS:
            raise ValueError(f"target_sizes: got {sizes} for a row of {shown} images; expected a list of as many.")
        last, read, image = None, begin, 0 if len(sizes) == 1 else -1
        label = {"labels": "", "label_scores": score(()), "class_ids": -1}
        for said, inside in read_boxes(kinds, begin):
            corners = kinds[inside.start : inside.stop]
            if len(corners) not in (2, 4) or min(corners) < 0:
                continue
            if said is not None and said is not last:  # once, however many boxes it has
                last, words = said, text(ids[said.start : said.stop]).strip()
                label = {"labels": words, "label_scores": score(said), "class_ids": classes.get(_plain(words), -1)}
            if len(sizes) > 1:
                for number in map(int, _NAMED_IMAGE.findall(text(ids[read : inside.start]))):
                    image = number - 1 if 0 < number <= len(sizes) else -1
                read = inside.stop
            if image < 0 and len(set(sizes)) > 1:
                raise ValueError(f"target_sizes: got {sizes}, but no image is named; expected equal sizes, or None.")
            height, width = sizes[image]
            xs, ys = sorted(width * x / 1000 for x in corners[::2]), sorted(height * y / 1000 for y in corners[1::2])
            place = tuple(chain.from_iterable(zip(xs, ys, strict=True)))
            yield place, {**label, "scores": score(inside), "images": image}


@lru_cache(maxsize=8)
def _marks(tokenizer: Any, size: int) -> dict[int, int]:
    """The ids that have a kind. size: of the vocabulary, as listing it takes as long as reading a hundred answers."""
    added = tokenizer.added_tokens_decoder.items()
    return {index: KINDS[token.content] for index, token in added if token.content in KINDS}


@lru_cache(maxsize=8)
def _unsaid(tokenizer: Any, size: int) -> frozenset[int]:
    """The ids of special tokens that carry no answer. size: as of `_marks`."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(index for index, token in added if token.special and token.content not in ANSWER_TOKENS)


def _of_requests(outputs: Any) -> Any:
    """`GenerationOutput`s of requests as if they were one of `generate`; anything else as it is."""
    if isinstance(outputs, (list, tuple)) and outputs and hasattr(outputs[0], "generated_tokens"):
        sequences = [output.prompt_ids + output.generated_tokens for output in outputs]
        return SimpleNamespace(sequences=sequences, token_log_probs=[output.logprobs for output in outputs])
    return outputs


def _columns(found: Iterable[Any], threshold: float | None, names: Iterable[str]) -> dict[str, Any]:
    """Boxes and points apart, each with its label and the columns of these names, in tensors."""
    result: dict[str, Any] = {}
    found = [one for one in found if threshold is None or one[1]["scores"] >= threshold]
    for kind, prefix, length in (("boxes", "", 4), ("points", "point_", 2)):
        own = [one for one in found if len(one[0]) == length]
        result[kind] = torch.tensor([place for place, _ in own], dtype=torch.float32).view(-1, length)
        result[f"{prefix}labels"] = [told["labels"] for _, told in own]
        for name in names:
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
    per_row = isinstance(queries, (list, tuple)) and any(isinstance(each, (list, tuple)) for each in queries)
    lists = list(map(_texts, queries)) if per_row else [[] if queries is None else _texts(queries)] * rows
    if len(lists) != rows:
        raise ValueError(f"queries: got {len(lists)} lists for {rows} row(s); expected one per row, or one for all.")
    return [{_plain(text): index for index, text in reversed([*enumerate(texts)])} for texts in lists]


def _sizes(target_sizes: Any, rows: int) -> list[Any]:
    """The (height, width) of each row's images, in a list where they came in one, else in a tuple of one."""
    lines = _listed(FRACTIONS * rows if target_sizes is None else target_sizes)
    if not isinstance(lines, list) or len(lines) != rows:
        raise ValueError(f"target_sizes: got {lines!r} for {rows} row(s); expected one (height, width) per row.")
    sizes: list[Any] = []
    for line in lines:
        several = isinstance(line, list) and len(line) > 0 and isinstance(line[0], list)
        for pair in line if several else [line]:
            shaped = isinstance(pair, list) and len(pair) == 2 and all(isinstance(side, (int, float)) for side in pair)
            if not shaped or not all(0 < side < 1e9 for side in pair):
                raise ValueError(f"target_sizes: got {line!r}; expected (height, width) in pixels, or a list of them.")
        sizes.append(list(map(tuple, line)) if several else (tuple(line),))
    return sizes


def _id_rows(ids: Any, name: str) -> list[list[int]]:
    """Ids `[rows, length]` or `[length]`, as a tensor, array or lists → one list a row."""
    rows = _listed(ids)
    rows = [rows] if isinstance(rows, list) and rows and isinstance(rows[0], int) else rows
    if not isinstance(rows, list) or not all(isinstance(row, list) and {*map(type, row)} <= {int} for row in rows):
        raise ValueError(f"{name}: got {type(ids).__name__}; expected token ids [rows, length] or lists of them.")
    return rows


def _listed(value: Any) -> Any:
    """Tensors, arrays and tuples, however nested, as lists; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [each if type(each) in (int, float) else _listed(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value
