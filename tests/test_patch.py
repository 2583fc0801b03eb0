"""patch.apply() on a model that is loaded already, with a stand-in for the stock's class."""

from __future__ import annotations

import copy
import gc
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from transformers import BatchFeature, GenerationConfig, PreTrainedModel

import patch
from patch.locateanything_patch import STOCK, batched
from tests.conftest import CHECKPOINTS, GOLDENS, ROOT, Batch, cases_of, tokenizer_of

MODULE = "transformers_modules.stand_in.modeling_locateanything"
NOTHING = patch.Status(patch.__version__, False, (), ())


def import_stand_in():
    """The stand-in as transformers would import the stock's remote code."""
    spec = importlib.util.spec_from_file_location(MODULE, ROOT / "tests" / "stand_in.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    return module.LocateAnythingForConditionalGeneration


def load(stock_class):
    return stock_class.from_pretrained(CHECKPOINTS["shapes"]).eval()


@pytest.fixture
def stock_class():
    yield import_stand_in()
    patch.revert()
    sys.modules.pop(MODULE, None)


@pytest.fixture
def stock(stock_class):
    return load(stock_class)


def some_cases(count: int, greedy: bool = False) -> list[dict]:
    cases = [case for case in cases_of("shapes") if case["num_tokens"] < 40 and not (greedy and "seed" in case)]
    return cases[:: len(cases) // count][:count]


def of_case(case: dict) -> dict:
    keys = ("repetition_penalty", "temperature", "top_p", "top_k", "generation_mode", "max_new_tokens")
    return {key: case[key] for key in keys if key in case}


def stock_call(model, case: dict, **kwargs):
    """As the model card's script calls it."""
    inputs = Batch("shapes", [case]).inputs
    inputs["image_grid_hws"] = inputs["image_grid_hws"].numpy()
    torch.manual_seed(case.get("seed", 0))
    return model.generate(**inputs, tokenizer=tokenizer_of("shapes"), use_cache=True, **of_case(case), **kwargs)


def check(model, cases: list[dict]) -> None:
    """A batch of all, each row as recorded."""
    batch = Batch("shapes", cases)
    batch.model = model
    model.config.pad_token_id = model.config.text_config.bos_token_id
    assert batch.answers(batch.run()) == batch.expected()


def lent_model(stock):
    """What the engine calls, while a call lasts."""
    return batched(stock, stock.generate.drop_in)


def right_padded(cases: list[dict]) -> BatchFeature:
    """What the stock's processor makes of several texts: padding on the right, grids as numpy."""
    inputs = Batch("shapes", cases).inputs
    order = (inputs["attention_mask"] == 0).long().argsort(dim=1, stable=True)
    turned = {name: inputs[name].gather(1, order) for name in ("input_ids", "attention_mask")}
    return BatchFeature({**inputs, **turned, "image_grid_hws": inputs["image_grid_hws"].numpy()})


def test_the_stand_in_answers_as_the_stock(stock):
    """A naive decoder, recomputing all under dense masks, agrees with the goldens: the other tests may trust it."""
    for case in some_cases(6):
        assert stock_call(stock, case) == case["output"]
    with pytest.raises(AssertionError, match="batch size = 1"):
        stock.generate(input_ids=torch.zeros(2, 3, dtype=torch.long), use_cache=True)


def test_a_patched_model_answers_batches_and_single_rows(stock):
    cases = some_cases(16)
    assert patch.apply(stock) is stock
    check(stock, cases)
    for case in cases[:3]:
        assert stock_call(stock, case) == case["output"]
        text, history, statistics = stock_call(stock, case, verbose=True)
        assert text == case["output"] and len(history) == case["forward_step"] and "num_tokens=" in statistics
    case = some_cases(1, greedy=True)[0]  # positional arguments are in the stock's order
    batch = Batch("shapes", [case]).inputs
    first = (batch[key] for key in ("pixel_values", "input_ids", "attention_mask"))
    assert (
        stock.generate(*first, None, batch["image_grid_hws"], tokenizer_of("shapes"), **of_case(case))
        == case["output"]
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


@pytest.mark.parametrize("mode", ["hybrid", "fast", "slow"])
def test_the_official_calls_on_one_row(stock, mode):
    """Answer, history and count of steps are those of the model unpatched, sampled on the same seed."""
    limits = {"generation_mode": mode, "max_new_tokens": 30}
    inputs = right_padded(some_cases(1))
    with patch.applied(stock):
        ours = seeded(workers_call, stock, inputs, **limits)
        text = seeded(evaluations_call, stock, inputs, **limits)
    answer, history, statistics = seeded(workers_call, stock, inputs, **limits)
    assert isinstance(ours, tuple) and ours[:2] == (answer, history)
    assert f"forward_step={len(history)};" in ours[2] and statistics.split(";")[0] in ours[2]
    assert text == answer == seeded(evaluations_call, stock, inputs, **limits)


@pytest.mark.parametrize("of_class", [False, True])
def test_the_official_calls_on_many_rows(stock, of_class):
    """Padded on the right, as the stock's processor does it."""
    cases = [case for case in some_cases(24, greedy=True) if case["generation_mode"] == "hybrid"]
    assert len(cases) > 1
    plain = {"temperature": 0, "top_p": None, "repetition_penalty": [c.get("repetition_penalty", 1.0) for c in cases]}
    plain["max_new_tokens"] = [case["max_new_tokens"] for case in cases]
    patch.apply(type(stock) if of_class else stock)
    inputs = right_padded(cases)
    answers, histories, statistics = workers_call(stock, inputs, **plain)
    assert answers == [case["output"] for case in cases] == evaluations_call(stock, inputs, **plain)
    assert [len(history) for history in histories] == [case["forward_step"] for case in cases]
    assert f"forward_step={sum(case['forward_step'] for case in cases)};" in statistics


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

    @classmethod
    def from_pretrained(cls, model: nn.Module, name: str) -> nn.Module:
        """Adapters that change nothing."""
        wrapper = cls(model)
        for module in wrapper.modules():
            if isinstance(module, Adapter):
                nn.init.zeros_(module.lora_B.weight)
        return wrapper

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


EXAMPLE = """
import sys, types
sys.path.insert(0, {root!r})
import transformers
from transformers.utils import HF_MODULES_CACHE
from tests import test_patch
sys.path[:] = [place for place in sys.path if place != {root!r}]
for name in ("patch", "patch.locateanything_patch"):
    del sys.modules[name]
from locateanything.processing import LocateAnythingImageProcessor, LocateAnythingProcessor
checkpoint, tokenizer = test_patch.CHECKPOINTS["shapes"], test_patch.tokenizer_of("shapes")
processor = LocateAnythingProcessor(LocateAnythingImageProcessor.from_pretrained(checkpoint), tokenizer)
tokenizer.padding_side = "right"
model = test_patch.load(test_patch.import_stand_in())
transformers.AutoModel.from_pretrained = lambda *_, **__: model
transformers.AutoProcessor.from_pretrained = lambda *_, **__: processor
peft = sys.modules["peft"] = types.ModuleType("peft")
peft.PeftModel = test_patch.AdapterModel
before = list(sys.path)
{example}
assert [place for place in sys.path if place not in (*before, HF_MODULES_CACHE)] == [{folder!r}], sys.path
import inputs as own, patch as theirs, processing
assert own.MINE and theirs.MINE and processing.MINE
"""


@pytest.mark.slow
def test_the_example_of_the_docs_from_anywhere(tmp_path):
    """In a folder of somebody who has modules of the same names, and no clone on the path."""
    text = (ROOT / "docs" / "patch.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    folder = str(ROOT / "patch")
    example = example.replace("/some/where/locateanything-batched/patch", folder)
    for name in ("inputs", "patch", "processing", "engine"):
        (tmp_path / f"{name}.py").write_text("MINE = True")
    for name, picture in (("street.jpg", "065.png"), ("screen.png", "041.png")):
        shutil.copy(GOLDENS / "shapes" / "images" / picture, tmp_path / name)
    (tmp_path / "example.py").write_text(EXAMPLE.format(root=str(ROOT), folder=folder, example=example))
    run = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert re.search(r"^street\.jpg yellow triangle \[\d+, \d+, \d+, \d+\] 0\.\d\d$", run.stdout, re.MULTILINE), run


def test_scores_and_criteria_by_a_tokenizer_alone(stock):
    case = next(case for case in cases_of("shapes") if "seed" not in case and case["num_boxes"] == 2)
    patch.apply(stock)
    inputs = Batch("shapes", [case]).inputs
    options = {**of_case(case), "return_dict_in_generate": True, "output_scores": True}
    output = stock.generate(**inputs, **options, stopping_criteria=[patch.degenerate_answer_criteria(stock)])
    (found,) = patch.post_process_grounding(tokenizer_of("shapes"), output, target_sizes=[(100, 200)])
    assert found["boxes"].shape == (2, 4) and found["scores"].gt(0).all() and found["boxes"].max() > 1
    with pytest.raises(ValueError, match="times=1"):
        patch.degenerate_answer_criteria(stock, times=1)


@pytest.mark.parametrize("when", ["patched with adapters", "adapters later"])
@pytest.mark.parametrize("what", ["model", "decoder and tower"])
def test_adapters_count(stock, when, what):
    """Rows are answered as by the unpatched model with the same adapters."""
    torch.manual_seed(0)
    cases = some_cases(4, greedy=True)
    if when == "adapters later":
        patch.apply(stock)
        check(stock, cases)
    if what == "model":
        wrapper = AdapterModel(stock)
    else:
        wrapper = stock
        stock.language_model, stock.vision_model = AdapterModel(stock.language_model), AdapterModel(stock.vision_model)
        stock.config.use_llm_lora = stock.config.use_backbone_lora = 4  # as the stock's fine-tuning notes it
    adapters = [module for module in stock.modules() if isinstance(module, Adapter)]
    patch.revert(wrapper)
    settings = [{"max_new_tokens": 30, "generation_mode": case["generation_mode"]} for case in cases]
    tokenizer = tokenizer_of("shapes")
    alone = [
        stock.generate(**Batch("shapes", [case]).inputs, tokenizer=tokenizer, use_cache=True, **own)
        for case, own in zip(cases, settings, strict=True)
    ]
    assert alone != [case["output"] for case in cases], "the adapters change nothing: the test shows nothing"
    for adapter in adapters:
        adapter.calls = 0
    assert patch.apply(wrapper) is wrapper
    modes = [own["generation_mode"] for own in settings]
    inputs = Batch("shapes", cases).inputs
    assert wrapper.generate(**inputs, tokenizer=tokenizer, max_new_tokens=30, generation_mode=modes) == alone
    assert adapters and all(adapter.calls for adapter in adapters)


def test_features_of_the_stocks_tower_are_taken(stock):
    """Beside pixels that do not count, as the stock wants it."""
    case = some_cases(1, greedy=True)[0]
    inputs = Batch("shapes", [case]).inputs
    with torch.no_grad():
        features = stock.extract_feature(inputs["pixel_values"], inputs["image_grid_hws"])
    inputs = {**inputs, "pixel_values": torch.zeros(1), "visual_features": features}
    call = {"tokenizer": tokenizer_of("shapes"), "use_cache": True, **of_case(case)}
    assert stock.generate(**inputs, **call) == case["output"]
    patch.apply(stock)
    assert stock.generate(**inputs, **call) == case["output"]
    assert stock.generate(**{**inputs, "pixel_values": None}, **call) == case["output"]


def test_rows_as_they_come(stock):
    """Continuous batching is there with `generate`, and goes with it."""
    cases = some_cases(6)
    batches = [Batch("shapes", [case]) for case in cases]
    rows = [{**batch.inputs, **of_case(batch.cases[0]), "generator": batch.generators()[0]} for batch in batches]
    patch.apply(stock)
    stock.config.pad_token_id = stock.config.text_config.bos_token_id
    outputs = stock.generate_batch(rows, max_batch_rows=2)
    assert [output.generated_tokens for output in outputs.values()] == [case["output_ids"] for case in cases]
    with stock.continuous_batching_context_manager() as manager:
        rows[0]["generator"] = batches[0].generators()[0]
        assert manager.get_result(manager.add_request(**rows[0])).generated_tokens == cases[0]["output_ids"]
    patch.revert(stock)
    names = ("generate", "generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
    assert not vars(stock).keys() & set(names)


@pytest.mark.parametrize("attention", ["magi", "flash_attention_2"])
def test_whatever_attention_the_stock_was_loaded_with(stock, attention):
    """None of these kernels is installed here; the config's dict, and so the engine, still hears of them."""
    for config in (stock.config, stock.config.text_config, stock.config.vision_config):
        config._attn_implementation = attention
    assert stock.config.to_dict()["_attn_implementation"] == attention
    patch.apply(stock)
    check(stock, some_cases(3))


def bytes_alive() -> int:
    """Of the storages of all tensors there are, but for torch.compile's fake ones."""
    gc.collect()
    kinds = torch.Tensor, torch.nn.Parameter
    tensors = [thing for thing in gc.get_objects() if type(thing) in kinds and not thing.is_meta]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_the_model_stays_what_it_was(stock, stock_class, tmp_path):
    """Class, training mode, modules, tensors, forward, what it saves; and no weight is copied."""
    cases = some_cases(2)
    Batch("shapes", cases)  # the pictures, which are kept
    stock.train().save_pretrained(tmp_path / "before")
    pointers = {name: value.data_ptr() for name, value in stock.state_dict().items()}
    modules, alive = dict(stock.named_modules()), bytes_alive()
    patch.apply(stock)
    check(stock, cases)
    assert bytes_alive() - alive < sum(parameter.nbytes for parameter in stock.parameters()) / 100
    assert {id(parameter) for parameter in lent_model(stock).parameters()} == {id(p) for p in stock.parameters()}
    assert type(stock) is stock_class and stock.training and stock.forward() == "the stock's forward"
    assert {name: value.data_ptr() for name, value in stock.state_dict().items()} == pointers
    assert dict(stock.named_modules()) == modules
    del stock.config.pad_token_id
    stock.save_pretrained(tmp_path / "after")
    weights = [(tmp_path / when / "model.safetensors").read_bytes() for when in ("before", "after")]
    assert weights[0] == weights[1] and len(os.listdir(tmp_path / "before")) == len(os.listdir(tmp_path / "after"))


def test_a_patched_model_can_be_freed(stock_class):
    model = load(stock_class)
    model.mlp1[0].register_forward_hook(lambda *_, model=model: None)  # a way back, through a module that is lent
    model.generate = types.MethodType(lambda self: "mine", model)
    check(patch.apply(model), some_cases(1))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and patch.status() == NOTHING


def test_later_changes_are_seen(stock):
    patch.apply(stock)
    cases = some_cases(3, greedy=True)
    check(stock, cases)
    kept = stock.mlp1[3].weight.detach().clone()
    stock.mlp1[3].weight.data.zero_()
    with pytest.raises(AssertionError):
        check(stock, cases)
    stock.mlp1[3].weight.data.copy_(kept)
    check(stock, cases)
    inputs = Batch("shapes", cases).inputs
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        stock.to(dtype)
        assert (
            len(stock.generate(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}, max_new_tokens=4)) == 3
        )
        assert {parameter.dtype for parameter in lent_model(stock).parameters()} == {dtype}
        assert lent_model(stock).language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    stock.generation_config = GenerationConfig(max_new_tokens=1)
    short = stock.generate(**inputs, generation_mode="slow")
    assert short.shape[1] == inputs["input_ids"].shape[1] + 1
    stock.generation_config, stock.config.pad_token_id = GenerationConfig(max_new_tokens=60), 3
    assert (stock.generate(**inputs)[:, -1] == 3).any(), "answers are padded with the new pad token"


def test_hooks_fire_and_where_they_cannot_it_is_said(stock, recwarn):
    seen = set()
    decoder, tower = stock.language_model.model, stock.vision_model
    watched = [decoder.layers[0].mlp.up_proj, decoder.layers[0].mlp, stock.mlp1, decoder.embed_tokens]
    watched += [decoder.norm, stock.language_model.lm_head, tower.encoder.blocks[0].mlp, tower.patch_embed.proj]
    for module in watched:
        module.register_forward_hook(lambda module, *_: seen.add(id(module)))
    patch.apply(stock)
    check(stock, some_cases(2))
    assert seen == {id(module) for module in watched}
    assert not [warning for warning in recwarn if "hooks" in str(warning.message)]
    decoder.layers[1].register_forward_pre_hook(lambda *_: None)
    with pytest.warns(
        UserWarning, match=r"does not call the hooks on language_model\.model\.layers\.1, whose"
    ) as said:
        stock.generate(**Batch("shapes", some_cases(1)).inputs, max_new_tokens=1)
    assert said[-1].filename == __file__


def test_training_goes_on_around_it(stock):
    """Training mode and gradient checkpointing stay on; gradients and the optimiser's step are untouched by a call."""
    stock.train()
    getattr(stock, "activation_checkpointing_enable", stock.gradient_checkpointing_enable)()  # 5.24's name for it
    stock.enable_input_require_grads()
    cases = some_cases(2)
    patch.apply(stock)
    for around in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with around():
            check(stock, cases)
    loss = stock.language_model(torch.tensor([[1, 2, 3]]), use_cache=False).logits.sum()
    check(stock, cases)
    loss.backward()
    assert stock.training and stock.language_model.model.gradient_checkpointing
    assert stock.language_model.model.norm.weight.grad is not None


def test_compiled_models(stock):
    cases = some_cases(2)
    compiled = torch.compile(stock, backend="eager")
    assert patch.apply(compiled) is compiled
    check(compiled, cases)
    stock.forward = torch.compile(stock.forward, backend="eager")
    stock.language_model = torch.compile(stock.language_model, backend="eager")
    check(stock, cases)
    patch.revert(compiled)
    assert "generate" not in vars(stock)


def test_copies(stock):
    """A deep copy is patched as its model is, over weights of its own; one that was pickled is not, but works."""
    cases = some_cases(2, greedy=True)
    patch.apply(stock)
    check(stock, cases)
    twin = copy.deepcopy(stock)
    stock.mlp1[3].weight.data.zero_()
    check(twin, cases)
    assert len(patch.status().instances) == 2
    patch.revert(twin)
    assert "generate" not in vars(twin) and "generate" in vars(stock)
    untouched = copy.deepcopy(stock)
    patch.revert(untouched)
    assert "generate" not in vars(untouched)
    torch.save(patch.apply(twin), file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert stock_call(loaded, cases[0]) == cases[0]["output"]
    check(patch.apply(loaded), cases)


def test_two_models_and_many_threads(stock, stock_class):
    other, cases = load(stock_class), some_cases(6, greedy=True)
    patch.apply(stock)
    patch.apply(other)
    other.mlp1[3].weight.data.zero_()
    with pytest.raises(AssertionError):
        check(other, cases)
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(check, stock, cases[i % 3 :: 3]) for i in range(6)]:
            done.result()


def test_offloaded_by_accelerate(stock, tmp_path):
    """Two layers and the tower's position grid wait on disk; the hooks that fetch them are the stock's."""
    parts = ("mlp1", "language_model.model.embed_tokens", "language_model.model.norm", "language_model.lm_head")
    places = {"vision_model": "disk", "language_model.model.rotary_emb": "cpu", **dict.fromkeys(parts, "cpu")}
    places |= {f"language_model.model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    patch.apply(stock)
    dispatch_model(stock, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    for _ in range(2):
        check(stock, some_cases(2))
        assert stock.vision_model.patch_embed.pos_emb.weight.is_meta, "fetched for a call, and gone after it"


def test_what_it_cannot_run_on_is_refused(stock):
    inputs = Batch("shapes", some_cases(1)).inputs
    patch.apply(stock)
    stock.mlp1.to("meta")
    with pytest.raises(ValueError, match=r"\['cpu', 'meta'\] without accelerate's hooks"):
        stock.generate(**inputs)
    del stock.language_model.model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match=r"no 'language_model\.model\.layers\.0\.self_attn\.q_proj'"):
        stock.generate(**inputs)


def test_applying_and_reverting_in_any_order(stock, stock_class):
    original, cases = vars(stock_class)["generate"], some_cases(1)
    other = load(stock_class)
    for first, second in ((stock, stock_class), (stock_class, stock)):
        patch.apply(stock)
        bound = stock.generate
        patch.apply(stock)
        assert stock.generate == bound, "twice is once"
        patch.apply(stock_class)
        check(stock, cases)
        check(other, cases)
        patch.revert(first)
        check(stock, cases)
        patch.revert(second)
        patch.revert(second)
        assert "generate" not in vars(stock) and vars(stock_class)["generate"] is original
        assert patch.status() == NOTHING
    own = stock.generate = types.MethodType(lambda self: "mine", stock)
    patch.apply(stock)
    patch.apply(stock)
    patch.revert(stock)
    assert vars(stock)["generate"] is own and stock.generate() == "mine"
    assert not [name for name in vars(stock) if "patch" in name]
    patch.apply(stock)
    del stock.generate
    patch.revert(stock)
    assert patch.status() == NOTHING


def test_a_block_leaves_what_was_before_it(stock, stock_class):
    patch.apply(stock)
    with patch.applied(stock), patch.applied():
        assert patch.status().everywhere and patch.status().classes
    assert not patch.status().everywhere and not patch.status().classes and patch.status().instances
    patch.revert()
    patch.apply(stock_class)
    with patch.applied(), patch.applied():
        pass
    assert patch.status().classes and not patch.status().everywhere
    with pytest.raises(ZeroDivisionError), patch.applied(stock):
        raise ZeroDivisionError
    assert "generate" not in vars(stock)
    patch.apply(stock)
    with patch.applied(stock):
        patch.revert(stock)
    assert "generate" not in vars(stock), "what is reverted inside stays so"


def test_everywhere(stock, stock_class):
    """Also classes that are imported later, and those that no module holds any more."""

    def is_patched(cls) -> bool:
        return "drop_in" in vars(vars(cls)["generate"])

    patch.apply()
    patch.apply()
    newer = import_stand_in()
    assert newer is not stock_class and is_patched(newer) and is_patched(stock_class)
    check(stock, some_cases(1))
    check(load(newer), some_cases(1))
    assert "generate" not in vars(type("Other", (PreTrainedModel,), {}))
    with patch.applied():
        inside = import_stand_in()
    assert is_patched(inside) and patch.status().everywhere and f"{MODULE}.{STOCK}" in patch.status().classes
    patch.revert()
    assert patch.status() == NOTHING
    assert not any(map(is_patched, (stock_class, newer, inside, import_stand_in())))
    with pytest.raises(AssertionError, match="use_cache"):
        stock.generate()


def test_what_is_not_locateanything_is_refused(shapes):
    for target in (shapes, type(shapes)):
        with pytest.raises(TypeError, match="this project's own model"):
            patch.apply(target)
    stranger = types.new_class(STOCK, (torch.nn.Module,))
    for target in ("x", {}, torch.nn.Linear(2, 2), torch.nn.Linear, int, shapes.generate, stranger):
        for act in (patch.apply, patch.revert, lambda target: patch.applied(target).__enter__()):
            with pytest.raises(TypeError, match=r"patch: got .*; expected LocateAnythingForConditionalGeneration"):
                act(target)


def test_code_that_is_not_there_is_said_at_once(stock, tmp_path):
    for target in (stock, type(stock), None):
        with pytest.raises(OSError, match="modeling_locateanything_batched"):
            patch.apply(target, source=tmp_path)
    with pytest.raises(ValueError, match=os.path.expanduser("~/no/such/code")):
        patch.apply(stock, source="~/no/such/code")
    assert patch.status() == NOTHING and "generate" not in vars(stock)


def test_another_source_takes_the_place_of_the_first(stock, tmp_path):
    clone = tmp_path / "another"
    clone.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, clone)

    def others() -> list[bool]:
        return [".another." in vars(owner)["generate"].drop_in.__module__ for owner in (stock, type(stock))]

    patch.apply(stock)
    patch.apply()
    with patch.applied(stock, source=clone), patch.applied(source=clone):
        assert others() == [True, True]
        check(stock, some_cases(1))
        inside = import_stand_in()
    assert others() == [False, False]
    assert ".another." not in vars(inside)["generate"].drop_in.__module__
