"""Questions word for word, and the reader of answers on anything."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locateanything.grounding import ANSWER_TOKENS, TASKS, Grounding, build_question, parse_answer, to_pixels

from .conftest import GOLDENS


@pytest.mark.parametrize(
    ("task", "queries", "question"),
    [
        ("detect", "cat", "Locate all the instances that matches the following description: cat."),
        ("detect", ["a", "b"], "Locate all the instances that matches the following description: a</c>b."),
        ("ground", "red {cup}", "Locate all the instances that match the following description: red {cup}."),
        ("single", ["cat"], "Locate a single instance that matches the following description: cat."),
        ("point", "the door", "Point to: the door."),
        ("text", "EXIT", "Please locate the text referred as EXIT."),
        ("text", (), "Detect all the text in box format."),
        ("gui", "OK button", "Locate the region that matches the following description: OK button."),
    ],
)
def test_questions(task, queries, question):
    assert build_question(task, queries) == question


@pytest.mark.parametrize(
    ("task", "queries", "message"),
    [
        ("caption", "x", "task: got 'caption'"),
        ("detect", [], "queries: got none"),
        ("detect", [" "], "not empty"),
        ("point", ["a", "b"], "takes one"),
        ("text", ["a", "b"], "takes one"),
        ("gui", [3], "expected texts"),
    ],
)
def test_refused_questions(task, queries, message):
    with pytest.raises(ValueError, match=message):
        build_question(task, queries)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("", []),
        ("none", []),
        ("<ref>cat</ref><box>none</box>", []),
        ("<ref>cat</ref><box><1><2><3><4></box>", [("cat", (1, 2, 3, 4))]),
        ("<ref>cat</ref><box><1><2><3><4></box><box><0><0><1000><1000></box>", [("cat", 4), ("cat", 4)]),
        ("<ref>a</ref><box><1><2></box><ref>b</ref><box><3><4></box>", [("a", (1, 2)), ("b", (3, 4))]),
        ("<box><1><2><3><4></box>", [("", (1, 2, 3, 4))]),
        ("<ref></ref><box><1><2></box>", [("", (1, 2))]),
        ("<ref>b\n é</ref> \n<box><9><8><3><4></box> tail", [("b\n é", (3, 4, 9, 8))]),
        ("<ref>open<box><1><2></box>", [("open", (1, 2))]),
        ("<ref>a<ref>b</ref><box><1><2></box>", [("b", (1, 2))]),
        ("</ref><box><1><2></box></ref>", [("", (1, 2))]),
        ("<box><1><2><3></box>", []),
        ("<box><1></box><box></box><box><1><2><3><4><5></box>", []),
        ("<box><1><2><3><4>", []),
        ("<1><2><3><4></box>", []),
        ("<box><1> <2></box>", []),
        ("<box><1><2><3><1001></box>", []),
        ("<box><01><2></box><box><-1><2></box><box><1.5><2></box><box><٣><٤></box>", []),
        ("<box><1><2><box><3><4></box>", [("", (3, 4))]),
        ("<ref>a</ref><box><1><none></box><box><5><6></box>", [("a", (5, 6))]),
    ],
)
def test_answers(answer, found):
    read = parse_answer(answer)
    assert [item.label for item in read] == [label for label, _ in found]
    for item, (_, expected) in zip(read, found, strict=True):
        assert len(item.coordinates) == expected if isinstance(expected, int) else item.coordinates == expected
        assert item.is_point == (len(item.coordinates) == 2)


coordinates = st.integers(0, 1000)
boxes = st.tuples(coordinates, coordinates, coordinates, coordinates).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)
labels = st.text(st.characters(exclude_characters="<>"), max_size=9).map(str.strip)


@given(st.lists(st.builds(Grounding, labels, st.one_of(boxes, st.tuples(coordinates, coordinates)))))
def test_a_written_answer_is_read_back(items):
    text = "".join(f"<ref>{i.label}</ref><box>{''.join(f'<{c}>' for c in i.coordinates)}</box>" for i in items)
    assert parse_answer(text) == items


pieces = st.sampled_from(
    [*sorted(ANSWER_TOKENS)[:9], "<ref>", "</ref>", "<box>", "</box>", "<1001>", "none", "<", ">"]
)


@given(st.one_of(st.text(), st.lists(st.one_of(pieces, st.text(max_size=3)), max_size=60).map("".join)))
def test_nothing_is_invented(text):
    for item in parse_answer(text):
        assert len(item.coordinates) in (2, 4)
        assert all(0 <= value <= 1000 for value in item.coordinates)
        assert item.label in text
        spelled = {f"<{value}>" for value in item.coordinates}
        assert all(token in text for token in spelled)
        assert "<box>" in text
        assert "</box>" in text


@pytest.mark.parametrize(
    "piece", ["<ref>", "<box>", "<box><1><2><3>", "<ref>a", "<", "<box><1><2><3><4></box>", "<1>"]
)
def test_long_hostile_answers_end(piece):
    parse_answer(piece * 300_000)  # quadratic time would take hours


def test_golden_answers_are_read():
    for line in (GOLDENS / "shapes" / "cases.jsonl").read_text().splitlines():
        case = json.loads(line)
        assert len(parse_answer(case["output"])) <= case["num_boxes"]


def test_pixels():
    assert to_pixels((0, 500, 1000, 250), 200, 80) == (0, 40, 200, 20)
    assert to_pixels((500, 1000), 1, 1) == (0.5, 1)
    assert set(TASKS) == {"detect", "ground", "single", "point", "text", "gui"}
