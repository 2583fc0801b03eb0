"""patch.apply() on a model that is loaded already, with a stand-in for the stock's class."""

from __future__ import annotations

import gc
import importlib.util
import sys
import types

import pytest
import torch

import patch
from tests.conftest import CHECKPOINTS, ROOT, Batch, cases_of, tokenizer_of

MODULE = "transformers_modules.stand_in.modeling_locateanything"


def import_stand_in():
    """The stand-in as transformers would import the stock's remote code."""
    spec = importlib.util.spec_from_file_location(MODULE, ROOT / "tests" / "stand_in.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    return module.LocateAnythingForConditionalGeneration


@pytest.fixture
def stock_class():
    yield import_stand_in()
    patch.revert()
    sys.modules.pop(MODULE, None)


@pytest.fixture
def stock(stock_class):
    return stock_class.from_pretrained(CHECKPOINTS["shapes"]).eval()


def some_cases(count: int) -> list[dict]:
    return [case for case in cases_of("shapes") if case["num_tokens"] < 40][:: len(cases_of("shapes")) // (2 * count)][
        :count
    ]


def stock_call(model, case: dict, **kwargs) -> str:
    """As the model card's script calls it."""
    batch = Batch("shapes", [case])
    settings = {key: case[key] for key in ("repetition_penalty", "temperature", "top_p", "top_k") if key in case}
    torch.manual_seed(case.get("seed", 0))
    return model.generate(
        **{**batch.inputs, "image_grid_hws": batch.inputs["image_grid_hws"].numpy()},
        tokenizer=tokenizer_of("shapes"), use_cache=True, generation_mode=case["generation_mode"],
        max_new_tokens=case["max_new_tokens"], **settings, **kwargs,
    )  # fmt: skip


def test_the_stand_in_answers_as_the_stock(stock):
    """A naive decoder, recomputing all under dense masks, agrees with the goldens: the other tests may trust it."""
    for case in some_cases(12):
        assert stock_call(stock, case) == case["output"]
    with pytest.raises(AssertionError, match="batch size = 1"):
        stock.generate(input_ids=torch.zeros(2, 3, dtype=torch.long), use_cache=True)


def batched(model, cases: list[dict]) -> None:
    batch = Batch("shapes", cases)
    batch.model = model
    model.config.pad_token_id = model.config.text_config.bos_token_id
    assert batch.answers(batch.run()) == batch.expected()


def test_a_patched_model_answers_batches_and_single_rows(stock):
    cases = some_cases(16)
    assert patch.apply(stock) is stock
    batched(stock, cases)
    for case in cases[:4]:
        assert stock_call(stock, case) == case["output"]
        text, history, statistics = stock_call(stock, case, verbose=True)
        assert text == case["output"] and len(history) == case["forward_step"] and "num_tokens=" in statistics


def test_positional_arguments_have_the_stocks_order(stock):
    case = some_cases(1)[0]
    inputs = Batch("shapes", [case]).inputs
    patch.apply(stock)
    text = stock.generate(
        inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"], None, inputs["image_grid_hws"],
        tokenizer_of("shapes"), generation_mode=case["generation_mode"], max_new_tokens=case["max_new_tokens"],
        **{key: case[key] for key in ("repetition_penalty",) if key in case},
    )  # fmt: skip
    assert text == case["output"] or "seed" in case


def test_the_model_stays_what_it_was(stock, stock_class):
    names = list(stock.state_dict())
    pointers = {name: value.data_ptr() for name, value in stock.state_dict().items()}
    modules = dict(stock.named_modules())
    stock.train()
    patch.apply(stock)
    batched(stock, some_cases(3))
    assert type(stock) is stock_class and isinstance(stock, stock_class) and stock.training
    assert list(stock.state_dict()) == names
    assert {name: value.data_ptr() for name, value in stock.state_dict().items()} == pointers
    assert dict(stock.named_modules()) == modules
    assert stock.forward() == "the stock's forward"


def test_no_weight_is_copied(stock):
    patch.apply(stock)
    batched(stock, some_cases(2))
    shadow = patch._engines[stock].shadow
    own = {parameter.data_ptr() for parameter in stock.parameters()}
    assert all(parameter.data_ptr() in own for parameter in shadow.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in stock.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in shadow.buffers())
    assert buffers < weights / 100


def test_later_changes_of_the_weights_are_seen(stock):
    patch.apply(stock)
    cases = [case for case in some_cases(8) if "seed" not in case]
    batched(stock, cases)
    with torch.no_grad():
        kept = stock.mlp1[3].weight.clone()
        stock.mlp1[3].weight.zero_()
    with pytest.raises(AssertionError):
        batched(stock, cases)
    with torch.no_grad():
        stock.mlp1[3].weight.copy_(kept)
    batched(stock, cases)
    stock.to(torch.bfloat16)
    batch = Batch("shapes", cases)
    batch.model = stock
    batch.inputs["pixel_values"] = batch.inputs["pixel_values"].to(torch.bfloat16)
    assert batch.run().sequences.shape[0] == len(cases)
    assert {parameter.dtype for parameter in patch._engines[stock].shadow.parameters()} == {torch.bfloat16}


def test_a_module_put_in_later_is_used(stock):
    """As peft injects adapters: the linear is replaced by a module that holds it."""

    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.calls = base, 0

        def forward(self, x):
            self.calls += 1
            return self.base_layer(x)

    patch.apply(stock)
    cases = some_cases(3)
    batched(stock, cases)
    layer = stock.language_model.model.layers[1].self_attn
    layer.q_proj = adapter = Adapter(layer.q_proj)
    stock.vision_model.encoder.blocks[0].wqkv = tower = Adapter(stock.vision_model.encoder.blocks[0].wqkv)
    batched(stock, cases)
    assert adapter.calls and tower.calls


def test_hooks_on_linears_fire(stock):
    seen = []
    stock.language_model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    patch.apply(stock)
    batched(stock, some_cases(2))
    assert seen


def test_applying_twice_is_once_and_reverting_restores(stock, stock_class):
    original = stock_class.__dict__["generate"]
    patch.apply(stock)
    first = stock.generate
    patch.apply(stock)
    assert stock.generate == first
    patch.revert(stock)
    assert "generate" not in stock.__dict__ and stock_class.__dict__["generate"] is original
    patch.revert(stock)
    with patch.applied(stock):
        assert "generate" in stock.__dict__
        with patch.applied(stock):
            pass
        assert "generate" in stock.__dict__, "the inner block found it patched"
    assert "generate" not in stock.__dict__
    own = stock.generate = lambda: "mine"
    with patch.applied(stock):
        assert stock.generate is not own
    assert stock.generate is own


def test_a_class_serves_every_instance(stock, stock_class):
    original = stock_class.__dict__["generate"]
    patch.apply(stock_class)
    batched(stock, some_cases(2))
    batched(stock_class.from_pretrained(CHECKPOINTS["shapes"]).eval(), some_cases(2))
    assert patch.status().classes == (f"{MODULE}.LocateAnythingForConditionalGeneration",)
    patch.revert(stock_class)
    assert stock_class.__dict__["generate"] is original


def test_everywhere_means_also_classes_imported_later():
    sys.modules.pop(MODULE, None)
    hook = transformers_hook()
    patch.apply()
    patch.apply()
    try:
        cls = import_stand_in()
        assert patch.status().everywhere and patch.status().classes
        batched(cls.from_pretrained(CHECKPOINTS["shapes"]).eval(), some_cases(2))
    finally:
        patch.revert()
        sys.modules.pop(MODULE, None)
    assert patch.status() == patch.Status(patch.__version__, False, (), ())
    assert transformers_hook() is hook
    with pytest.raises(AssertionError, match="use_cache"):
        cls.from_pretrained(CHECKPOINTS["shapes"]).generate()


def transformers_hook():
    from transformers import PreTrainedModel

    return PreTrainedModel.__dict__.get("__init_subclass__")


def test_what_is_not_locateanything_is_refused(shapes):
    for target in (torch.nn.Linear(2, 2), torch.nn.Linear, shapes, type(shapes)):
        with pytest.raises(TypeError, match=r"patch\.apply|this project's own model"):
            patch.apply(target)
    stranger = types.new_class("LocateAnythingForConditionalGeneration", (torch.nn.Module,))
    with pytest.raises(TypeError, match="expected LocateAnythingForConditionalGeneration, loaded from the official"):
        patch.apply(stranger)


def test_a_patched_model_can_be_freed(stock_class):
    import weakref

    model = stock_class.from_pretrained(CHECKPOINTS["shapes"]).eval()
    patch.apply(model)
    batched(model, some_cases(1))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert patch.status().instances == ()


def test_nothing_is_written_to_sys_path(stock):
    before = list(sys.path)
    patch.apply(stock)
    batched(stock, some_cases(1))
    assert sys.path == before
