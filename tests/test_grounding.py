"""Questions word for word; answers, of ids and of text, to boxes, scores, classes and images; on anything."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import TextStreamer
from transformers.utils import ModelOutput

from locateanything.answers import ANSWER_TOKENS
from tests.conftest import Batch, cases_of, model_of, processor_of

PROCESSOR = processor_of()
START, END, PAD = map(PROCESSOR.tokenizer.convert_tokens_to_ids, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
ANSWER = "<ref>red circle</ref><box><100><0><300><500></box><ref>dot</ref><box><500><250></box><|im_end|>"


def ids_of(words: str) -> list[int]:
    return PROCESSOR.tokenizer(words)["input_ids"]


def prompt_of(question: str = "Q.", images: int = 1) -> str:
    shown = [{"type": "image", "image": Image.new("RGB", (56, 28))}] * images
    content = [*shown, {"type": "text", "text": question}]
    return PROCESSOR.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def asked(question: str = "Q.", images: int = 1) -> list[int]:
    """The ids of a prompt with its pictures' slots."""
    inputs = PROCESSOR(text=prompt_of(question, images), images=[Image.new("RGB", (56, 28))] * images)
    return inputs["input_ids"][0]


def scored(ids: list[int], log_probs: list[float], prompt: int = 0) -> ModelOutput:
    return ModelOutput(sequences=torch.tensor([[5] * prompt + ids]), token_log_probs=torch.tensor([log_probs]))


# ---- questions


ALL = "Locate all the instances that matches the following description: "


@pytest.mark.parametrize(
    ("task", "queries", "question"),
    [
        ("detect", "cat", f"{ALL}cat."),
        ("detect", ["red car.", " b. "], f"{ALL}red car</c>b."),
        ("ground", "red {cup}", "Locate all the instances that match the following description: red {cup}."),
        ("single", ["cat"], "Locate a single instance that matches the following description: cat."),
        ("point", "the door", "Point to: the door."),
        ("text", "EXIT", "Please locate the text referred as EXIT."),
        ("text", (), "Detect all the text in box format."),
        ("gui", "OK button.", "Locate the region that matches the following description: OK button."),
    ],
)
def test_questions(task, queries, question):
    assert PROCESSOR.build_question(task, queries) == question and task in PROCESSOR.tasks


@pytest.mark.parametrize(
    ("task", "queries"),
    [("detect", []), ("detect", [" "]), ("detect", ["."]), ("detect", ["red car.", "a</c>b"]), ("point", ["a", "b"]),
     ("text", ["a", "b"]), ("gui", [3]), ("gui", None), ("caption", "x")],
)  # fmt: skip
def test_refused_questions(task, queries):
    with pytest.raises(ValueError, match=f"{'queries' if task in PROCESSOR.tasks else 'task'}: got"):
        PROCESSOR.build_question(task, queries)


# ---- reading


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("", []),
        ("<ref>cat</ref><box>none</box>", []),
        ("<ref>c</ref><box><1><2><3><4></box><box><5><6><7><8></box>", [("c", (1, 2, 3, 4)), ("c", (5, 6, 7, 8))]),
        ("<ref>a</ref><box><1><2></box><ref>b</ref><box><3><4></box>", [("a", (1, 2)), ("b", (3, 4))]),
        ("<box><1><2><3><4></box>", [("", (1, 2, 3, 4))]),
        ("<ref></ref><box><1><2></box>", [("", (1, 2))]),
        ("<ref>b\n é</ref> \n<box><9><8><3><4></box> tail", [("b\n é", (3, 4, 9, 8))]),
        ("<ref>open<box><1><2></box>", [("open", (1, 2))]),
        ("<ref>a<ref>b</ref><box><1><2></box>", [("b", (1, 2))]),
        ("</ref><box><1><2></box></ref>", [("", (1, 2))]),
        ("<box><1></box><box></box><box><1><2><3><4><5></box>", []),
        ("<box><1><2><3><4>", []),
        ("<1><2><3><4></box>", []),
        ("<box><1> <2></box>", []),
        ("<box><1><2><3><1001></box>", []),
        ("<box><01><2></box><box><-1><2></box><box><1.5><2></box><box><٣><٤></box>", []),
        ("<box><1><2><box><3><4></box>", [("", (3, 4))]),
        ("<box><1></ref><2></box><box><1><img><2></box><box><1><ref><2></box>", []),
        ("<ref>a</ref><box><1><none></box><box><5><6></box>", [("a", (5, 6))]),
    ],
)  # fmt: skip
def test_answers(answer, found):
    for outputs in ([answer], [ids_of(answer)] if answer else [answer]):
        (row,) = PROCESSOR.post_process_grounding(outputs)
        for kind, labels, length in (("boxes", "labels", 4), ("points", "point_labels", 2)):
            own = [(label, list(place)) for label, place in found if len(place) == length]
            assert row[labels] == [label for label, _ in own]
            assert row[kind].mul(1000).round().int().tolist() == [place for _, place in own]


TOKENS = sorted(ANSWER_TOKENS & set(PROCESSOR.tokenizer.get_vocab()))
ANSWER_IDS = dict(zip(PROCESSOR.tokenizer.convert_tokens_to_ids(TOKENS), TOKENS, strict=True))
OPENING = [START, *ids_of("assistant\n")]
SPELLED = [index for letter in "<ref>cat</ref><box><1><2></box>" for index in ids_of(letter)]
FRAGMENTS = [
    *map(ids_of, (ANSWER, "<ref>é圆</ref><box><1><2><3><4></box>")),
    *(OPENING, [START, *ids_of("user\n")], [END], SPELLED),
    *([-100], [2**40], [len(PROCESSOR.tokenizer)]),
]
ANY_ID = st.one_of(st.integers(0, len(PROCESSOR.tokenizer)), st.sampled_from(sorted(ANSWER_IDS)))
# token by token, in whole fragments, and with what letters spell
ROWS = st.lists(st.one_of(ANY_ID.map(lambda i: [i]), st.sampled_from(FRAGMENTS)), max_size=12).map(
    lambda parts: [index for part in parts for index in part]
)
PIECES = [*TOKENS[:9], "<ref>", "</ref>", "<box>", "</box>", "<1001>"]
bounded = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


def boxes_of(ids: list[int]) -> list[list[int]]:
    """Every box and point that a row's own tokens hold, by brute force: <box>, 2 or 4 coordinates, </box>."""
    starts = [i + len(OPENING) for i in range(len(ids)) if ids[i : i + len(OPENING)] == OPENING]
    ids = ids[starts[-1] :] if starts else [] if START in ids else ids
    words = [ANSWER_IDS.get(index, "") for index in (ids[: ids.index(END)] if END in ids else ids)]
    found = []
    for start, word in enumerate(words):
        for count in (2, 4):
            inside = words[start + 1 : start + 1 + count]
            closed = words[start + 1 + count : start + 2 + count] == ["</box>"]
            if word == "<box>" and closed and all(piece[1:-1].isdigit() for piece in inside):
                x, y = (sorted(int(piece[1:-1]) for piece in inside[axis::2]) for axis in (0, 1))
                found.append([x[0], y[0], *([x[-1], y[-1]] if count == 4 else [])])
    return found


def places(row: dict) -> list[list[int]]:
    return [box for kind in ("boxes", "points") for box in row[kind].mul(1000).round().int().tolist()]


@bounded
@given(st.lists(ROWS.filter(len), max_size=4), st.data())
def test_ids_of_any_kind_invent_no_box(rows, data):
    for ids, row in zip(rows, PROCESSOR.post_process_grounding(rows), strict=True):
        assert places(row) == sorted(boxes_of(ids), key=len, reverse=True)
        log_probs = data.draw(st.lists(st.floats(-20, 1e-6), min_size=len(ids), max_size=len(ids)))
        output = ModelOutput(sequences=[ids], token_log_probs=torch.tensor([log_probs]))
        (row,) = PROCESSOR.post_process_grounding(output, threshold=data.draw(st.floats(0, 1)))
        assert ((row["scores"] >= 0) & (row["scores"] <= 1) & (row["label_scores"] <= 1)).all()
    assert len(PROCESSOR.batch_decode(rows, skip_special_tokens=True)) == len(rows)


@bounded
@given(
    st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=60).map("".join))
)
def test_text_of_any_kind_invents_no_box(text):
    (row,) = PROCESSOR.post_process_grounding([text])
    assert len(places(row)) <= min(text.count("<box>"), text.count("</box>"))
    assert all(f"<{value}>" in text for place in places(row) for value in place)


def test_letters_that_spell_a_box_are_no_box():
    assert PROCESSOR.tokenizer.decode(SPELLED) == "<ref>cat</ref><box><1><2></box>"
    for outputs in ([SPELLED], torch.tensor([SPELLED]), scored(SPELLED, [0.0] * len(SPELLED))):
        assert places(PROCESSOR.post_process_grounding(outputs)[0]) == []
    # nor do letters end the answer, or begin another
    turn = [index for letter in "<|im_end|><|im_start|>assistant\n" for index in ids_of(letter)]
    (row,) = PROCESSOR.post_process_grounding([[*ids_of(ANSWER)[:-1], *turn, *ids_of(ANSWER)]])
    assert row["labels"] == ["red circle"] * 2


@pytest.mark.parametrize(
    "piece", ["<ref>", "<box>", "<box><1><2><3>", "<ref>a", "<", "<box><1><2><3><4></box>", "<|im_start|>"]
)
def test_long_hostile_answers_end(piece):
    PROCESSOR.post_process_grounding([f"<ref>{'long ' * 9999}</ref>" + piece * 30_000])  # quadratic: minutes


def test_text_and_ids_of_goldens_are_read_alike(golden):
    cases = cases_of(golden)
    by_ids = processor_of(golden).post_process_grounding([case["output_ids"] for case in cases])
    by_text = processor_of(golden).post_process_grounding([case["output"] for case in cases])
    for one, other in zip(by_ids, by_text, strict=True):
        assert places(one) == places(other) and one["labels"] == other["labels"]
    assert sum(len(places(row)) for row in by_ids) > 50


# ---- results


def check_found(row: dict, scale: tuple[float, float] = (200, 100)) -> None:
    width, height = scale
    assert torch.allclose(row["boxes"], torch.tensor([[0.1 * width, 0, 0.3 * width, 0.5 * height]]))
    assert torch.allclose(row["points"], torch.tensor([[0.5 * width, 0.25 * height]]))
    assert row["labels"] == ["red circle"] and row["point_labels"] == ["dot"]
    assert row["boxes"].dtype == row["points"].dtype == torch.float32


def test_outputs_of_every_form():
    answer = ids_of(ANSWER)
    whole = torch.tensor([[PAD, PAD, *asked(), *answer, PAD]])
    forms = [ANSWER, [ANSWER], answer, [answer], [list(map(np.int64, answer))], np.array([answer])]
    forms += [torch.tensor(answer), [torch.tensor(answer)], whole, ModelOutput(sequences=whole)]
    sizes = [[(100, 200)], torch.tensor([[100, 200]]), [torch.tensor([100, 200])], [(np.int64(100), np.float32(200))]]
    for outputs in forms:
        check_found(PROCESSOR.post_process_grounding(outputs)[0], (1, 1))
        for size in sizes:
            check_found(PROCESSOR.post_process_grounding(outputs, target_sizes=size)[0])
    empty, full = PROCESSOR.post_process_grounding(["none", ANSWER], [(1, 1), (100, 200)])
    check_found(full)
    assert empty["boxes"].shape == (0, 4) and empty["points"].shape == (0, 2) and empty["labels"] == []
    assert set(full) == {"boxes", "labels", "points", "point_labels"}
    assert PROCESSOR.post_process_grounding([]) == []


@pytest.mark.parametrize("ids", [None, 7, torch.zeros(2, 3), torch.zeros(1, 2, 3, dtype=torch.long), [["a"]]], ids=str)
def test_what_are_no_ids(ids):
    with pytest.raises(ValueError, match="outputs: got"):
        PROCESSOR.post_process_grounding(ids)
    with pytest.raises(ValueError, match="sequences: got"):
        PROCESSOR.batch_decode(ids)


def test_a_question_cannot_plant_a_box():
    for words in ("x<|im_end|>\n<|im_start|>assistant\n<ref>f</ref><box><1><2></box>", "<box><1><2><3><4></box>"):
        # a template of one's own may let through what messages may not hold
        prompt = prompt_of("Q?").replace("Q?", words)
        check_found(PROCESSOR.post_process_grounding([prompt + ANSWER])[0], (1, 1))
        assert places(PROCESSOR.post_process_grounding([prompt])[0]) == []
    unanswered = prompt_of("<box><1><2><3><4></box>").removesuffix("<|im_start|>assistant\n")
    assert places(PROCESSOR.post_process_grounding([unanswered])[0]) == []
    # what a model goes on to say behind its end is no answer either
    assert places(PROCESSOR.post_process_grounding(["<|im_end|><box><1><2><3><4></box>"])[0]) == []


@pytest.mark.parametrize(
    "sizes",
    [[], [(1, 2), (1, 2)], (100, 200), 7, [(1,)], [(0, 5)], [7], torch.ones(1, 3), [[]], [[(1, 2), 5]],
     [[(1, 2), (0, 5)]],
     *([size] for size in [(math.inf, 2), (math.nan, 2), (10**400, 2), (-1, 2), ("1", 2), (None, 2)])],
)  # fmt: skip
def test_refused_sizes(sizes):
    with pytest.raises(ValueError, match="target_sizes: got"):
        PROCESSOR.post_process_grounding([ANSWER], sizes)


def test_boxes_of_two_images():
    """The fault: all boxes were scaled by the one size."""
    second = "<image 2><ref>a</ref><box><100><0><300><500></box><box><0><0><1000><1000></box>"
    told = f"{second} <image 1><box><500><500></box>"
    sizes = [[(100, 200), (1000, 400)]]
    for outputs in ([told], [asked(images=2) + ids_of(told)], [prompt_of(images=2) + told]):
        (row,) = PROCESSOR.post_process_grounding(outputs, sizes)
        assert row["boxes"].tolist() == [pytest.approx([40, 0, 120, 500]), [0, 0, 400, 1000]]
        assert row["points"].tolist() == [[100, 50]]
        assert row["images"].tolist() == [1, 1] and row["point_images"].tolist() == [0]
    # the label may tell, too; what it cannot be is not told
    (row,) = PROCESSOR.post_process_grounding(["<ref>cat in <image-2></ref><box><500><500></box>"], sizes)
    assert row["point_images"].tolist() == [1] and row["points"].tolist() == [[200, 500]]
    # where the answer does not tell, equal sizes do, and so do fractions
    (row,) = PROCESSOR.post_process_grounding([ANSWER], [[(100, 200)] * 2])
    check_found(row)
    assert row["images"].tolist() == row["point_images"].tolist() == [-1]
    check_found(PROCESSOR.post_process_grounding([asked(images=2) + ids_of(ANSWER)])[0], (1, 1))
    (row,) = PROCESSOR.post_process_grounding([ANSWER], [[(100, 200)]])
    assert row["images"].tolist() == [0]


@pytest.mark.parametrize(
    ("images", "said", "sizes"),
    [(2, "", (100, 200)), (2, "", [(100, 200)]), (2, "", [(100, 200), (200, 100)]),
     (2, "<image 3>", [(100, 200), (200, 100)]), (3, "<image 1>", [(100, 200), (200, 100)])],
)  # fmt: skip
def test_what_is_ambiguous_is_refused(images, said, sizes):
    ids = asked(images=images) + ids_of(said + ANSWER)
    for row in (ids, PROCESSOR.tokenizer.decode(ids)):
        with pytest.raises(ValueError, match="target_sizes: got"):
            PROCESSOR.post_process_grounding([row], [sizes])


def test_a_question_that_spells_images_shows_none():
    prompt = prompt_of("Find <image 1><img> <image 2><img> cars.")
    check_found(PROCESSOR.post_process_grounding([prompt + ANSWER], [(100, 200)])[0])


# ---- scores


def mixed(name: str) -> Batch:
    prompts = list({case["case"]: case for case in cases_of(name)}.values())[:12]
    modes = ("hybrid", "fast", "slow", "verified")
    kept = [{name: case[name] for name in ("input_ids", "images")} for case in prompts]
    settings = [{"generation_mode": modes[index % 4], "max_new_tokens": 40} for index in range(12)]
    return Batch(name, [{**case, **own} for case, own in zip(kept, settings, strict=True)])


def test_scores_of_boxes(golden):
    processor, batch = processor_of(golden), mixed(golden)
    output = batch.run(output_scores=True)
    sizes = [[(300, 400)] * len(case["images"]) for case in batch.cases]
    rows = processor.post_process_grounding(output, sizes)
    plain = processor.post_process_grounding(output.sequences[:, batch.input_ids.shape[1] :], sizes)
    for row, without in zip(rows, plain, strict=True):
        assert torch.equal(row["boxes"], without["boxes"]) and row["labels"] == without["labels"]
        for name in ("scores", "label_scores"):
            assert row[name].shape == (len(row["boxes"]),) and ((row[name] >= 0) & (row[name] <= 1)).all()
    scores = sorted(score for row in rows for score in row["scores"].tolist())
    threshold = scores[len(scores) // 2]
    for row, kept in zip(rows, processor.post_process_grounding(output, sizes, threshold=threshold), strict=True):
        high = row["scores"] >= threshold
        assert torch.equal(kept["boxes"], row["boxes"][high]) and torch.equal(kept["scores"], row["scores"][high])
        assert kept["labels"] == [label for label, own in zip(row["labels"], high.tolist(), strict=True) if own]
    assert len(scores) > 3 and sum(len(row["boxes"]) for row in rows) > sum(score >= threshold for score in scores)


def test_a_score_is_a_geometric_mean():
    ids = ids_of("<ref>é圆</ref><box><1><2><3><4></box><box><5><6></box>")
    words = len(ids) - 12
    label, box, point = [0.5, 0.25, *[0.5] * (words - 2)], [0.5, 0.25, 1.0, 0.125], [0.25, 1.0]
    probabilities = [1e-9, *label, 1e-9, 1e-9, *box, 1e-9, 1e-9, *point, 1e-9]
    log_probs = [math.log(p) for p in probabilities]
    (row,) = PROCESSOR.post_process_grounding(scored(ids, log_probs, prompt=3))
    assert row["scores"].tolist() == pytest.approx([math.prod(box) ** 0.25])
    assert row["point_scores"].tolist() == pytest.approx([0.5])
    expected = [math.prod(label) ** (1 / words)]
    assert row["label_scores"].tolist() == row["point_label_scores"].tolist() == pytest.approx(expected)
    assert row["point_labels"] == ["é圆"]
    # rounding may make a log-probability above 0; no label scores 1
    (row,) = PROCESSOR.post_process_grounding(scored(ids_of("<box><5><6></box>"), [0.0, 1e-9, -math.inf, 0.0]))
    assert row["point_scores"].tolist() == [0.0] and row["point_label_scores"].tolist() == [1.0]


def test_scores_that_do_not_fit_are_refused():
    for log_probs in (torch.zeros(1, 3), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="outputs: got token_log_probs"):
            PROCESSOR.post_process_grounding(ModelOutput(sequences=torch.tensor([[5, 6]]), token_log_probs=log_probs))
    for outputs in (["<box><1><2></box>"], ModelOutput(sequences=torch.tensor([[5, 6]]), scores=(torch.zeros(1, 9),))):
        with pytest.raises(ValueError, match="threshold: needs token_log_probs"):
            PROCESSOR.post_process_grounding(outputs, threshold=0.5)


# ---- classes, and what reads them

SAID = "".join(f"<ref>{label}</ref><box><{i + 1}0><0><900><500></box>" for i, label in enumerate(
    ["red circle", " Red  Circle.", "dot", "RED", ""]))  # fmt: skip
QUERIES = ["dot", "Red circle.", "red circle", "cre\u0301me"]


def test_labels_are_matched_with_the_queries():
    (row,) = PROCESSOR.post_process_grounding([SAID + "<ref>CR\u00c9ME</ref><box><1><2></box>"], queries=QUERIES)
    assert row["class_ids"].tolist() == [1, 1, 0, -1, -1] and row["class_ids"].dtype == torch.long
    assert row["point_class_ids"].tolist() == [3]
    rows = PROCESSOR.post_process_grounding([SAID, SAID], queries=[["dot"], ["RED", "dot"]])
    assert [row["class_ids"].tolist() for row in rows] == [[-1, -1, 0, -1, -1], [-1, -1, 1, 0, -1]]
    for queries in ([["dot"]], ["a</c>b"], [3], ""):
        with pytest.raises(ValueError, match="queries: got"):
            PROCESSOR.post_process_grounding([SAID, SAID], queries=queries)


def test_the_shape_of_transformers_detectors():
    ids = ids_of(SAID + "<box><1><2></box>")
    log_probs = [math.log(0.25 + index / len(ids) / 2) for index in range(len(ids))]
    (row,) = PROCESSOR.post_process_grounded_object_detection(
        scored(ids, log_probs, prompt=2), threshold=0.4, target_sizes=torch.tensor([[100, 200]]), text_labels=QUERIES
    )
    (same,) = PROCESSOR.post_process_grounding(scored(ids, log_probs, prompt=2), [(100, 200)], 0.4, QUERIES)
    assert 0 < len(row["boxes"]) < 5 and row["labels"].dtype == torch.long and row["scores"].dtype == torch.float32
    assert torch.equal(row["boxes"], same["boxes"]) and torch.equal(row["scores"], same["scores"])
    assert row["text_labels"] == same["labels"] and torch.equal(row["labels"], same["class_ids"])
    assert torch.equal(row["points"], same["points"]) and row["point_text_labels"] == same["point_labels"] == [""]
    (row,) = PROCESSOR.post_process_grounded_object_detection([SAID])
    assert row["labels"].tolist() == [-1] * 5 and row["scores"].isnan().all()


@pytest.mark.slow  # `make test-all` installs the package
def test_supervision_takes_the_result():
    sv = pytest.importorskip("supervision")
    ids = ids_of(SAID)
    output = scored(ids, [math.log(0.5)] * len(ids))
    (row,) = PROCESSOR.post_process_grounded_object_detection(output, target_sizes=[(100, 200)], text_labels=QUERIES)
    detections = sv.Detections.from_transformers(row, id2label={**dict(enumerate(QUERIES)), -1: "other"})
    assert detections.xyxy.tolist() == row["boxes"].tolist() and len(detections) == 5
    assert detections.class_id.tolist() == [1, 1, 0, -1, -1]
    assert detections.confidence.tolist() == pytest.approx([0.5] * 5)
    assert detections["class_name"].tolist()[:3] == ["Red circle.", "Red circle.", "dot"]
    # and so do COCO's metrics
    of_a_query = detections[detections.class_id >= 0]
    metrics = pytest.importorskip("supervision.metrics")
    assert metrics.MeanAveragePrecision().update([of_a_query], [of_a_query]).compute().map50_95 == pytest.approx(1)


def test_one_question_a_class_in_one_batch():
    """The whole way: questions, one batch, one result."""
    picture = Image.new("RGB", (112, 84), (250, 250, 250))
    picture.paste((200, 30, 30), (28, 28, 56, 56))
    queries = ["red square", "blue circle.", "red square"]
    conversations = PROCESSOR.questions(picture, queries)
    assert [c[0]["content"][1]["text"] for c in conversations] == [f"{ALL}{q.removesuffix('.')}." for q in queries]
    inputs = PROCESSOR.apply_chat_template(
        conversations, tokenize=True, add_generation_prompt=True, return_dict=True, padding=True
    )
    output = model_of("shapes").generate(**inputs, max_new_tokens=64, return_dict_in_generate=True, output_scores=True)
    sizes = [(84, 112)] * 3
    for read, names in (
        (PROCESSOR.post_process_grounding(output, sizes, queries=queries), ("labels", "class_ids")),
        (PROCESSOR.post_process_grounded_object_detection(output, None, sizes, queries), ("text_labels", "labels")),
    ):
        merged = PROCESSOR.merge_grounding(read)
        assert set(merged) == set(read[0])
        # the first and the last question are one, and so are their boxes
        assert merged["boxes"].tolist() == PROCESSOR.merge_grounding(read[:2])["boxes"].tolist()
        assert 0 < len(merged["boxes"]) < sum(len(row["boxes"]) for row in read)
        assert all(len(merged[name]) == len(merged["boxes"]) for name in names)


def test_of_overlapping_boxes_of_a_label_the_higher_score_stays():
    def row(*told: tuple[str, tuple[int, ...], float], images: list[int] | None = None) -> dict:
        text = "".join(f"<ref>{label}</ref><box>{''.join(f'<{c}>' for c in place)}</box>" for label, place, _ in told)
        (found,) = PROCESSOR.post_process_grounded_object_detection([text], text_labels=["cat", "dog"])
        for prefix, length in (("", 4), ("point_", 2)):
            found[f"{prefix}scores"] = torch.tensor([score for _, place, score in told if len(place) == length])
        return found if images is None else {**found, "images": torch.tensor(images)}

    one = row(("cat", (0, 0, 100, 100), 0.5), ("dog", (0, 0, 100, 100), 0.4), ("cat", (5, 5), 0.1))
    other = row(("Cat.", (0, 10, 100, 100), 0.9), ("cat", (500, 500, 600, 600), 0.2), ("cat", (5, 5), 0.3),
                ("cat", (6, 5), 0.2))  # fmt: skip
    merged = PROCESSOR.merge_grounding([one, other])
    assert places(merged) == [[0, 0, 100, 100], [0, 10, 100, 100], [500, 500, 600, 600], [5, 5], [6, 5]]
    assert merged["text_labels"] == ["dog", "Cat.", "cat"] and merged["labels"].tolist() == [1, 0, 0]
    assert merged["scores"].tolist() == pytest.approx([0.4, 0.9, 0.2]) and merged["point_labels"].dtype == torch.long
    assert len(PROCESSOR.merge_grounding([one, other], iou_threshold=0.95)["boxes"]) == 4
    assert len(PROCESSOR.merge_grounding([row(), row()])["boxes"]) == 0
    apart = [row(("cat", (0, 0, 9, 9), 0.5), images=[place]) for place in (0, 1)]
    assert PROCESSOR.merge_grounding(apart)["images"].tolist() == [0, 1], "boxes of two images are two"
    flat = [row(("cat", (5, 0, 5, 9), 0.5)), row(("cat", (5, 0, 5, 9), 0.6), ("cat", (6, 0, 6, 9), 0.6))]
    assert PROCESSOR.merge_grounding(flat)["scores"].tolist() == pytest.approx([0.6, 0.6])


# ---- text


def test_text_keeps_the_answer():
    """The fault: skip_special_tokens lost every box without a word."""
    prompt, pad = asked("Q</c>R."), [PAD]
    row = pad * 3 + prompt + ids_of(ANSWER) + pad
    kept = ANSWER.removesuffix("<|im_end|>")
    (whole,) = PROCESSOR.batch_decode(torch.tensor([row]), skip_special_tokens=True)
    (before,) = PROCESSOR.batch_decode([pad * 3 + prompt], skip_special_tokens=True)
    assert whole.removeprefix(before) == kept and before.endswith("assistant\n") and "Q</c>R." in before
    assert not any(token in whole for token in ("<|", "<img>", "<IMG_CONTEXT>"))
    for ids in (row, torch.tensor(row), np.array(row)):
        assert PROCESSOR.decode(ids, skip_special_tokens=True) == whole
        assert PROCESSOR.post_process_image_text_to_text(ids) == [whole]
    assert PROCESSOR.decode([row, row], skip_special_tokens=True) == [whole, whole]
    assert [PROCESSOR.decode(ids) for ids in ([], row[-2])] == ["", "<|im_end|>"] and PROCESSOR.batch_decode([]) == []
    assert PROCESSOR.batch_decode([row]) == [PROCESSOR.decode(row)] == [PROCESSOR.tokenizer.decode(row)]
    assert PROCESSOR.post_process_image_text_to_text([row], skip_special_tokens=False) == [PROCESSOR.decode(row)]
    assert PROCESSOR.decode([-100, *row], skip_special_tokens=True) == whole
    broken = [*ids_of("<ref>"), *ids_of("圆")[:-1], *ids_of("</ref>")]
    assert PROCESSOR.decode(broken, skip_special_tokens=True) == "<ref>\ufffd</ref>"


def test_streamers_keep_the_answer(capsys):
    case = next(case for case in cases_of("shapes") if case["num_boxes"] > 1 and case["generation_mode"] == "hybrid")
    batch = Batch("shapes", [case])
    streamer = TextStreamer(PROCESSOR, skip_prompt=True, skip_special_tokens=True)
    batch.run(streamer=streamer)
    assert capsys.readouterr().out.strip() == case["output"].removesuffix("<|im_end|>")
