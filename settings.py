# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What `generate` was asked for: from transformers' (and the stock's) arguments to one `RowSettings` per row."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from transformers import GenerationConfig

from .generation import RowSettings
from .sampling import SamplingParameters

MODES = ("hybrid", "fast", "slow", "verified")
DEFAULT_NEW_TOKENS = 2048  # decoding.md §6
_PER_ROW = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "max_length")
_ONE_FORWARD = ("output_logits", "output_attentions", "output_hidden_states")
# transformers' options for other ways of decoding, which would have no effect here
_WITHOUT_EFFECT = (
    *("min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", "guidance_scale", "penalty_alpha"),
    *("dola_layers", "prompt_lookup_num_tokens", "num_beam_groups", "force_words_ids", "constraints"),
    *("cache_implementation", "diversity_penalty", "assistant_early_exit", "synced_gpus"),
    "exponential_decay_length_penalty",
)
# their values that mean "off", whichever release's default they are
_NEUTRAL = {"typical_p": 1.0, "guidance_scale": 1.0, "num_beam_groups": 1}
LEAST, MOST = 1e-30, 1e30  # of what logits are divided by; beyond, float32 holds no quotient


@dataclass(frozen=True)
class CallSettings:
    """Settings of one call.

    rows: one per input row, before `num_return_sequences` repeats it. stops: end-of-sequence ids beside the rules'
    own im_end. config: the generation config without what `rows` already says, for transformers' own factories of
    processors and criteria.
    """

    rows: list[RowSettings]
    stops: frozenset[int]
    pad_token_id: int
    num_return_sequences: int
    return_dict: bool
    scored: bool
    config: GenerationConfig


def resolve(
    prompt_lengths: list[int],
    *,
    generation_mode: str | Sequence[str],
    verify_labels: bool | Sequence[bool] = False,
    given: GenerationConfig | None,
    default: GenerationConfig,
    arguments: dict[str, Any],
    stock_call: bool,
    length_cap: int,
    end_token_id: int,
    pad_token_id: int,
) -> CallSettings:
    """Merges the sources of settings; the first that speaks wins: arguments, `given`, `default`.

    `temperature` alone decides between greedy (0, the default) and sampling, as in the stock; `do_sample=True` means
    temperature 1.0 unless told, and `do_sample=False` greedy. In a stock call (`tokenizer=` was passed) `do_sample` is
    ignored, as there. Of `default`, the model's own config, only what differs from transformers' defaults speaks.

    Args:
        prompt_lengths: tokens of each row's prompt, without padding.
        arguments: `generate`'s keyword arguments that a `GenerationConfig` may take. `_PER_ROW` ones may be a list
            with one value per row, None where none is given.
        length_cap: no row grows beyond this many tokens.

    Raises:
        ValueError: an unknown argument, mode or value, a list of the wrong length, a prompt at or over its limit.
    """
    if given is not None and not isinstance(given, GenerationConfig):
        raise ValueError(f"generation_config: got a {type(given).__name__}; expected a GenerationConfig.")
    rows = len(prompt_lengths)
    modes = _per_row("generation_mode", generation_mode, rows)
    labels = _per_row("verify_labels", verify_labels, rows)
    for wanted in labels:
        if not isinstance(wanted, bool):
            raise ValueError(f"verify_labels={wanted!r}: expected True or False.")
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"generation_mode={mode!r} is unknown; expected one of {', '.join(MODES)}.")

    per_row = {name: arguments.pop(name) for name in _PER_ROW if arguments.get(name) is not None}
    per_row = {name: _per_row(name, value, rows) for name, value in per_row.items()}
    # the stock does not look at the model's generation config
    spoken = {} if stock_call and given is None else _what_speaks(given, default)
    config = _config(given or default, {name: value for name, value in arguments.items() if value is not None})
    least, least_new = config.min_length or 0, config.min_new_tokens or 0
    check_number("min_length", least, whole=True, least=0)
    check_number("min_new_tokens", least_new, whole=True, least=0)

    settings = []
    for row, (mode, prompt) in enumerate(zip(modes, prompt_lengths, strict=True)):
        explicit = {name for name in per_row if per_row[name][row] is not None}
        own = {name: per_row[name][row] if name in explicit else spoken.get(name) for name in _PER_ROW}
        limit, sampling = _limit(own, prompt, length_cap, row), _sampling(own, explicit, stock_call)
        own_least = max(least, prompt + least_new if least_new else 0)
        # the other modes accept every token by next-token decoding anyway
        own_labels = labels[row] and mode in ("hybrid", "fast")
        settings.append(RowSettings(mode, limit, sampling, own_least, own_labels))

    sequences = 1 if config.num_return_sequences is None else config.num_return_sequences
    if config.max_time is not None:
        check_number("max_time", config.max_time)
    check_number("num_return_sequences", sequences, whole=True, least=1)
    stops = _ids("eos_token_id", config.eos_token_id)
    pad = _ids("pad_token_id", config.pad_token_id)
    if len(pad) > 1:
        raise ValueError(f"pad_token_id={config.pad_token_id!r}: expected one id.")
    # what the rows' settings and the rules already do must not be done a second time by transformers' factories
    config.eos_token_id = config.max_length = config.max_new_tokens = None
    config.min_length = config.min_new_tokens = None
    config._eos_token_tensor = None
    config.do_sample, config.repetition_penalty, config.num_beams, config.num_return_sequences = False, 1.0, 1, 1
    return CallSettings(
        rows=settings,
        stops=frozenset(stops) - {end_token_id},
        pad_token_id=pad[0] if pad else pad_token_id,
        num_return_sequences=int(sequences),
        return_dict=bool(config.return_dict_in_generate),
        scored=bool(config.output_scores),
        config=config,
    )


def _per_row(name: str, value: Any, rows: int) -> list[Any]:
    """One value for every row: a scalar for all, or as many as there are rows. Also as a tensor or array."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return [value] * rows
    if len(value) != rows:
        raise ValueError(f"{name} has {len(value)} values for {rows} rows; expected one for all or one per row.")
    return list(value)


def _what_speaks(given: GenerationConfig | None, default: GenerationConfig) -> dict[str, Any]:
    if given is None:
        spoken = default.to_diff_dict()
        return {name: spoken.get(name) for name in _PER_ROW}
    untouched = GenerationConfig()
    spoken = {name: getattr(given, name, None) for name in _PER_ROW}
    if spoken["max_length"] == getattr(untouched, "max_length", None):
        spoken["max_length"] = None  # 4.57's default of 20 is nobody's wish
    return spoken


def _config(base: GenerationConfig, arguments: dict[str, Any]) -> GenerationConfig:
    config = copy.deepcopy(base)
    untouched = GenerationConfig()
    for name in _WITHOUT_EFFECT:
        asked = arguments.pop(name, getattr(config, name, None))
        if asked and asked not in (getattr(untouched, name, None), _NEUTRAL.get(name)):
            raise ValueError(f"{name}={asked!r} is not supported: it has no meaning for this model's decoding.")
    unknown = [name for name in arguments if not hasattr(config, name)]
    if unknown:
        known = [*vars(config), *_PER_ROW, "generation_mode", "pixel_values", "image_grid_hws", "visual_features"]
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"generate() got unknown arguments: {', '.join(unknown)}.{hint}")
    for name, argument in arguments.items():
        setattr(config, name, argument)
    if config.num_beams not in (None, 1):
        raise ValueError(f"num_beams={config.num_beams}: LocateAnything has no beam search; leave it at 1.")
    for name in _ONE_FORWARD:
        if getattr(config, name, None):
            raise ValueError(f"{name}=True is not supported: a step decodes a window of tokens, not one.")
    return config


def check_number(name: str, value: Any, *, whole: bool = False, least: float | None = None) -> None:
    """Refuses what is no finite number, no whole one, or too small.

    Raises:
        ValueError: naming the argument.
    """
    try:
        fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        fits = False
    if not fits or (whole and int(value) != value) or (least is not None and value < least):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name}={value!r}: expected {kind}{'' if least is None else f' of {least} or more'}.")


def _ids(name: str, value: Any) -> list[int]:
    """One id or several, as a number, list, tensor or array; None for none."""
    value = value.tolist() if hasattr(value, "tolist") else value
    ids = [] if value is None else list(value) if isinstance(value, (list, tuple, set)) else [value]
    if not all(isinstance(one, Integral) and not isinstance(one, bool) and 0 <= int(one) < 2**31 for one in ids):
        raise ValueError(f"{name}={value!r}: expected token ids, whole numbers of 0 or more.")
    return list(map(int, ids))


def _limit(own: dict[str, Any], prompt: int, cap: int, row: int) -> int:
    if own["max_new_tokens"] is not None:
        new = own["max_new_tokens"]
        check_number("max_new_tokens", new, whole=True, least=1)
        limit = prompt + int(new)
    else:
        limit = own["max_length"] if own["max_length"] is not None else prompt + DEFAULT_NEW_TOKENS
        check_number("max_length", limit, whole=True)
    limit = min(int(limit), cap)
    if prompt >= limit:
        raise ValueError(f"row {row}: its prompt has {prompt} tokens, at or over the length limit of {limit}.")
    return limit


def _sampling(own: dict[str, Any], explicit: set[str], stock_call: bool) -> SamplingParameters:
    if own["do_sample"] not in (None, True, False):
        raise ValueError(f"do_sample={own['do_sample']!r}: expected True or False.")
    do_sample = None if stock_call and "do_sample" in explicit else own["do_sample"]
    refused = do_sample is False and "do_sample" in explicit
    if "temperature" in explicit and not refused:
        temperature = own["temperature"]
    elif do_sample:
        temperature = 1.0 if own["temperature"] is None else own["temperature"]
    else:
        temperature = 0.0
    penalty = 1.0 if own["repetition_penalty"] is None else own["repetition_penalty"]
    top_p, top_k = own["top_p"], own["top_k"]
    if temperature == 0:
        # filters change a greedy row's thresholds, so only who asked for them by argument gets them
        top_p = top_p if "top_p" in explicit and not refused else None
        top_k = top_k if "top_k" in explicit and not refused else None
    for name, value in (
        ("temperature", temperature),
        ("repetition_penalty", penalty),
        ("top_p", top_p),
        ("top_k", top_k),
    ):
        if value is not None:
            check_number(name, value, whole=name == "top_k")
    if temperature != 0 and not LEAST <= temperature <= MOST:
        raise ValueError(f"temperature={temperature}: expected 0 (greedy) or a number from {LEAST} to {MOST}.")
    if not LEAST <= penalty <= MOST:
        raise ValueError(f"repetition_penalty={penalty}: expected a positive number from {LEAST} to {MOST}.")
    if top_p is not None and not top_p >= 0:
        raise ValueError(f"top_p={top_p}: expected a number from 0 to 1.")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k={top_k}: expected a whole number, 0 for no filter.")
    return SamplingParameters(
        repetition_penalty=float(penalty),
        temperature=float(temperature),
        top_p=None if top_p is None or top_p >= 1 else float(top_p),
        top_k=int(top_k) if top_k else None,
    )
