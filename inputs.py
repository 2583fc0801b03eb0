# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""From `generate`'s arguments to rows, and from rows to what it returns; images are encoded on demand."""

import copy
import difflib
import itertools
import math
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import ModelOutput

from .configuration import WINDOW, LocateAnythingConfig, TokenRoles
from .cuda_graphs import kept_bytes
from .rows import Picture, Row, RowSettings
from .sampling import SamplingParameters
from .vision import PATCHES_A_PASS, place_of, read_images

MODES = ("hybrid", "fast", "slow", "verified")
ROWS_A_STEP = 32  # beyond, arithmetic takes all the time that memory traffic saves
DEFAULT_NEW_TOKENS = 2048  # docs/stock-behaviour.md §6
_PER_ROW: tuple[str, ...] = ("temperature", "top_p", "top_k", "repetition_penalty", "do_sample", "max_new_tokens")
_PER_ROW += ("max_length", "generation_mode", "verify_labels")
_PROMPT, _SHOWN = ("input_ids", "attention_mask"), ("pixel_values", "image_grid_hws", "visual_features")
_CALLED = ("generator", "tokenizer", "logits_processor", "stopping_criteria", "streamer")
# transformers' options for other ways of decoding, which would have no effect here, and what of them means "off"
_WITHOUT_EFFECT: dict[str, Any] = {
    **dict.fromkeys(("min_p", "top_h", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "dola_layers")),
    **dict.fromkeys(("prompt_lookup_num_tokens", "force_words_ids", "constraints", "cache_implementation")),
    **dict.fromkeys(("diversity_penalty", "assistant_early_exit", "synced_gpus", "exponential_decay_length_penalty")),
    **dict.fromkeys(("output_logits", "output_attentions", "output_hidden_states")),
    **dict.fromkeys(("typical_p", "guidance_scale"), 1.0),
    **dict.fromkeys(("num_beams", "num_beam_groups"), 1),
}


# ---- prompts


def read_prompts(input_ids: Any, attention_mask: Any, config: LocateAnythingConfig, pad_token_id: int) -> tuple:
    """Takes a batch apart, wherever it is padded.

    Args:
        input_ids: `[rows, L]` long. attention_mask: `[rows, L]`, or None: then the pad tokens at a row's ends are
            padding.

    Returns:
        `input_ids` padded on the left, and each row's tokens without padding, a list of ints.

    Raises:
        ValueError: no rows, wrong shapes, an empty row, an id outside the vocabulary.
    """
    if isinstance(input_ids, Mapping):
        raise ValueError(f"inputs: got the processor's output ({', '.join(input_ids)}); write generate(**inputs).")
    if input_ids is None:
        raise ValueError("generate() needs input_ids; got none.")
    input_ids = torch.as_tensor(input_ids)
    if input_ids.dim() != 2 or 0 in input_ids.shape or input_ids.is_floating_point():
        raise ValueError(f"input_ids are {input_ids.dtype} {list(input_ids.shape)}; expected integers [rows, length].")
    ids = input_ids.cpu().numpy()
    vocabulary, low, high = config.text_config.vocab_size, ids.min(), ids.max()
    if low < 0 or high >= vocabulary:
        raise ValueError(f"input_ids hold ids from {low} to {high}; the vocabulary has {vocabulary}.")
    if attention_mask is None:
        mask = ids != pad_token_id
        mask = np.maximum.accumulate(mask, 1) & np.maximum.accumulate(mask[:, ::-1], 1)[:, ::-1]
    else:
        mask = (torch.as_tensor(attention_mask) != 0).cpu().numpy()
        if mask.shape != ids.shape:
            raise ValueError(f"attention_mask is {list(mask.shape)}; expected input_ids' {list(ids.shape)}.")
    if mask.all():
        return input_ids.long(), ids.tolist()
    rows = [line[kept].tolist() for line, kept in zip(ids, mask, strict=True)]
    if not all(rows):
        raise ValueError(f"row {rows.index([])}: attention_mask is 0 everywhere; an empty prompt has no answer.")
    order = torch.from_numpy(mask.argsort(axis=1, kind="stable")).to(input_ids.device)
    return input_ids.long().gather(1, order), rows


# ---- settings


def read_call(
    model: Any, given: GenerationConfig | None, arguments: dict[str, Any], *, as_text: bool = False
) -> tuple[torch.Tensor, list[Row], GenerationConfig]:
    """Rows of what `generate` is given. Of the sources of settings the first that speaks wins: arguments, `given`, the
    model's generation config.

    `temperature` alone decides between greedy (0, the default) and sampling, as in the stock; `do_sample=True` means
    temperature 1.0 unless told, and `do_sample=False` greedy.

    Args:
        arguments: `generate`'s for the rows, and those that are transformers' own; None stands for none. Those of
            `_PER_ROW` may be a list with one value per row, None where none is given.
        as_text: a stock call, which asks for text; as there, `do_sample` and the model's generation config are not
            looked at then, and no row grows beyond its tokenizer's `model_max_length`.

    Returns:
        `input_ids` padded on the left; the rows of the answer, each prompt `num_return_sequences` times; the
        generation config without what the rows say.

    Raises:
        ValueError: prompts of `read_prompts`, images of `pictures_of`; an unknown argument, mode or value, a list of
            the wrong length, a prompt at or over its limit, a generator of another device, a streamer of many rows.
    """
    arguments = {name: value for name, value in arguments.items() if value is not None}
    asked, shown, called = (
        {name: arguments.pop(name, None) for name in names} for names in (_PROMPT, _SHOWN, _CALLED)
    )
    padded, prompts = read_prompts(**asked, config=model.config, pad_token_id=model.pad_token_id)
    generator, tokenizer = called["generator"], called["tokenizer"]
    cap = model.config.text_config.max_position_embeddings
    if as_text:
        cap = min(cap, getattr(tokenizer, "model_max_length", cap))  # a processor knows no length
    arguments.pop("labels", None)  # of a batch for training
    if as_text:
        arguments.pop("do_sample", None)
    if not arguments.pop("use_cache", True):
        raise ValueError("use_cache=False: LocateAnything's windows need the cache; leave it on.")
    if arguments.pop("n_future_tokens", WINDOW) != WINDOW:
        raise ValueError(f"n_future_tokens: this model predicts {WINDOW} tokens at a time.")
    argued = {name: _per_row(name, arguments.pop(name), len(prompts)) for name in _PER_ROW if name in arguments}
    allowed = arguments.pop("prefix_allowed_tokens_fn", None)
    sequences = arguments.pop("num_return_sequences", (given or model.generation_config).num_return_sequences or 1)
    check_number("num_return_sequences", sequences, whole=True, least=1)
    config, stops, differing = _merged(model, given, arguments)
    # of the model's own config, only what differs from transformers' defaults speaks
    said = {} if as_text else {**differing}
    said |= {} if given is None else {name: value for name, value in vars(given).items() if value is not None}
    # 4.57's default length is nobody's wish
    spoken = {name: said[name] for name in _PER_ROW if name in said and (name, said[name]) != ("max_length", 20)}
    least, least_new = config.min_length or 0, config.min_new_tokens
    # what the rows' settings and the rules do already must not be done a second time by transformers' factories
    config.eos_token_id = config._eos_token_tensor = config.max_new_tokens = None
    config.min_length = config.min_new_tokens = config.max_length = None
    config.do_sample, config.repetition_penalty, config.num_return_sequences = False, 1.0, 1
    rows, device = [], place_of(model.get_input_embeddings())
    generators = _generators(generator, len(prompts) * int(sequences), device)
    if called["streamer"] is not None and len(generators) > 1:
        raise ValueError(f"streamer= follows one row; got {len(generators)}.")
    pictures = pictures_of(model, prompts, **shown)
    criteria = StoppingCriteriaList(called["stopping_criteria"] or [])
    # of a processor, its tokenizer
    criteria = model._get_stopping_criteria(config, criteria, getattr(tokenizer, "tokenizer", tokenizer))
    for index, draws in enumerate(generators):
        row = index // int(sequences)
        prompt, own = prompts[row], {name: values[row] for name, values in argued.items() if values[row] is not None}
        mode, verified = own.get("generation_mode", "hybrid"), own.get("verify_labels", False)
        if mode not in MODES:
            raise ValueError(f"generation_mode={mode!r} is unknown; expected one of {', '.join(MODES)}.")
        if not isinstance(verified, bool):
            raise ValueError(f"verify_labels={verified!r}: expected True or False.")
        told = {**spoken, **own}
        if "max_length" in own and "max_new_tokens" not in own:
            told.pop("max_new_tokens", None)  # a config's; the argument speaks first
        settings = RowSettings(
            mode,
            _limit(told, len(prompt), cap, row),
            _sampling(own, told),
            max(least, len(prompt) + least_new if least_new else 0),
            verified and mode in ("hybrid", "fast"),  # the others accept every token by next-token decoding anyway
            stops,
        )
        # transformers' factory builds whatever else the config asks for, some of it by prompt length
        config.max_length = settings.limit
        processors = model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(prompt),
            encoder_input_ids=padded[row : row + 1, -len(prompt) :].to(device),
            # a row is asked alone, so transformers would count the places of its window
            prefix_allowed_tokens_fn=allowed and (lambda _, ids, row=index: allowed(row, ids)),
            logits_processor=LogitsProcessorList(called["logits_processor"] or []),
            device=device,
        )
        rows.append(Row(index, prompt, settings, pictures[row], processors, criteria, called["streamer"], draws))
    config.max_length = None
    return padded, rows, config


_MERGED: WeakKeyDictionary[Any, tuple] = WeakKeyDictionary()  # of each model the last one


def _merged(
    model: Any, given: GenerationConfig | None, arguments: dict[str, Any]
) -> tuple[GenerationConfig, frozenset[int], dict[str, Any]]:
    """What `_merge` gives, and how the model's own config differs from transformers' defaults: the last ones where
    all is as it was then. A stream's requests mostly ask alike, and merging takes longer than all else."""
    own = model.generation_config
    told = vars(own), given and vars(given), model.pad_token_id, arguments
    known = _MERGED.get(model)
    try:
        merged = known[1:] if known and known[0] == told else None
    except (RuntimeError, ValueError):  # a tensor or an array is among it
        merged = None
    if merged is None:
        merged = *_merge(model, given, arguments), own.to_diff_dict()
        with suppress(TypeError, RuntimeError):  # what cannot be copied is not kept
            _MERGED[model] = copy.deepcopy((told, *merged))
    return copy.copy(merged[0]), *merged[1:]


def _merge(
    model: Any, given: GenerationConfig | None, arguments: dict[str, Any]
) -> tuple[GenerationConfig, frozenset[int]]:
    """transformers' merge of the generation configs and the arguments, without what has no meaning here, and the ids
    that end an answer beside its own end."""
    config, unknown = model._prepare_generation_config(given, **arguments)
    for name, off in _WITHOUT_EFFECT.items():
        asked = unknown.pop(name, getattr(config, name, None))
        if asked and asked != off:
            raise ValueError(f"{name}={asked!r} is not supported: it has no meaning for this model's decoding.")
    if unknown:
        known = [*vars(config), "generation_mode", "pixel_values", "image_grid_hws", "visual_features"]
        close = difflib.get_close_matches(next(iter(unknown)), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"generate() got unknown arguments: {', '.join(unknown)}.{hint}")
    if config.pad_token_id is None:
        config.pad_token_id = model.pad_token_id
    model._prepare_special_tokens(config, device="cpu")
    ends = [] if config._eos_token_tensor is None else config._eos_token_tensor.tolist()
    return config, frozenset(ends) - {TokenRoles.of(model.config).end}


def _per_row(name: str, value: Any, rows: int) -> list[Any]:
    """One value for every row: a scalar for all, or as many as there are rows. Also as a tensor or array."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)):
        return [value] * rows
    if len(value) != rows:
        raise ValueError(f"{name} has {len(value)} values for {rows} rows; expected one for all or one per row.")
    return list(value)


def check_number(name: str, value: Any, *, whole: bool = False, least: float = -math.inf) -> None:
    """Refuses, by a ValueError that names it, what is no finite number, no whole one, or too small."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and -1e300 < value < 1e300 and value >= least) or (whole and int(value) != value):
        bound = "" if least == -math.inf else f" of {least} or more"
        raise ValueError(f"{name}={value!r}: expected a {'whole ' if whole else ''}number{bound}.")


def _limit(told: dict[str, Any], length: int, cap: int, row: int) -> int:
    if told.get("max_new_tokens") is not None:
        check_number("max_new_tokens", told["max_new_tokens"], whole=True, least=1)
        limit = length + int(told["max_new_tokens"])
    else:
        limit = length + DEFAULT_NEW_TOKENS if told.get("max_length") is None else told["max_length"]
        check_number("max_length", limit, whole=True)
    limit = min(int(limit), cap)
    if length >= limit:
        raise ValueError(f"row {row}: its prompt has {length} tokens, at or over the length limit of {limit}.")
    return limit


def _sampling(own: dict[str, Any], told: dict[str, Any]) -> SamplingParameters:
    """own: what the row's arguments say. told: what they and the configs say."""
    if own.get("do_sample") is False:
        own, told = {}, {"repetition_penalty": told.get("repetition_penalty")}
    temperature = own.get("temperature")
    if temperature is None:
        sampled = told.get("temperature")
        temperature = (1.0 if sampled is None else sampled) if told.get("do_sample") else 0.0
    penalty = 1.0 if told.get("repetition_penalty") is None else told["repetition_penalty"]
    # filters change a greedy row's thresholds, so only who asked for them by argument gets them
    filters = told if temperature else own
    top_p, top_k = filters.get("top_p"), filters.get("top_k")
    check_number("temperature", temperature, least=0)
    check_number("repetition_penalty", penalty, least=1e-6)
    check_number("top_p", 1.0 if top_p is None else top_p, least=0)
    check_number("top_k", top_k or 0, whole=True, least=0)
    return SamplingParameters(
        repetition_penalty=float(penalty),
        temperature=float(temperature),
        top_p=None if top_p is None or top_p >= 1 else float(top_p),
        top_k=int(top_k) if top_k else None,
    )


def _generators(generator: Any, rows: int, device: torch.device) -> list[torch.Generator | None]:
    """One per row, or None for each where one draws for all."""
    listed = _per_row("generator", generator, rows)
    for one in listed:
        if one is not None and not isinstance(one, torch.Generator):
            raise ValueError(f"generator: got a {type(one).__name__}; expected a torch.Generator or a list of them.")
        if one is not None and one.device.type != device.type:
            raise ValueError(f"generator: got one on {one.device}, but the rows' numbers are on {device}.")
    return listed if isinstance(generator, (list, tuple)) else [None] * rows


def rows_that_fit(model: Any, tokens: int, device: torch.device) -> int:
    """Rows whose caches of `tokens` tokens fit into half of the free memory, `ROWS_A_STEP` at most."""
    if device.type != "cuda":
        return ROWS_A_STEP  # pages of a cache on CPU are taken as rows come to need them
    text = model.config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = tokens * 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * model.dtype.itemsize
    # what torch holds and does not use, and what waits for this call
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) + kept_bytes(model)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return max(1, min(ROWS_A_STEP, int(free // 2 // size)))


# ---- results


@dataclass
class LocateAnythingGenerateOutput(ModelOutput):
    """What `generate(return_dict_in_generate=True)` returns.

    Args:
        sequences: `[rows, prompt + new]` long, prompts padded on the left, answers on the right.
        row_forwards: `[rows]` long, the decoding forwards each row took part in (the stock's `forward_step`).
        finish_reasons: per row "end" (its own end of turn), "limit" (of length: the answer may be cut), "stop" (an id,
            string or criterion of the caller's), "repetition" (`degenerate_answer_criteria` cut it) or "error".
        row_errors: per row None, or what ended it before its end: at which token its logits became NaN or infinite,
            and whether its image features or a logits processor did it. The tokens before it are in `sequences`.
        token_log_probs: with `output_scores=True`, `[rows, new]` float32: log-probability of each token of the
            answers, under the distribution it was accepted from, after penalties and filters. NaN on padding.
        accepted_by: with `output_scores=True`, `[rows, new]` long, a `Phase` of decoding.py: 0 "mtp" from a window, 1
            "ar" by next-token decoding, 2 "verified" by next-token decoding of a draft. -1 on padding.
    """

    sequences: torch.Tensor | None = None
    row_forwards: torch.Tensor | None = None
    finish_reasons: list[str | None] | None = None
    row_errors: list[str | None] | None = None
    token_log_probs: torch.Tensor | None = None
    accepted_by: torch.Tensor | None = None


def side_by_side(rows: list[list], filling: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Lists of different lengths → `[rows, longest]`, padded on the right."""
    return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], True, filling).to(device)


def texts_of(rows: list[Row], tokenizer: Any, seconds: float | None) -> Any:
    """What the stock's generate returns: the text, or with `seconds` (verbose) also the history and statistics."""

    def text_of(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    texts = [text_of(row.answer) for row in rows]
    answer = texts[0] if len(rows) == 1 else texts
    if seconds is None:
        return answer
    tokens, boxes = sum(len(row.answer) for row in rows), sum(text.count("<box>") for text in texts)
    statistics = (
        f"num_tokens={tokens}; generate_time(s)={seconds:.4f}; tps={tokens / seconds:.4f}; "
        f"forward_step={sum(row.forwards for row in rows)}; num_boxes={boxes}; bps={boxes / seconds:.4f}; "
        f"switch_to_ar={sum(row.switches for row in rows)}"
    )
    histories = []
    for row in rows:
        ids = iter(row.answer)
        histories.append([(mode, text_of(list(islice(ids, count)))) for mode, count in row.steps])
    return answer, histories[0] if len(rows) == 1 else histories, statistics


# ---- images


def pictures_of(
    model: Any, prompts: list[list[int]], pixel_values: Any, image_grid_hws: Any, visual_features: Any
) -> list[list[Picture]]:
    """The pictures of each prompt, from what `generate` is given.

    Raises:
        ValueError: images of a wrong shape, or that do not fill the prompts' image slots exactly, in order.
    """
    vision = model.config.vision_config
    merged = math.prod(vision.merge_kernel_size)
    shape: tuple[int, ...]
    if visual_features is not None:
        pictures = [Picture(image, None, len(image)) for image in map(torch.as_tensor, visual_features)]
        name, shape = "visual_features", (merged * vision.hidden_size,)
    else:
        images, sizes = read_images(pixel_values, image_grid_hws)
        pictures = [Picture(image, size, len(image) // merged) for image, size in zip(images, sizes, strict=True)]
        name, shape = "pixel_values", (3, vision.patch_size, vision.patch_size)
    slots = [prompt.count(model.config.image_token_index) for prompt in prompts]
    shown = images_by_row(slots, [picture.tokens for picture in pictures])
    for picture in pictures:
        if picture.patches.shape[1:] != shape:
            raise ValueError(f"{name}: got an image of {list(picture.patches.shape)}; expected {['n', *shape]}.")
    return [[pictures[image] for image in row] for row in shown]


class Pictures:
    """The pictures of an engine's rows: equal ones are one, encoded when it takes them, forgotten when none wants it.

    Args:
        model: encodes and projects. share: whether equal pictures are looked for.
    """

    def __init__(self, model: Any, share: bool = True):
        self.model, self.share, self.patches_a_pass = model, share, PATCHES_A_PASS  # which `halve` may change
        self.numbers = itertools.count()
        self.seen: WeakValueDictionary[tuple, Picture] = WeakValueDictionary()  # by fingerprint

    def join(self, row: Row) -> None:
        """A row will take its pictures; those that rows before it show already are theirs."""
        row.pictures = [self.shared(picture) for picture in row.pictures]
        for picture in set(row.pictures):
            picture.wanted += 1

    def shared(self, picture: Picture) -> Picture:
        if picture.number < 0 and self.share:
            other = self.seen.setdefault(picture.fingerprint, picture)
            if other.patches is picture.patches or torch.equal(other.patches, picture.patches):
                picture = other
        if picture.number < 0:
            picture.number = next(self.numbers)
        return picture

    def take(self, wanted: list[tuple[Picture, slice]]) -> list[torch.Tensor]:
        """Features `[tokens, hidden]`, of each picture those asked for."""
        missing = dict.fromkeys(picture for picture, _ in wanted if picture.encoded is None)
        features = {picture: picture.patches for picture in missing}
        if pixels := [picture for picture in missing if picture.size is not None]:
            sizes = torch.tensor([picture.size for picture in pixels])
            encoded = self.model.extract_feature([picture.patches for picture in pixels], sizes, self.patches_a_pass)
            features.update(zip(pixels, encoded, strict=True))
        # one by one where they are encoded so: `batch_invariant` wants shapes that follow from the picture alone
        groups = [[feature] for feature in features.values()] if self.patches_a_pass == 1 else [[*features.values()]]
        for picture, feature in zip(features, itertools.chain(*map(self.model.project, groups)), strict=True):
            picture.encoded = feature
        return [picture.encoded[part] for picture, part in wanted]

    def release(self, row: Row) -> None:
        """A row has entered, or will not: features that no other row wants are dropped."""
        for picture in set(row.pictures):
            picture.wanted -= 1
            if picture.wanted <= 0:
                picture.encoded = None

    def halve(self) -> None:
        """Memory ran out: encode in passes of half the size."""
        self.patches_a_pass = max(1, self.patches_a_pass // 2)


def images_by_row(slots: list[int], tokens: list[int]) -> list[list[int]]:
    """Which images fill each row's slots, in order, given the image tokens of each image.

    Raises:
        ValueError: a row's slots end inside an image, images run out, or images are left over.
    """
    rows, left = [], deque(range(len(tokens)))
    for index, count in enumerate(slots):
        images, filled = [], 0
        while filled < count and left:
            images.append(left.popleft())
            filled += tokens[images[-1]]
        if filled != count:
            raise ValueError(f"row {index} has {count} image slots, but its images give {filled} tokens.")
        rows.append(images)
    if left:
        raise ValueError(f"the rows have {sum(slots)} image slots, but {len(tokens)} images give {sum(tokens)}.")
    return rows
