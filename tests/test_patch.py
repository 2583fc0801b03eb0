"""patch.apply() on a model that is loaded already, with a stand-in for the stock's class."""

from __future__ import annotations

import copy
import gc
import importlib.util
import inspect
import io
import os
import shutil
import subprocess
import sys
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from transformers import BatchFeature, GenerationConfig, PreTrainedModel

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


def greedy_cases(count: int) -> list[dict]:
    return [case for case in some_cases(3 * count) if "seed" not in case][:count]


def lent_model(stock):
    """What the engine calls, while a call lasts."""
    return patch._engines[stock].model()


def right_padded(cases: list[dict]) -> BatchFeature:
    """What the stock's processor makes of several texts: padding on the right, grids as numpy."""
    batch = Batch("shapes", cases)
    order = (batch.attention_mask == 0).long().argsort(dim=1, stable=True)
    return BatchFeature(
        {
            "input_ids": batch.input_ids.gather(1, order),
            "attention_mask": batch.attention_mask.gather(1, order),
            "pixel_values": batch.inputs["pixel_values"],
            "image_grid_hws": batch.inputs["image_grid_hws"].numpy(),
        }
    )


@torch.no_grad()
def workers_call(model, inputs, **settings):
    """The arguments, by name and kind, of the official worker's call."""
    return model.generate(
        pixel_values=inputs["pixel_values"].to(torch.float32),
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        image_grid_hws=inputs.get("image_grid_hws", None),
        tokenizer=tokenizer_of("shapes"),
        use_cache=True,
        do_sample=True,
        verbose=True,
        **{"temperature": 0.7, "top_p": 0.9, "top_k": None, "repetition_penalty": 1.1, **settings},
    )


@torch.inference_mode()
def evaluations_call(model, inputs, **settings):
    """The arguments of the official evaluation's call."""
    tokenizer = tokenizer_of("shapes")
    return model.generate(
        pixel_values=inputs["pixel_values"],
        input_ids=inputs["input_ids"],
        attention_mask=inputs.get("attention_mask"),
        image_grid_hws=inputs["image_grid_hws"],
        tokenizer=tokenizer,
        use_cache=True,
        do_sample=True,
        eos_token_id=tokenizer.eos_token_id,
        n_future_tokens=6,
        **{"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, **settings},
    )


def seeded(call, *args, **kwargs):
    torch.manual_seed(7)
    return call(*args, **kwargs)


@pytest.mark.parametrize("of_class", [False, True])
@pytest.mark.parametrize("mode", ["hybrid", "fast", "slow"])
def test_the_official_calls_on_one_row(stock, mode, of_class):
    """Answer, history and count of steps are those of the model unpatched, sampled on the same seed."""
    limits = {"generation_mode": mode, "max_new_tokens": 40}
    patched = type(stock) if of_class else stock
    for case in some_cases(2):
        inputs = right_padded([case])
        with patch.applied(patched):
            ours = seeded(workers_call, stock, inputs, **limits)
            text = seeded(evaluations_call, stock, inputs, **limits)
        answer, history, statistics = seeded(workers_call, stock, inputs, **limits)
        assert isinstance(ours, tuple) and ours[:2] == (answer, history)
        assert f"forward_step={len(history)};" in ours[2] and statistics.split(";")[0] in ours[2]
        assert text == answer == seeded(evaluations_call, stock, inputs, **limits)


@pytest.mark.parametrize("of_class", [False, True])
def test_the_official_calls_on_many_rows(stock, of_class):
    cases = [case for case in greedy_cases(12) if case["generation_mode"] == "hybrid"]
    assert len(cases) > 1
    plain = {"temperature": 0, "top_p": None, "repetition_penalty": [c.get("repetition_penalty", 1.0) for c in cases]}
    plain["max_new_tokens"] = [case["max_new_tokens"] for case in cases]
    patch.apply(type(stock) if of_class else stock)
    inputs = right_padded(cases)
    answers, histories, statistics = workers_call(stock, inputs, **plain)
    assert answers == [case["output"] for case in cases] == evaluations_call(stock, inputs, **plain)
    assert [len(history) for history in histories] == [case["forward_step"] for case in cases]
    assert f"forward_step={sum(case['forward_step'] for case in cases)};" in statistics
    generators = [torch.Generator().manual_seed(i) for i in range(len(cases))]
    sampled = workers_call(stock, inputs, max_new_tokens=40, generator=generators)[0]
    for index, case in enumerate(cases):
        alone = right_padded([case])
        generator = torch.Generator().manual_seed(index)
        assert workers_call(stock, alone, max_new_tokens=40, generator=generator)[0] == sampled[index]


def test_features_of_the_stocks_tower_are_taken(stock):
    """Beside pixels that do not count, as the stock wants it."""
    case = greedy_cases(1)[0]
    inputs = Batch("shapes", [case]).inputs
    with torch.no_grad():
        features = stock.extract_feature(inputs["pixel_values"], inputs["image_grid_hws"])
    inputs = {**inputs, "pixel_values": torch.zeros(1), "visual_features": features}
    call = {
        "tokenizer": tokenizer_of("shapes"), "use_cache": True, "generation_mode": case["generation_mode"],
        "repetition_penalty": case.get("repetition_penalty", 1.0), "max_new_tokens": case["max_new_tokens"],
    }  # fmt: skip
    assert stock.generate(**inputs, **call) == case["output"]
    patch.apply(stock)
    assert stock.generate(**inputs, **call) == case["output"]
    assert stock.generate(**{**inputs, "pixel_values": None}, **call) == case["output"]


@pytest.mark.parametrize("attention", ["magi", "flash_attention_2", "eager"])
def test_whatever_attention_the_stock_was_loaded_with(stock, attention):
    """None of these kernels is installed here; the config's dict, and so the engine, still hears of them."""
    for config in (stock.config, stock.config.text_config, stock.config.vision_config):
        config._attn_implementation = attention
    assert stock.config.to_dict()["_attn_implementation"] == attention
    patch.apply(stock)
    batched(stock, some_cases(3))


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
    own = {id(parameter) for parameter in stock.parameters()}
    with lent_model(stock) as model:
        assert {id(parameter) for parameter in model.parameters()} == own


def bytes_alive() -> int:
    """Of the storages of all tensors there are."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and not thing.is_meta]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_memory_grows_by_less_than_a_hundredth_of_the_weights(stock):
    cases = some_cases(2)
    Batch("shapes", cases)  # the pictures, which are kept
    weights = sum(parameter.nbytes for parameter in stock.parameters())
    before = bytes_alive()
    patch.apply(stock)
    assert bytes_alive() - before < weights / 100
    batched(stock, cases)
    assert bytes_alive() - before < weights / 100


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
    with lent_model(stock) as model:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    stock.half()
    assert batch.run().sequences.shape[0] == len(cases)
    stock.float()
    assert stock.generate(**batch.inputs, max_new_tokens=4).shape[0] == len(cases)


def test_later_changes_of_the_settings_are_seen(stock):
    patch.apply(stock)
    cases = greedy_cases(3)
    batched(stock, cases)
    inputs = Batch("shapes", cases).inputs
    stock.generation_config = GenerationConfig(max_new_tokens=1)
    short = stock.generate(**inputs, generation_mode="slow")
    assert short.shape[1] == inputs["input_ids"].shape[1] + 1
    stock.config.pad_token_id = 3
    stock.generation_config = GenerationConfig(max_new_tokens=256)
    batch = Batch("shapes", cases)
    batch.model = types.SimpleNamespace(generate=stock.generate, config=stock.config)
    assert batch.answers(batch.run()) == batch.expected(), "answers are padded with the new pad token"


class Adapter(nn.Module):
    """As peft injects it: in the linear's place, holding it, with a low-rank sum on top."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer, self.calls = base, 0
        self.lora_A = nn.Linear(base.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        self.calls += 1
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class AdapterModel(nn.Module):
    """As peft's wrapper: passes all on to the model whose linears it has replaced."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.base_model = model
        for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
            if name.rpartition(".")[2] in ("q_proj", "down_proj", "wqkv"):
                parent, _, part = name.rpartition(".")
                setattr(model.get_submodule(parent), part, Adapter(linear))

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


@pytest.mark.parametrize("when", ["patched with adapters", "adapters later"])
@pytest.mark.parametrize("what", ["model", "decoder and tower"])
def test_adapters_count(stock, when, what):
    """Rows are answered as by the unpatched model with the same adapters."""
    torch.manual_seed(0)
    cases = greedy_cases(5)
    if when == "adapters later":
        patch.apply(stock)
        batched(stock, cases)
    if what == "model":
        wrapper = AdapterModel(stock)
    else:
        wrapper = stock
        stock.language_model, stock.vision_model = AdapterModel(stock.language_model), AdapterModel(stock.vision_model)
    adapters = [module for module in stock.modules() if isinstance(module, Adapter)]
    assert len({type(module) for module in stock.vision_model.modules()} & {Adapter}) == 1
    patch.revert(wrapper)
    calls = [(Batch("shapes", [case]).inputs, case) for case in cases]
    alone = [
        stand_in_generate(stock)(
            stock, **inputs, tokenizer=tokenizer_of("shapes"), use_cache=True, max_new_tokens=30,
            generation_mode=case["generation_mode"],
        )
        for inputs, case in calls
    ]  # fmt: skip
    assert alone != [case["output"] for case in cases], "the adapters change nothing: the test shows nothing"
    for adapter in adapters:
        adapter.calls = 0
    assert patch.apply(wrapper) is wrapper
    together = wrapper.generate(
        **Batch("shapes", cases).inputs, tokenizer=tokenizer_of("shapes"), max_new_tokens=30,
        generation_mode=[case["generation_mode"] for case in cases],
    )  # fmt: skip
    assert together == alone
    assert all(adapter.calls for adapter in adapters)
    assert {id(adapter) for adapter in adapters} == {id(m) for m in stock.modules() if isinstance(m, Adapter)}


def stand_in_generate(stock):
    return type(stock).__dict__["generate"]


def test_hooks_fire_and_where_they_cannot_it_is_said(stock, recwarn):
    seen = set()
    decoder, tower = stock.language_model.model, stock.vision_model
    watched = [decoder.layers[0].mlp.up_proj, decoder.layers[0].mlp, stock.mlp1, decoder.embed_tokens]
    watched += [decoder.norm, stock.language_model.lm_head, tower.encoder.blocks[0].mlp, tower.patch_embed.proj]
    handles = [module.register_forward_hook(lambda module, *_: seen.add(id(module))) for module in watched]
    patch.apply(stock)
    batched(stock, some_cases(2))
    assert seen == {id(module) for module in watched}
    assert not [warning for warning in recwarn if "hooks" in str(warning.message)]
    handles.append(decoder.layers[1].register_forward_pre_hook(lambda *_: None))
    with pytest.warns(UserWarning, match=r"does not call the hooks on language_model\.model\.layers\.1, whose"):
        batched(stock, some_cases(2))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(stock, around):
    patch.apply(stock)
    cases = some_cases(2)
    for context in (around, nullcontext, around):  # what one call leaves must not disturb the next
        with context():
            batched(stock, cases)


def test_training_goes_on_around_it(stock):
    """Training mode and gradient checkpointing stay on; gradients and the optimiser's step are untouched by a call."""
    stock.train()
    stock.gradient_checkpointing_enable()
    stock.enable_input_require_grads()
    cases = some_cases(2)
    patch.apply(stock)
    batched(stock, cases)
    loss = stock.language_model(torch.tensor([[1, 2, 3]]), use_cache=False).logits.sum()
    batched(stock, cases)
    loss.backward()
    assert stock.training and stock.language_model.model.gradient_checkpointing
    assert stock.language_model.model.norm.weight.grad is not None
    torch.optim.SGD(stock.parameters(), 0.0).step()
    batched(stock, cases)


def test_compiled_models(stock):
    cases = some_cases(2)
    compiled = torch.compile(stock, backend="eager")
    assert patch.apply(compiled) is compiled
    batched(compiled, cases)
    stock.forward = torch.compile(stock.forward, backend="eager")
    stock.language_model = torch.compile(stock.language_model, backend="eager")
    batched(stock, cases)
    patch.revert(compiled)
    assert "generate" not in stock.__dict__


def test_copies(stock):
    """A deep copy is patched as its model is, over weights of its own; one that was pickled is not, but works."""
    cases = greedy_cases(2)
    patch.apply(stock)
    batched(stock, cases)
    twin = copy.deepcopy(stock)
    with torch.no_grad():
        stock.mlp1[3].weight.zero_()
    batched(twin, cases)
    assert len(patch.status().instances) == 2
    patch.revert(twin)
    assert "generate" not in twin.__dict__ and "generate" in stock.__dict__
    untouched = copy.deepcopy(stock)
    patch.revert(untouched)
    assert "generate" not in untouched.__dict__
    torch.save(patch.apply(twin), file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert stock_call(loaded, cases[0]) == cases[0]["output"]
    batched(patch.apply(loaded), cases)


def test_saving_a_patched_model(stock, stock_class, tmp_path):
    with patch.applied(stock):
        batched(stock, some_cases(2))
    stock.save_pretrained(tmp_path / "before")
    patch.apply(stock)
    batched(stock, some_cases(2))
    stock.save_pretrained(tmp_path / "after")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert sorted(path.name for path in (tmp_path / "after").iterdir()) == names
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    batched(patch.apply(stock_class.from_pretrained(tmp_path / "after").eval()), some_cases(2))


def test_two_models_and_many_threads(stock, stock_class):
    other = stock_class.from_pretrained(CHECKPOINTS["shapes"]).eval()
    cases = some_cases(6)
    patch.apply(stock)
    patch.apply(other)
    with torch.no_grad():
        other.mlp1[3].weight.zero_()
    batched(stock, cases)
    with pytest.raises(AssertionError):
        batched(other, greedy_cases(3))
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(batched, stock, cases[i % 3 :: 3]) for i in range(12)]:
            done.result()


def test_offloaded_by_accelerate(stock, tmp_path):
    """Two layers and the tower's position grid wait on disk; the hooks that fetch them are the stock's."""
    parts = ("mlp1", "language_model.model.embed_tokens", "language_model.model.norm", "language_model.lm_head")
    places = {"vision_model": "disk", "language_model.model.rotary_emb": "cpu", **dict.fromkeys(parts, "cpu")}
    places |= {f"language_model.model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    patch.apply(stock)
    batched(stock, some_cases(2))
    dispatch_model(stock, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert stock.vision_model.patch_embed.pos_emb.weight.is_meta
    batched(stock, some_cases(2))
    batched(stock, some_cases(2))
    assert stock.vision_model.patch_embed.pos_emb.weight.is_meta, "fetched for a call, and gone after it"


def test_spread_by_hand_is_refused(stock):
    stock.mlp1.to("meta")
    patch.apply(stock)
    with pytest.raises(ValueError, match=r"\['cpu', 'meta'\] without accelerate's hooks"):
        batched(stock, some_cases(1))


def test_other_modules_are_refused(stock):
    del stock.language_model.model.layers[0].self_attn.q_proj
    patch.apply(stock)
    with pytest.raises(ValueError, match=r"no 'language_model\.model\.layers\.0\.self_attn\.q_proj'"):
        batched(stock, some_cases(1))


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


def test_class_and_instance_can_be_patched_and_reverted_in_any_order(stock, stock_class):
    original, cases = stock_class.__dict__["generate"], some_cases(2)
    other = stock_class.from_pretrained(CHECKPOINTS["shapes"]).eval()
    for first, second in ((stock, stock_class), (stock_class, stock)):
        patch.apply(stock)
        patch.apply(stock_class)
        batched(stock, cases)
        batched(other, cases)
        patch.revert(first)
        batched(stock, cases)
        patch.revert(second)
        assert "generate" not in vars(stock) and stock_class.__dict__["generate"] is original
        assert patch.status() == patch.Status(patch.__version__, False, (), ())


def test_a_block_leaves_what_was_patched_before_it(stock, stock_class):
    patch.apply(stock)
    with patch.applied():
        assert patch.status().everywhere and patch.status().classes
    assert not patch.status().everywhere and not patch.status().classes
    assert patch.status().instances
    patch.revert()
    patch.apply(stock_class)
    with patch.applied(), patch.applied():
        pass
    assert patch.status().classes and not patch.status().everywhere
    with pytest.raises(ZeroDivisionError), patch.applied(stock):
        raise ZeroDivisionError
    assert "generate" not in vars(stock)


def test_what_others_do_to_generate(stock, stock_class):
    patch.apply(stock)
    del stock.generate
    patch.revert(stock)
    assert patch.status().instances == ()
    own = stock.generate = types.MethodType(lambda self: "mine", stock)
    patch.apply(stock)
    patch.apply(stock)
    batched(stock, some_cases(1))
    patch.revert(stock)
    assert vars(stock)["generate"] is own and stock.generate() == "mine"
    assert not [name for name in vars(stock) if "patch" in name]


def test_the_stocks_signature(stock):
    names = list(inspect.signature(stock.generate).parameters)
    patch.apply(stock)
    assert list(inspect.signature(stock.generate).parameters)[:-1] == names[:-1]


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


def test_everywhere_means_also_classes_that_no_module_holds(stock, stock_class):
    """transformers imports a remote module anew when its file changes; models of the old class live on."""
    newer = import_stand_in()
    assert newer is not stock_class
    patch.apply()
    batched(stock, some_cases(1))
    batched(newer.from_pretrained(CHECKPOINTS["shapes"]).eval(), some_cases(1))


def transformers_hook():
    return PreTrainedModel.__dict__.get("__init_subclass__")


def test_what_is_not_locateanything_is_refused(shapes):
    for target in (torch.nn.Linear(2, 2), torch.nn.Linear, shapes, type(shapes)):
        with pytest.raises(TypeError, match=r"patch: got|this project's own model"):
            patch.apply(target)
    for target in ("x", 5, {}, torch.nn.Linear(2, 2), int, shapes.generate):
        for act in (patch.apply, patch.revert, lambda target: patch.applied(target).__enter__()):
            with pytest.raises(TypeError, match=r"patch: got .*; expected LocateAnythingForConditionalGeneration"):
                act(target)
    stranger = types.new_class("LocateAnythingForConditionalGeneration", (torch.nn.Module,))
    with pytest.raises(TypeError, match="expected LocateAnythingForConditionalGeneration, loaded from the official"):
        patch.apply(stranger)


def test_a_patched_model_can_be_freed(stock_class):
    model = stock_class.from_pretrained(CHECKPOINTS["shapes"]).eval()
    model.mlp1[0].register_forward_hook(lambda *_, model=model: None)  # a way back, through a module that we borrow
    model.generate = types.MethodType(lambda self: "mine", model)
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


def test_code_that_is_not_there_is_said_at_once(stock, tmp_path):
    for target in (stock, type(stock), None):
        with pytest.raises(OSError, match="modeling_locateanything_batched"):
            patch.apply(target, source=tmp_path)
    with pytest.raises(OSError, match=os.path.expanduser("~/no/such/code")):
        patch.apply(stock, source="~/no/such/code")
    assert patch.status() == patch.Status(patch.__version__, False, (), ())
    assert "generate" not in vars(stock)


def test_another_source_takes_the_place_of_the_first(stock, tmp_path):
    clone = tmp_path / "another"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "demo", "tests", "benchmarks"))
    patch.apply(stock)
    batched(stock, some_cases(1))
    patch.apply(stock, source=clone)
    batched(stock, some_cases(1))
    with lent_model(stock) as model:
        assert ".another" in type(model).__module__
    patch.revert(stock)
    assert "generate" not in vars(stock)

    # A block puts the first source back, in an instance, in a class and for classes imported later
    def sources() -> list[bool]:
        later = import_stand_in()
        held = [vars(owner)["generate"] for owner in (stock, type(stock), later)]
        return [".another." in getattr(own, "__func__", own).drop_in.__module__ for own in held]

    patch.apply(stock)
    patch.apply()
    assert sources() == [False] * 3
    with patch.applied(stock, source=clone), patch.applied(source=clone):
        assert sources() == [True] * 3
        inside = import_stand_in()
    assert sources() == [False] * 3
    assert ".another." not in vars(inside)["generate"].drop_in.__module__


def test_anothers_later_hook_stays():
    before = transformers_hook()
    patch.apply()
    theirs = classmethod(lambda _cls, **_kwargs: None)
    PreTrainedModel.__init_subclass__ = theirs
    try:
        patch.revert()
        assert transformers_hook() is theirs
    finally:
        del PreTrainedModel.__init_subclass__
        if before is not None:
            PreTrainedModel.__init_subclass__ = before


def test_other_models_may_be_defined_meanwhile_and_later(stock):
    """Also below a hook that another library put before ours, and one that still calls ours when it is over."""
    heard = []
    before = transformers_hook()
    if before is not None:
        del PreTrainedModel.__init_subclass__
    patch.apply()
    patch.revert()
    assert transformers_hook() is None
    PreTrainedModel.__init_subclass__ = theirs = classmethod(lambda cls, **kwargs: heard.append(cls.__name__))
    try:
        patch.apply()
        ours = PreTrainedModel.__dict__["__init_subclass__"]
        cls = type("Other", (PreTrainedModel,), {})
        assert heard == ["Other"] and "generate" not in vars(cls)
        later = import_stand_in()
        assert "generate" in vars(later) and patch.status().classes
        patch.revert()
        assert transformers_hook() is theirs
        PreTrainedModel.__init_subclass__ = ours  # what a library does that remembers hooks
        left = import_stand_in()
        assert not hasattr(vars(left)["generate"], "drop_in") and not patch.status().classes
    finally:
        del PreTrainedModel.__init_subclass__
        if before is not None:
            PreTrainedModel.__init_subclass__ = before


def test_what_is_reverted_inside_a_block_stays_so(stock):
    patch.apply(stock)
    with patch.applied(stock):
        patch.revert(stock)
    assert "generate" not in vars(stock) and patch.status().instances == ()


FROM_THE_HUB = """
import sys
from tests import test_patch
snapshot, cases = sys.argv[1], test_patch.some_cases(2)
del sys.modules["patch"]
sys.path.insert(0, snapshot)
import patch
from transformers.dynamic_module_utils import init_hf_modules
init_hf_modules()  # whoever has loaded a stock model has its cache on the path
assert patch.__file__.startswith(snapshot), patch.__file__
path = list(sys.path)
stock = test_patch.import_stand_in().from_pretrained(test_patch.CHECKPOINTS["shapes"]).eval()
for source in ({}, {"source": "somebody/drop-in"}, {"source": snapshot}):
    with patch.applied(stock, **source):
        test_patch.batched(stock, cases)
assert sys.path == path
print("answered")
"""


def test_from_a_snapshot_and_from_a_hub_id(tmp_path):
    """As the hub's cache holds a repository: a snapshot of links into a folder of nameless files. No network."""
    repository = tmp_path / "hub" / "models--somebody--drop-in"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted([*ROOT.glob("*.py"), *ROOT.glob("patch/*.py")])):
        shutil.copy(path, repository / "blobs" / str(number))
        link = repository / "snapshots" / commit / path.relative_to(ROOT)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(repository / "blobs" / str(number))
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", FROM_THE_HUB, str(repository / "snapshots" / commit)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "answered" in run.stdout, run.stderr


def test_answers_that_go_round_in_circles_end(stock):
    case = next(case for case in cases_of("shapes") if "seed" not in case and case["num_boxes"] == 2)
    patch.apply(stock)
    batch = Batch("shapes", [case])
    criterion = patch.degenerate_answer_criteria(stock, times=2, period=1)
    settings = {"generation_mode": case["generation_mode"], "max_new_tokens": case["max_new_tokens"]}
    output = stock.generate(**batch.inputs, **settings, stopping_criteria=[criterion])
    assert batch.answers(output) == batch.expected()
    with pytest.raises(ValueError, match="times=1"):
        patch.degenerate_answer_criteria(stock, times=1)
