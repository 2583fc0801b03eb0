# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The language of questions and answers: tasks to prompts, answers to labelled boxes and points, and their end."""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise, takewhile
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import StoppingCriteria

if TYPE_CHECKING:  # a clone's scripts import this file by itself
    from .configuration import TokenRoles

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
ANSWER_START = f"{TURN_START}assistant\n"

# checkpoint.md, "Questions the model was trained on", word for word (its grammar slips included).
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
# Special tokens of the vocabulary that carry an answer: what a reader keeps when the others are skipped.
ANSWER_TOKENS = frozenset(
    ["<ref>", "</ref>", "<box>", "</box>", SEPARATOR, *(f"<{coordinate}>" for coordinate in range(1001))]
)

_COORDINATE = r"<(?:0|[1-9][0-9]{0,2}|1000)>"
_PIECES = re.compile(rf"<ref>|</ref>|<box>(?:{_COORDINATE}{_COORDINATE}){{1,2}}</box>")
_NUMBER = re.compile(r"[0-9]+")


class Grounding(NamedTuple):
    """One thing found: a box or a point.

    label: the model's words for it, "" where it gave none.
    coordinates: thousandths of the image's width and height, 0…1000: (x_min, y_min, x_max, y_max) or (x, y).
    """

    label: str
    coordinates: tuple[int, ...]

    @property
    def is_point(self) -> bool:
        return len(self.coordinates) == 2


def build_question(task: str, queries: str | Iterable[str] = ()) -> str:
    """The question the model was trained on (checkpoint.md, "Prompt").

    Args:
        task: a key of `TASKS`.
        queries: what to look for. "detect" takes one or several, "text" one or none (then: all the text there is),
            the others one.

    Raises:
        ValueError: an unknown task, an empty query, or another number of queries than the task takes.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}; expected one of {', '.join(TASKS)}.")
    queries = [queries] if isinstance(queries, str) else list(queries)
    if not all(isinstance(query, str) and query.strip() for query in queries):
        raise ValueError(f"queries: got {queries!r}; expected texts that are not empty.")
    if task == "text" and not queries:
        return ALL_TEXT
    if not queries:
        raise ValueError(f"queries: got none; task {task!r} needs something to look for.")
    if len(queries) > 1 and task != "detect":
        raise ValueError(f"queries: got {len(queries)}; task {task!r} takes one (only 'detect' takes several).")
    return TASKS[task].format(SEPARATOR.join(queries))


def parse_answer(text: str) -> list[Grounding]:
    """Reads the boxes and points of an answer (decoding.md §1, "Output grammar").

    Only `<box>`, two or four coordinates of 0…1000 and `</box>`, with nothing between, count: `<box>none</box>` and
    anything malformed yield nothing. `<ref>…</ref>` labels what follows, up to the next; a label that is not closed
    ends where the next box begins. Never raises on a string, and takes time linear in its length.

    Args:
        text: an answer with its special tokens kept.

    Returns:
        Groundings in the order of the text. A box's corners are sorted.
    """
    return [grounding for grounding, *_ in parse_places(text)]


def parse_places(text: str) -> list[tuple[Grounding, range, range]]:
    """`parse_answer`, and where in the text each grounding stands.

    Returns:
        (grounding, characters of its label, characters from `<box>` to `</box>`). A label of several groundings is in
        one place; none is an empty one.
    """
    found: list[tuple[Grounding, range, range]] = []
    label, opened = range(0), None
    for piece in _PIECES.finditer(text):
        token = piece[0]
        if token == "<ref>":
            opened = piece.end()
            continue
        if opened is not None:
            label, opened = range(opened, piece.start()), None
        if token != "</ref>":
            numbers = tuple(map(int, _NUMBER.findall(token)))
            coordinates = numbers if len(numbers) == 2 else _sorted_corners(numbers)
            words = text[label.start : label.stop].strip()
            found.append((Grounding(words, coordinates), label, range(piece.start(), piece.end())))
    return found


def geometric_mean(log_probabilities: Sequence[float]) -> float:
    """exp of the mean, in [0, 1]: the probability of a token, on an average. 1 for no tokens.

    A value above 0, which rounding may make of a probability of 1, counts as 0.
    """
    if not log_probabilities:
        return 1.0
    return math.exp(sum(min(0.0, value) for value in log_probabilities) / len(log_probabilities))


def to_pixels(coordinates: Sequence[int], width: float, height: float) -> tuple[float, ...]:
    """Coordinates in thousandths, x and y in turn, as pixels of a `width`×`height` image.

    With a width and height of 1 they are fractions of the image's sides.
    """
    return tuple(value * (height if i % 2 else width) / 1000 for i, value in enumerate(coordinates))


def _sorted_corners(box: tuple[int, ...]) -> tuple[int, ...]:
    x1, y1, x2, y2 = box
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


class GroundingMixin:
    """The answer side of a processor.

    tokenizer: LocateAnything's.
    """

    tokenizer: Any

    def post_process_image_text_to_text(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """Decodes what `generate` returned.

        Args:
            generated_outputs: ids `[rows, length]` or `[length]`, as a tensor, array or lists.
            skip_special_tokens: drop padding, turn marks and image slots. The tokens that carry an answer (labels,
                boxes, coordinates) stay, although the vocabulary calls them special too.
            clean_up_tokenization_spaces: as for the tokenizer's `decode`.

        Returns:
            One text per row. The text of a prompt is a prefix of the text of that prompt with its answer.

        Raises:
            ValueError: something else than ids.
        """
        rows = id_rows(generated_outputs)
        if skip_special_tokens:
            added = self.tokenizer.added_tokens_decoder.items()
            dropped = {index for index, token in added if token.special and token.content not in ANSWER_TOKENS}
            rows = [[index for index in row if index not in dropped] for row in rows]
        return [
            decode_ids(self.tokenizer, row, clean_up_tokenization_spaces=clean_up_tokenization_spaces) for row in rows
        ]

    def post_process_grounding(
        self, outputs: Any, target_sizes: Any = None, threshold: float | None = None
    ) -> list[dict[str, Any]]:
        """Labelled boxes and points of each answer, in the shape of transformers' object-detection post-processing.

        Only the answer is read: what follows the last opening of an assistant's turn, up to its end, or all of a row
        that holds no turns. So a question cannot plant a box. Malformed parts are left out, see
        `grounding.parse_answer`. Of ids, only the vocabulary's own tokens make a box: letters that spell `<box>` or
        `<7>` are words, and ids outside of the vocabulary nothing.

        Args:
            outputs: ids `[rows, length]` of prompts with their answers or of answers alone, a `ModelOutput` with such
                `sequences`, lists of ids, a text or a list of texts with special tokens kept.
            target_sizes: `[rows, 2]` or a list of (height, width) in pixels. None leaves fractions of the image's
                sides, 0…1.
            threshold: boxes and points with a lower score are left out; needs `token_log_probs`, which
                `generate(return_dict_in_generate=True, output_scores=True)` returns.

        Returns:
            Per row `boxes` float32 `[n, 4]` (x_min, y_min, x_max, y_max), `labels` (n texts, "" for none), `points`
            float32 `[m, 2]` (x, y) and `point_labels` (m texts), in pixels, or fractions without `target_sizes`.
            With `token_log_probs` also `scores` and `label_scores`, float32 `[n]`, `point_scores` and
            `point_label_scores`, `[m]`, in [0, 1]. The score of a box or point is the geometric mean of the
            probabilities of its coordinate tokens, as the model gave them when it accepted them; the score of a label
            that of its tokens, 1 where there is no label.

        Raises:
            ValueError: outputs of another kind, another number of target_sizes than rows, sizes that are not two
                positive numbers each, scores that do not fit the sequences, or a threshold without scores or outside
                of 0…1.
        """
        return read_answers(self.tokenizer, outputs, target_sizes, threshold)


_ROLE = ANSWER_START.removeprefix(TURN_START)
_WORD = "·"  # an ordinary token, where only the vocabulary's own count


def read_answers(tokenizer: Any, outputs: Any, target_sizes: Any, threshold: float | None) -> list[dict[str, Any]]:
    """`LocateAnythingProcessor.post_process_grounding`, whose docstring tells of arguments, returns and errors."""
    scores: Any = getattr(outputs, "token_log_probs", None)
    if threshold is not None:
        _check_threshold(threshold, scores)
    outputs = getattr(outputs, "sequences", outputs)
    if is_array(scores):
        return _read_scored(tokenizer, id_rows(outputs), scores, target_sizes, threshold or 0.0)
    if isinstance(outputs, str):
        outputs = [outputs]
    if is_list(outputs) and all(isinstance(row, str) for row in outputs):
        rows = [parse_answer(_answer_of(text)) for text in outputs]
    else:
        marks = _marks(tokenizer)
        answers = [_answer_in(tokenizer, ids) for ids in id_rows(outputs)]
        rows = [[item for item, *_ in _places(tokenizer, ids, marks)] for ids in answers]
    sizes = _sizes(target_sizes, len(rows))
    return [_in_tensors(items, width, height) for items, (height, width) in zip(rows, sizes, strict=True)]


def id_rows(outputs: Any) -> list[list[int]]:
    """Ids `[rows, length]` or `[length]`, as a tensor, array or lists → one list a row.

    Raises:
        ValueError: something else.
    """
    rows = to_list(outputs, "outputs") if is_array(outputs) else outputs
    if is_list(rows):
        rows = [to_list(row, "outputs") if is_array(row) else row for row in rows]
        if all(isinstance(row, Integral) for row in rows):
            rows = [rows] if rows else []
        if all(is_list(row) and all(isinstance(index, Integral) for index in row) for row in rows):
            return [list(map(int, row)) for row in rows]
    raise ValueError(f"outputs: got {type(outputs).__name__}; expected token ids [rows, length] or lists of them.")


def decode_ids(tokenizer: Any, ids: Sequence[int], **kwargs: Any) -> str:
    """Ids to text, special tokens kept. Ids that no vocabulary has, as -100 for "ignore", say nothing."""
    size = len(tokenizer)
    return tokenizer.decode([i for i in ids if 0 <= i < size], skip_special_tokens=False, **kwargs)


def _marks(tokenizer: Any) -> dict[int, str]:
    """The tokens of the vocabulary that make an answer's boxes and labels."""
    added = tokenizer.added_tokens_decoder.items()
    return {index: token.content for index, token in added if token.content in ANSWER_TOKENS}


def _places(tokenizer: Any, ids: Sequence[int], marks: Mapping[int, str]) -> list[tuple[Grounding, range, range]]:
    """`parse_places` of an answer's ids; the ranges are of tokens."""
    pieces = [marks.get(index, _WORD) for index in ids]
    ends = list(accumulate(map(len, pieces)))
    found = []
    for item, *places in parse_places("".join(pieces)):
        label, box = (
            range(bisect_right(ends, place.start), bisect_left(ends, place.stop) + 1) if place else range(0)
            for place in places
        )
        words = decode_ids(tokenizer, [ids[i] for i in label]).strip()
        found.append((item._replace(label=words), label, box))
    return found


def _answer_in(tokenizer: Any, ids: list[int]) -> list[int]:
    """`_answer_of` by ids: turns are opened and closed by the vocabulary's own tokens only."""
    start, end = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
    openings = [place for place, index in enumerate(ids) if index == start]
    answer = [] if openings else ids
    for opening in reversed(openings):
        opened = (
            stop
            for stop in range(opening + 1, min(opening + 1 + len(_ROLE), len(ids)) + 1)
            if decode_ids(tokenizer, ids[opening + 1 : stop]).startswith(_ROLE)
        )
        stop = next(opened, None)
        if stop is not None:
            answer = ids[stop:]
            break
    return list(takewhile(lambda index: index != end, answer))


def _answer_of(text: str) -> str:
    _, opening, answer = text.rpartition(ANSWER_START)
    if not opening and TURN_START in text:  # a prompt without an answer
        return ""
    return answer.partition(TURN_END)[0]


def _read_scored(
    tokenizer: Any, rows: list[list[int]], scores: torch.Tensor | np.ndarray, target_sizes: Any, threshold: float
) -> list[dict[str, Any]]:
    """rows: ids `[rows, prompt + new]`. scores: `[rows, new]` log-probabilities, NaN on padding."""
    fits = scores.ndim == 2 and len(scores) == len(rows) and all(len(row) >= scores.shape[1] for row in rows)
    floating = scores.is_floating_point() if isinstance(scores, torch.Tensor) else scores.dtype.kind == "f"
    if not fits or not floating:
        raise ValueError(
            f"outputs: got token_log_probs {scores.dtype} {list(scores.shape)} for {len(rows)} sequence(s) of "
            f"{sorted(set(map(len, rows)))} ids; expected floating point [rows, new ids]."
        )
    end, marks = tokenizer.convert_tokens_to_ids(TURN_END), _marks(tokenizer)
    found = []
    sizes = _sizes(target_sizes, len(rows))
    lines = to_list(scores, "outputs.token_log_probs")
    for ids, values, (height, width) in zip(rows, lines, sizes, strict=True):
        ids = ids[len(ids) - len(values) :]
        told = takewhile(lambda pair: pair[0] != end and not math.isnan(pair[1]), zip(ids, values, strict=True))
        items, box_scores, label_scores = [], [], []
        for item, label, box in _places(tokenizer, [index for index, _ in told], marks):
            score = geometric_mean([values[i] for i in box[1:-1]])
            if np.float32(score) < np.float32(threshold):  # scores come out in float32
                continue
            items.append(item)
            box_scores.append(score)
            label_scores.append(geometric_mean([values[i] for i in label]))
        found.append(_in_tensors(items, width, height, box_scores, label_scores))
    return found


def _in_tensors(
    items: list[Grounding],
    width: float,
    height: float,
    scores: list[float] | None = None,
    label_scores: list[float] | None = None,
) -> dict[str, Any]:
    """Boxes and points apart, in pixels of a `width`×`height` image."""
    found: dict[str, Any] = {}
    for kind, prefix, places in (("boxes", "", 4), ("points", "point_", 2)):
        own = [i for i, item in enumerate(items) if len(item.coordinates) == places]
        coordinates = [to_pixels(items[i].coordinates, width, height) for i in own]
        found[kind] = torch.tensor(coordinates, dtype=torch.float32).view(-1, places)
        found[f"{prefix}labels"] = [items[i].label for i in own]
        if scores is not None and label_scores is not None:
            found[f"{prefix}scores"] = torch.tensor([scores[i] for i in own], dtype=torch.float32)
            found[f"{prefix}label_scores"] = torch.tensor([label_scores[i] for i in own], dtype=torch.float32)
    return found


def _sizes(target_sizes: Any, rows: int) -> list[tuple[float, float]]:
    if target_sizes is None:
        return [(1, 1)] * rows
    sizes = to_list(target_sizes, "target_sizes") if is_array(target_sizes) else target_sizes
    if not is_list(sizes) or len(sizes) != rows:
        raise ValueError(f"target_sizes: got {sizes!r} for {rows} row(s); expected one (height, width) per row.")
    checked = []
    for size in sizes:
        pair = to_list(size, "target_sizes") if is_array(size) else size
        if not is_list(pair) or len(pair) != 2 or not all(is_number(s) and s > 0 for s in pair):
            raise ValueError(f"target_sizes: got {size!r}; expected (height, width) in pixels.")
        checked.append((pair[0], pair[1]))
    return checked


def _check_threshold(threshold: Any, scores: Any) -> None:
    number = isinstance(threshold, (int, float, np.floating)) and not isinstance(threshold, bool)
    if not number or not 0 <= threshold <= 1:
        raise ValueError(f"threshold: got {threshold!r}; expected a number from 0 to 1.")
    if not is_array(scores):
        raise ValueError(
            f"threshold: got {threshold} for outputs without scores; pass what generate(…, "
            "return_dict_in_generate=True, output_scores=True) returned."
        )


def is_number(value: Any) -> bool:
    """A number that float32 can hold: no NaN, no infinity."""
    return isinstance(value, Real) and abs(value) < 1e9  # type: ignore[operator]


def is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor))


def to_list(array: np.ndarray | torch.Tensor, name: str) -> Any:
    """An array's values in lists.

    Raises:
        ValueError: a sparse tensor, or one without values. The message begins with `name`.
    """
    try:
        return array.tolist()
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{name}: got a tensor whose values cannot be read ({error}).") from None


class Said(NamedTuple):
    """A box, point, "nothing found" or anything else between `<box>` and `</box>`.

    start: the place of its first token, or of its label's if that is said again. label, inside: ids.
    """

    start: int
    label: tuple[int, ...]
    inside: tuple[int, ...]


class DegenerateAnswerCriteria(StoppingCriteria):
    """Ends a row that repeats a box, cycles through boxes, or marches a sliver along an axis.

    Made by `model.degenerate_answer_criteria()`. In the drop-in's `generate` the answer keeps what came before the
    first repetition (of a march, its first box); elsewhere it ends with what is said, and `answer_to_keep` tells where
    to cut. What the row would have said after its repetitions is lost.

    Args:
        roles: the checkpoint's token roles.
        period: cycles of up to so many boxes are looked for; 1 finds only one box repeated at once. Boxes are the same
            if their labels are too; a label said more than `period * times` boxes ago is not known any more.
        times: how often a box or cycle must have been said, 2 or more.
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
        march: int = 10,
        thin: int = 5,
        prompt_length: int = 0,
    ):
        for name, value, least in (
            ("period", period, 1),
            ("times", times, 2),
            ("march", march, 0),
            ("thin", thin, 0),
            ("prompt_length", prompt_length, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: expected a whole number of {least} or more.")
        if 0 < march < 3:
            raise ValueError(f"march={march}: two boxes are no march; expected 0 for none, or 3 or more.")
        self.roles, self.period, self.times, self.march, self.thin = roles, period, times, march, thin
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """input_ids: `[rows, n]`. Returns `[rows]` bool, True for a row to end."""
        done = [self.answer_to_keep(ids[self.prompt_length :]) is not None for ids in input_ids.tolist()]
        return torch.tensor(done, device=input_ids.device)

    def answer_to_keep(self, answer: Sequence[int]) -> int | None:
        """How many tokens of an answer to keep if its last token completes a repetition, else None."""
        if not answer or answer[-1] != self.roles.box_end:
            return None
        said = read_boxes(answer, self.roles, most=max(self.period * self.times, self.march))
        for period in range(1, min(self.period, len(said) // self.times) + 1):
            last = [(one.label, one.inside) for one in said[-period * self.times :]]
            if all(last[i] == last[i - period] for i in range(period, len(last))):
                return said[len(said) - period * (self.times - 1)].start
        if self.march and len(said) >= self.march and self.marches(said[-self.march :]):
            return said[len(said) - self.march + 1].start
        return None

    def marches(self, said: Sequence[Said]) -> bool:
        """Whether slivers of one label go along x or y in equal steps, side by side."""
        low, high = self.roles.coord_start, self.roles.coord_end
        if any(len(one.inside) != 4 or one.label != said[0].label for one in said):
            return False
        if not all(low <= token <= high for one in said for token in one.inside):
            return False
        for axis in (0, 1):
            along = [sorted(one.inside[axis::2]) for one in said]
            across = [sorted(one.inside[1 - axis :: 2]) for one in said]
            widths = [stop - start for start, stop in along]
            steps = [after[0] - before[0] for before, after in pairwise(along)]
            alike = max(_spread(side) for side in (*zip(*across, strict=True), widths, steps)) <= 1
            touching = 0 not in steps and max(map(abs, steps)) <= max(*widths, 1)
            if alike and touching and max(widths) <= self.thin:
                return True
        return False


def read_boxes(answer: Sequence[int], roles: TokenRoles, most: int) -> list[Said]:
    """The last `most` of what an answer's ids say between `<box>` and `</box>`, in order.

    Text between boxes is passed over, but for labels: a box has the label before it, () if that is too far away.
    """
    found: list[Said] = []
    place, end, label_end = len(answer), None, None
    unnamed = 0  # boxes found, from the last one back, that wait for their label
    while place > 0:
        place -= 1
        token = answer[place]
        if token == roles.box_end:
            if len(found) == most:
                break
            end, label_end = place, None
        elif token == roles.box_start and end is not None:
            found.append(Said(place, (), tuple(answer[place + 1 : end])))
            end = None
        elif token == roles.ref_end:
            end, label_end = None, place
        elif token == roles.ref_start and label_end is not None:
            words = tuple(answer[place + 1 : label_end])
            found[unnamed:] = [one._replace(label=words) for one in found[unnamed:]]
            if unnamed < len(found) and answer[label_end + 1] == roles.box_start:
                found[-1] = found[-1]._replace(start=place)
            unnamed, label_end = len(found), None
    found.reverse()
    return found


def _spread(values: Sequence[int]) -> int:
    return max(values) - min(values)


__all__ = [
    "ANSWER_START",
    "ANSWER_TOKENS",
    "TASKS",
    "TURN_END",
    "TURN_START",
    "DegenerateAnswerCriteria",
    "Grounding",
    "GroundingMixin",
    "Said",
    "build_question",
    "decode_ids",
    "geometric_mean",
    "id_rows",
    "parse_answer",
    "parse_places",
    "read_boxes",
    "to_pixels",
]
