"""generate's contract: transformers' arguments, results and callbacks, and clear errors before heavy work."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BatchFeature, GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.utils import ModelOutput

from tests.conftest import Batch, cases_of, draws_as_recorded, pixels_of, recorded_cases, tokenizer_of


def greedy(mode: str, count: int, **wanted) -> list[dict]:
    """Golden cases without any recipe, that ended by themselves."""
    cases = [
        case
        for case in cases_of("shapes")
        if case["generation_mode"] == mode and case["max_new_tokens"] == 256 and "repetition_penalty" not in case
        if "seed" not in case and all(case[key] == value for key, value in wanted.items())
        if 15 < case["num_tokens"] < 100
    ]
    assert len(cases) >= count
    return cases[:count]


@pytest.fixture
def batch() -> Batch:
    return Batch("shapes", greedy("hybrid", 4))


@pytest.fixture
def lone() -> Batch:
    return Batch("shapes", greedy("slow", 1))


# ---- results


def test_the_default_is_greedy_hybrid_ids(batch):
    output = batch.model.generate(**batch.inputs)
    assert isinstance(output, torch.Tensor) and output.dtype == torch.long
    assert torch.equal(output[:, : batch.input_ids.shape[1]], batch.input_ids)
    assert batch.answers(output) == batch.expected()
    assert output.shape[1] == batch.input_ids.shape[1] + max(len(ids) for ids in batch.expected())


def test_a_dict_holds_sequences_and_forwards(batch):
    output = batch.model.generate(**batch.inputs, return_dict_in_generate=True)
    assert isinstance(output, ModelOutput)
    assert output.row_forwards.dtype == torch.long
    assert output.finish_reasons == ["end"] * 4 and output.row_errors == [None] * 4
    assert output.row_forwards.tolist() == [case["forward_step"] for case in batch.cases]
    assert torch.equal(output[0], output.sequences)


def test_pad_token_id(batch):
    output = batch.model.generate(**batch.inputs, pad_token_id=7)
    width = batch.input_ids.shape[1]
    for row, case in zip(output.tolist(), batch.cases, strict=True):
        assert set(row[width + len(case["output_ids"]) :]) <= {7}
    assert 7 in output[:, width:]


def test_inputs_may_come_in_other_ways(batch):
    """By position, without a mask, bool, as arrays, images as a list or as features; pixels beside them are unused."""
    model, pixels, grids = batch.model, batch.inputs["pixel_values"], batch.inputs["image_grid_hws"]
    images = list(pixels.split(grids.prod(1).tolist()))
    with torch.no_grad():
        features = model.extract_feature(pixels, grids)
    assert features[0].shape[1] == 4 * model.config.vision_config.hidden_size
    arrays = {name: value.numpy() for name, value in batch.inputs.items()}
    unused = {"pixel_values": torch.zeros(1), "image_grid_hws": torch.tensor([[1, 1]])}
    for way in (
        {"inputs": batch.input_ids, "input_ids": None},
        {"attention_mask": None},
        {"attention_mask": batch.attention_mask.bool()},
        arrays,
        {"pixel_values": images},
        {"pixel_values": [image.numpy() for image in images]},
        {"visual_features": features, **unused},
        {"visual_features": [feature.numpy() for feature in features], "pixel_values": None},
    ):
        assert batch.answers(model.generate(**{**batch.inputs, **way})) == batch.expected(), way.keys()


def test_a_prompt_without_images(shapes):
    output = shapes.generate(input_ids=torch.tensor([[419, 354, 198, 297, 325]]), max_new_tokens=6)
    assert 6 <= output.shape[1] <= 5 + 11


# ---- limits and ends


def test_max_new_tokens_and_the_windows_overshoot(lone):
    for limit in (1, 2, 7):
        slow = lone.model.generate(**lone.inputs, generation_mode="slow", max_new_tokens=limit)
        assert slow.shape[1] == lone.input_ids.shape[1] + limit
        fast = lone.model.generate(**lone.inputs, generation_mode="fast", max_new_tokens=limit)
        assert limit <= fast.shape[1] - lone.input_ids.shape[1] <= limit + 5


def test_max_length_counts_a_rows_own_tokens():
    cases = [case for case in greedy("slow", 10) if case["num_tokens"] > 12]
    cases = [cases[0], max(cases, key=lambda case: len(case["input_ids"]))]
    lengths = [len(case["input_ids"]) for case in cases]
    batch = Batch("shapes", cases, extra_padding=4)
    limits = [length + new for length, new in zip(lengths, (3, 9), strict=True)]
    output = batch.model.generate(**batch.inputs, generation_mode="slow", max_length=limits)
    new = output[:, batch.input_ids.shape[1] :].tolist()
    assert new[0][:3] == cases[0]["output_ids"][:3] and set(new[0][3:]) == {batch.model.config.pad_token_id}
    assert new[1] == cases[1]["output_ids"][:9]
    config = GenerationConfig(max_length=limits[1])
    one = batch.model.generate(**Batch("shapes", cases[1:]).inputs, generation_mode="slow", generation_config=config)
    assert one[0, lengths[1] :].tolist() == cases[1]["output_ids"][:9]
    # the argument speaks before the config
    config, told = GenerationConfig(max_new_tokens=2), {"generation_mode": "slow", "max_length": limits}
    assert torch.equal(batch.model.generate(**batch.inputs, generation_config=config, **told), output)


def test_eos_token_id_adds_ends(batch):
    end_of_box = batch.model.config.box_end_token_id
    for mode in ("hybrid", "fast", "slow"):
        cases = greedy(mode, 3)
        batch = Batch("shapes", cases)
        for eos in (end_of_box, [end_of_box, 3], torch.tensor([end_of_box])):
            new = batch.model.generate(**batch.inputs, generation_mode=mode, eos_token_id=eos)
            for row, case in zip(new[:, batch.input_ids.shape[1] :].tolist(), cases, strict=True):
                upto = case["output_ids"].index(end_of_box) + 1
                assert row[:upto] == case["output_ids"][:upto]
                assert set(row[upto:]) <= {batch.model.config.pad_token_id}


def test_naming_the_models_own_end_changes_nothing(batch):
    end = batch.model.config.text_config.eos_token_id
    assert batch.answers(batch.model.generate(**batch.inputs, eos_token_id=end)) == batch.expected()


# ---- settings from a GenerationConfig


def test_a_generation_config_speaks_and_arguments_overrule_it(lone):
    config = GenerationConfig(max_new_tokens=5, return_dict_in_generate=True)
    output = lone.model.generate(**lone.inputs, generation_config=config, generation_mode="slow")
    assert output.sequences.shape[1] == lone.input_ids.shape[1] + 5
    output = lone.model.generate(**lone.inputs, generation_config=config, generation_mode="slow", max_new_tokens=3)
    assert output.sequences.shape[1] == lone.input_ids.shape[1] + 3
    assert config.max_new_tokens == 5, "the caller's config is not written to"


def test_the_models_generation_config_speaks(lone):
    default = lone.model.generation_config
    try:
        lone.model.generation_config = config = GenerationConfig(max_new_tokens=4)
        first = lone.model.generate(**lone.inputs, generation_mode="slow")
        end = config.eos_token_id = [int(first[0, -1])]
        second = lone.model.generate(**lone.inputs, generation_mode="slow")
        end[0] = int(first[0, -2])  # what was merged is kept, but not beyond a change in it
        third, fourth = (lone.model.generate(**lone.inputs, generation_mode="slow") for _ in range(2))
        config.max_new_tokens, never = 6, torch.tensor([lone.model.pad_token_id] * 2)
        last = [lone.model.generate(**lone.inputs, generation_mode="slow", eos_token_id=never) for _ in range(2)]
    finally:
        lone.model.generation_config = default
    assert len({int(token) for token in first[0, -4:]}) == 4
    lengths = [each.shape[1] - lone.input_ids.shape[1] for each in (first, second, third, fourth, *last)]
    assert lengths == [4, 4, 3, 3, 6, 6]


def test_a_list_of_an_earlier_call_does_not_speak(lone):
    told = {**lone.inputs, "generation_mode": "slow", "max_new_tokens": 3}
    banned = [lone.model.pad_token_id]
    first = lone.model.generate(**told, suppress_tokens=banned)
    banned.append(int(first[0, -3]))
    assert torch.equal(lone.model.generate(**told, suppress_tokens=banned[:1]), first)
    assert not torch.equal(lone.model.generate(**told, suppress_tokens=dict.fromkeys(banned).keys()), first)


def sampled(**recipe) -> dict:
    return next(case for case in cases_of("shapes") if all(case.get(key) == value for key, value in recipe.items()))


@pytest.mark.skipif(not draws_as_recorded(), reason="this torch draws other numbers than the recording one")
@pytest.mark.parametrize("recipe", [{"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "top_k": 50}])
def test_sampling_settings_by_argument_and_by_config(recipe):
    case = sampled(**recipe)
    batch = Batch("shapes", [case])
    recipe = {**recipe, "repetition_penalty": case.get("repetition_penalty", 1.0)}
    settings = {"generation_mode": case["generation_mode"]}
    config = GenerationConfig(do_sample=True, max_new_tokens=case["max_new_tokens"], **recipe)
    for way in ({"generation_config": config}, {"do_sample": True, **recipe}, recipe):
        torch.manual_seed(case["seed"])
        output = batch.model.generate(**batch.inputs, **settings, **{"max_new_tokens": case["max_new_tokens"], **way})
        assert batch.answers(output) == batch.expected()


def test_a_generation_config_says_only_what_it_says(lone):
    """Filters that transformers would fill in are not asked for (4.57 writes its own defaults into every config)."""
    config = GenerationConfig(max_new_tokens=30)
    settings = {"generation_mode": "slow", "temperature": 2.0}
    if getattr(config, "top_k", None) is None:
        one = lone.model.generate(
            **lone.inputs, **settings, generation_config=config, generator=torch.Generator().manual_seed(1)
        )
        two = lone.model.generate(
            **lone.inputs, **settings, max_new_tokens=30, generator=torch.Generator().manual_seed(1)
        )
        assert torch.equal(one, two)


def test_do_sample_false_is_greedy_whatever_the_temperature(batch):
    output = batch.model.generate(**batch.inputs, do_sample=False, temperature=0.9, top_p=0.5, top_k=3)
    assert batch.answers(output) == batch.expected()


def test_do_sample_alone_samples_at_temperature_one(lone):
    settings = {"generation_mode": "slow", "max_new_tokens": 30}
    one = lone.model.generate(**lone.inputs, do_sample=True, generator=torch.Generator().manual_seed(1), **settings)
    two = lone.model.generate(**lone.inputs, temperature=1.0, generator=torch.Generator().manual_seed(1), **settings)
    assert torch.equal(one, two)


def test_num_return_sequences_repeats_rows():
    found = [case for case in recorded_cases("shapes") if case.get("temperature") == 1.3 and len(case["images"]) == 2]
    cases = found[:2]
    batch = Batch("shapes", cases)
    seeds = [1, 2, 3, 4]
    output = batch.model.generate(
        **batch.inputs, temperature=1.3, num_return_sequences=2, max_new_tokens=20,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    )  # fmt: skip
    assert output.shape[0] == 4
    assert torch.equal(output[:, : batch.input_ids.shape[1]], batch.input_ids.repeat_interleave(2, 0))
    for row, seed in enumerate(seeds):
        single = Batch("shapes", [cases[row // 2]])
        own = single.model.generate(
            **single.inputs, temperature=1.3, max_new_tokens=20, generator=torch.Generator().manual_seed(seed)
        )
        new = own[0, single.input_ids.shape[1] :]
        assert torch.equal(output[row, batch.input_ids.shape[1] :][: len(new)], new)


def test_other_processors_of_the_config_work(batch):
    banned = batch.cases[0]["output_ids"][1]
    output = batch.model.generate(**batch.inputs, suppress_tokens=[banned], max_new_tokens=30)
    assert banned not in output[:, batch.input_ids.shape[1] :]
    forced = batch.model.generate(**batch.inputs, generation_mode="slow", max_new_tokens=5, forced_eos_token_id=3)
    assert forced[:, -1].tolist() == [3] * 4
    for mode in ("fast", "slow"):  # as transformers asks: by the row
        told = {"generation_mode": mode, "prefix_allowed_tokens_fn": lambda row, ids: [300 + row], "max_new_tokens": 2}
        only = batch.model.generate(**batch.inputs, **told)[:, batch.input_ids.shape[1] :].tolist()
        pad = batch.model.config.pad_token_id
        assert [set(row) - {pad} for row in only] == [{300 + row} for row in range(4)]


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_min_new_tokens_holds_the_end_back(mode):
    cases = greedy(mode, 4)
    batch = Batch("shapes", cases)
    end, pad = batch.model.config.text_config.eos_token_id, batch.model.config.pad_token_id
    for least in ({"min_new_tokens": 60}, {"min_length": batch.input_ids.shape[1] + 60}):
        output = batch.model.generate(**batch.inputs, generation_mode=mode, max_new_tokens=80, **least)
        new = output[:, batch.input_ids.shape[1] :].tolist()
        assert all(pad not in row[:60] for row in new)
        if mode == "slow":
            assert all(end not in row[:59] for row in new)
    short = batch.model.generate(**batch.inputs, generation_mode=mode, min_new_tokens=3)
    assert batch.answers(short) == batch.expected(), "nothing is held back from rows that are long enough"


def test_numbers_of_numpy_are_numbers():
    cases = greedy("slow", 2)
    batch = Batch("shapes", cases)
    limits = np.array([case["max_new_tokens"] for case in cases])
    numbers = {"max_batch_rows": np.int64(4), "temperature": np.float32(0), "eos_token_id": np.array([3])}
    output = batch.model.generate(**batch.inputs, generation_mode="slow", max_new_tokens=limits, **numbers)
    assert batch.answers(output) == batch.expected()
    again = batch.model.generate(
        **batch.inputs, **numbers | {"temperature": [None, 0.0]}, generation_mode="slow", max_new_tokens=limits
    )
    assert torch.equal(again, output), "None says nothing of its row"


def test_equal_pictures_with_other_words_between_them():
    """Their rows share a prefix that ends between two pictures."""
    case = next(case for case in cases_of("shapes") if len(case["images"]) == 2)
    batch = Batch("shapes", [case])
    model, slot = batch.model, batch.model.config.image_token_index
    ids = case["input_ids"]
    second = next(i for i in range(len(ids) - 1, 0, -1) if ids[i] == slot and ids[i - 1] != slot)
    word = next(i for i in range(second - 1, 0, -1) if ids[i] < 400)  # between the pictures
    rows = [ids, [*ids[: word + 1], 64, 65, *ids[word + 1 :]], [*ids[: word + 1], 66, *ids[word + 1 :]]]
    with torch.no_grad():
        features = model.extract_feature(batch.inputs["pixel_values"], batch.inputs["image_grid_hws"])
    settings = {"generation_mode": "slow", "max_new_tokens": 12}

    def ask(rows, **settings):
        width, pad = max(map(len, rows)), model.config.pad_token_id
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        padded = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        shown = {"visual_features": features * len(rows)}
        output = model.generate(input_ids=padded, attention_mask=mask, **shown, **settings)
        return output[:, width:].tolist()

    alone = [ask([row], **settings)[0] for row in rows]
    for slots in (1, 2, 3):
        together = ask(rows, **settings, max_batch_rows=slots)
        for row, expected in zip(together, alone, strict=True):
            assert row[: len(expected)] == expected


def test_values_that_mean_off_are_taken():
    """Of whichever release's defaults: a generation config that was saved whole holds them."""
    batch = Batch("shapes", greedy("hybrid", 2))
    off = {"typical_p": 1.0, "guidance_scale": 1.0, "num_beam_groups": 1, "min_p": None, "diversity_penalty": 0.0}
    assert batch.answers(batch.run(**off)) == batch.expected()


@pytest.mark.parametrize("mode", ["slow", "verified", "fast"])
def test_the_least_length_is_counted_without_the_end(mode):
    """As transformers does: of min_new_tokens=n, the end may be token n + 1."""
    end = Batch("shapes", greedy("slow", 1)).model.config.text_config.eos_token_id
    for case in greedy("fast" if mode == "fast" else "slow", 6):
        ids = case["output_ids"]
        if ids[-1] != end:
            continue
        batch = Batch("shapes", [case])
        new = []
        for least in (len(ids) - 1, len(ids)):
            limits = {"min_new_tokens": least, "max_new_tokens": case["max_new_tokens"] + 12}
            output = batch.model.generate(**batch.inputs, generation_mode=mode, **limits)
            new.append(output[0, batch.input_ids.shape[1] :].tolist())
        assert new[0] == ids and new[1][: len(ids) - 1] == ids[:-1] and new[1][len(ids) - 1] != end


def test_a_stock_call_does_not_look_at_the_models_generation_config(lone):
    default = lone.model.generation_config
    try:
        lone.model.generation_config = GenerationConfig(do_sample=True, temperature=9.0, max_new_tokens=3)
        text = lone.model.generate(**lone.inputs, generation_mode="slow", tokenizer=tokenizer_of("shapes"))
    finally:
        lone.model.generation_config = default
    assert text == lone.cases[0]["output"]


# ---- callbacks


class Recorder(LogitsProcessor):
    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        assert scores.dim() == 2 and input_ids.dim() == 2 and len(input_ids) == len(scores)
        assert scores.dtype == torch.float32
        self.calls.append(input_ids.tolist())
        return scores


def test_a_processor_sees_each_rows_committed_tokens():
    cases = [greedy("hybrid", 1, switch_to_ar=1)[0], greedy("slow", 1)[0], greedy("fast", 1)[0]]
    batch = Batch("shapes", cases, extra_padding=3)
    recorder = Recorder()
    modes = [case["generation_mode"] for case in cases]
    output = batch.model.generate(**batch.inputs, generation_mode=modes, logits_processor=[recorder])
    assert batch.answers(output) == batch.expected()
    assert len(recorder.calls) == sum(case["forward_step"] for case in cases)
    whole = [case["input_ids"] + case["output_ids"] for case in cases]
    for ids in recorder.calls:
        assert len(ids) in (1, 6)
        assert all(row == ids[0] for row in ids)
        assert any(ids[0] == row[: len(ids[0])] for row in whole), "padding or another row's tokens"


class StopAfter(StoppingCriteria):
    def __init__(self, token):
        self.token, self.lengths = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("mode", ["hybrid", "fast", "slow"])
def test_criteria_stop_a_row_at_the_very_token(mode):
    cases = greedy(mode, 3)
    batch = Batch("shapes", cases)
    token = cases[0]["output_ids"][7]
    output = batch.model.generate(**batch.inputs, generation_mode=mode, stopping_criteria=[StopAfter(token)])
    for row, case in zip(output[:, batch.input_ids.shape[1] :].tolist(), cases, strict=True):
        ids = case["output_ids"]
        upto = ids.index(token) + 1 if token in ids else len(ids)
        assert row[:upto] == ids[:upto] and set(row[upto:]) <= {batch.model.config.pad_token_id}


def test_stop_strings_and_max_time(batch):
    tokenizer = tokenizer_of("shapes")
    expected = [case["output"][: case["output"].index("</box>") + 6] for case in batch.cases]
    output = batch.model.generate(**batch.inputs, tokenizer=tokenizer, stop_strings=["</box>"])
    processor = SimpleNamespace(tokenizer=tokenizer, decode=tokenizer.decode)  # has the tokenizer inside
    told = {"tokenizer": processor, "stop_strings": ["</box>"]}
    assert torch.equal(batch.model.generate(**batch.inputs, **told), output)
    texts = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :])
    assert [text.replace(tokenizer.pad_token, "") for text in texts] == expected
    texts, _, _ = batch.model.generate(**batch.inputs, tokenizer=tokenizer, stop_strings=["</box>"], verbose=True)
    assert texts == expected
    with pytest.raises(ValueError, match="tokenizer"):
        batch.model.generate(**batch.inputs, stop_strings=["</box>"])
    short = batch.model.generate(**batch.inputs, generation_mode="slow", max_time=0.0)
    assert short.shape[1] == batch.input_ids.shape[1] + 1


class Listener:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.ended = True


def test_a_streamer_follows_one_row(lone, batch):
    listener = Listener()
    output = lone.model.generate(**lone.inputs, generation_mode="slow", streamer=listener)
    assert listener.ended and listener.pieces[0] == lone.cases[0]["input_ids"]
    assert [token for piece in listener.pieces[1:] for token in piece] == lone.expected()[0]
    assert lone.answers(output) == lone.expected()
    with pytest.raises(ValueError, match="one row; got 4"):
        batch.model.generate(**batch.inputs, streamer=listener)


# ---- errors, before anything heavy


def changed(batch: Batch, **kwargs):
    return {**batch.inputs, **kwargs}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"generation_mode": "turbo"}, "generation_mode='turbo'.*hybrid, fast, slow"),
        ({"generation_mode": ["fast"]}, "generation_mode has 1 values for 4 rows"),
        ({"temperature": [0.1, 0.2]}, "temperature has 2 values for 4 rows"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"top_p": -0.1}, "top_p=-0.1"),
        ({"top_k": -2}, "top_k=-2"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_length": 10}, "row 0: its prompt has .* length limit of 10"),
        ({"max_new_token": 5}, "unknown arguments: max_new_token. Did you mean 'max_new_tokens'"),
        ({"use_cache": False}, "use_cache=False"),
        ({"n_future_tokens": 4}, "n_future_tokens: this model predicts 6"),
        ({"verbose": True}, "needs tokenizer="),
        ({"output_logits": True}, "output_logits=True"),
        ({"verify_labels": [True, False]}, "verify_labels has 2 values for 4 rows"),
        ({"verify_labels": "yes"}, "verify_labels='yes': expected True or False"),
        ({"inputs": torch.tensor([[1, 2]])}, "both inputs and input_ids"),
        ({"num_return_sequences": 0}, "num_return_sequences=0"),
        ({"generator": [torch.Generator()]}, "generator has 1 values for 4 rows"),
        ({"max_batch_rows": 0}, "max_batch_rows=0"),
        ({"max_new_tokens": "5"}, "max_new_tokens='5': expected a whole number"),
        ({"temperature": "hot"}, "temperature='hot': expected a number"),
        ({"top_k": float("inf"), "temperature": 1.0}, "top_k=inf: expected a whole number"),
        ({"stop_strings": 5}, "stop strings"),
        ({"max_batch_rows": "3"}, "max_batch_rows='3': expected a whole number of 1 or more"),
        ({"generator": 5}, "generator: got a int; expected a torch.Generator"),
        ({"min_p": 0.1, "temperature": 1.0}, "min_p=0.1 is not supported"),
        ({"cache_implementation": "static"}, "cache_implementation='static' is not supported"),
        ({"visual_features": [torch.zeros(7, 512)]}, "row 0 has .* image slots, but its images give 7"),
        ({"input_ids": None}, "needs input_ids"),
        ({"input_ids": torch.zeros(0, 5, dtype=torch.long)}, r"expected integers \[rows, length\]"),
        ({"input_ids": torch.zeros(5, dtype=torch.long)}, r"expected integers \[rows, length\]"),
        ({"input_ids": torch.zeros(1, 5)}, "torch.float32"),
        ({"input_ids": torch.tensor([[1, 1440]]), "attention_mask": None}, "the vocabulary has 1440"),
        ({"attention_mask": torch.ones(4, 3)}, r"attention_mask is \[4, 3\]"),
        ({"pixel_values": None, "image_grid_hws": None}, "row 0 has .* image slots, but its images give 0"),
        ({"image_grid_hws": None}, "without image_grid_hws"),
        ({"image_grid_hws": torch.tensor([[8, 10]])}, r"make \[80, 3"),
        ({"pixel_values": torch.zeros(80, 588)}, r"pixel_values are \[80, 588\]"),
    ],
)
def test_bad_arguments_are_named(batch, kwargs, message, monkeypatch):
    def no_heavy_work(*args, **kwargs):
        raise AssertionError("an image was encoded before the arguments were checked")

    monkeypatch.setattr(batch.model.vision_model, "forward", no_heavy_work)
    monkeypatch.setattr(batch.model.language_model.model, "forward", no_heavy_work)
    with pytest.raises(ValueError, match=message):
        batch.model.generate(**changed(batch, **kwargs))


@pytest.mark.parametrize("masked", [True, False])
def test_padding_may_lie_anywhere(batch, masked):
    """On the right, as the stock's processor pads, or inside; the prompts that come back have it on the left."""
    batch = Batch("shapes", batch.cases, extra_padding=5)
    where = torch.ones_like(batch.attention_mask)
    for row, case in enumerate(batch.cases):
        length = len(case["input_ids"])
        where[row, length:] = 0
        if masked and row % 2:  # inside
            where[row, length:], where[row, 4 : 4 + where.shape[1] - length] = 1, 0
    ids = torch.full_like(batch.input_ids, batch.model.config.pad_token_id)
    ids[where.bool()] = batch.input_ids[batch.attention_mask.bool()]
    given = changed(batch, input_ids=ids, attention_mask=where if masked else None)
    output = batch.model.generate(**given, return_dict_in_generate=True)
    assert torch.equal(output.sequences[:, : ids.shape[1]], batch.input_ids)
    assert batch.answers(output) == batch.expected()


def test_a_row_of_padding_is_refused(batch):
    nothing = batch.attention_mask.clone()
    nothing[2] = 0
    with pytest.raises(ValueError, match="row 2: attention_mask is 0 everywhere"):
        batch.model.generate(**changed(batch, attention_mask=nothing))


def test_what_is_meant_is_said(batch):
    """The processor's output as one argument; labels of a batch for training; a generator of another device."""
    with pytest.raises(ValueError, match=r"generate\(\*\*inputs\)"):
        batch.model.generate(BatchFeature(batch.inputs))
    with pytest.raises(ValueError, match=r"generate\(\*\*inputs\)"):
        batch.model.generate(dict(batch.inputs))
    assert batch.answers(batch.model.generate(**batch.inputs, labels=batch.input_ids)) == batch.expected()
    for generator in (Elsewhere(), [Elsewhere()] * 4):
        with pytest.raises(ValueError, match="generator: got one on cuda, but the rows' numbers are on cpu"):
            batch.model.generate(**batch.inputs, generator=generator, temperature=1.0)


class Elsewhere(torch.Generator):
    device = torch.device("cuda")


def test_images_must_fill_the_slots_exactly():
    cases = [greedy("hybrid", 1)[0], next(c for c in cases_of("shapes") if len(c["images"]) == 2)]
    batch = Batch("shapes", cases)
    images = [pixels_of("shapes", image) for case in cases for image in case["images"]]

    def given(*numbers):
        chosen = [images[number] for number in numbers]
        return changed(
            batch,
            pixel_values=torch.cat([pixels for pixels, _ in chosen]),
            image_grid_hws=torch.tensor([grid for _, grid in chosen]),
        )

    assert batch.answers(batch.model.generate(**given(0, 1, 2), **batch.settings, generator=batch.generators()))
    with pytest.raises(ValueError, match="row 1 has"):
        batch.model.generate(**given(0, 1))
    with pytest.raises(ValueError, match="4 images give"):
        batch.model.generate(**given(0, 1, 2, 2))


def test_a_prompt_over_the_models_length_is_refused(shapes):
    with pytest.raises(ValueError, match="4096 tokens, at or over the length limit of 4096"):
        shapes.generate(input_ids=torch.full((1, 4096), 5))


def test_autocast_over_wider_weights(batch):
    with torch.autocast("cpu", torch.bfloat16):
        answers = batch.answers(batch.model.generate(**batch.inputs))
    assert sum(one == other for one, other in zip(answers, batch.expected(), strict=True)) >= 2
