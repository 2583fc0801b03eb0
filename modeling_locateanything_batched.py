# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""LocateAnything on transformers' Qwen2, and its batched `generate`.

`LocateAnythingForConditionalGeneration` is the plain model (forward, next-token generate).
`LocateAnythingBatchedForConditionalGeneration` overrides `generate` with multi-token prediction over batches, each row
answered as the stock model would answer it alone (decoding.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput, logging

# 4.57 copies from a local folder only what the entry file itself imports: name every remote-code file here.
from .attention import WindowAttention
from .configuration import WINDOW, LocateAnythingConfig, MoonViTConfig
from .cuda_graphs import DecodeGraphs  # noqa: F401
from .decoding import Acceptance  # noqa: F401
from .forks import mind_a_fork
from .generation import PHASES, GenerationLoop, Row
from .grounding import DegenerateAnswerCriteria
from .kv_cache import DecodeStep, PrefillStep, SlotKVCache
from .loading import CheckedLoading, or_value_error
from .prefill import Entry  # noqa: F401
from .prompts import PATCHES_A_PASS, PromptFeatures, left_padded, read_grids, read_patches, read_prompts
from .sampling import Sampler  # noqa: F401
from .settings import check_number, resolve
from .vision import MoonViTModel

logger = logging.get_logger(__name__)

ROWS_A_STEP = 32  # beyond, arithmetic takes all the time that memory traffic saves


@dataclass
class LocateAnythingGenerateOutput(ModelOutput):
    """What `generate(return_dict_in_generate=True)` returns.

    Args:
        sequences: `[rows, prompt + new]` long, prompts padded on the left as they came, answers on the right.
        row_forwards: `[rows]` long, the decoding forwards each row took part in (the stock's `forward_step`).
        token_log_probs: with `output_scores=True`, `[rows, new]` float32: log-probability of each token of the
            answers, under the distribution it was accepted from, after penalties and filters. NaN on padding.
        accepted_by: with `output_scores=True`, `[rows, new]` long, an index into `PHASES`: 0 "mtp" from a window, 1
            "ar" by next-token decoding, 2 "verified" by next-token decoding of a draft. -1 on padding.
        row_errors: per row None, or what ended it before its end: at which token its logits became NaN or infinite,
            and whether its image features or a logits processor did it. The tokens before it are in `sequences`.
    """

    sequences: torch.Tensor | None = None
    row_forwards: torch.Tensor | None = None
    token_log_probs: torch.Tensor | None = None
    accepted_by: torch.Tensor | None = None
    row_errors: list[str | None] | None = None


class LocateAnythingPreTrainedModel(CheckedLoading, PreTrainedModel):
    config_class = LocateAnythingConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "MoonViTBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True


class LocateAnythingForConditionalGeneration(LocateAnythingPreTrainedModel, GenerationMixin):
    """MoonViT, a two-layer projector and Qwen2, with the official checkpoint's parameter names.

    Raises:
        ValueError: a text tower other than Qwen2 in the config.
    """

    # of the kind that the decoder's own is: 5.x maps to what a weight is tied to, 4.57 lists what is tied
    _tied_weights_keys = (
        {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
        if isinstance(Qwen2ForCausalLM._tied_weights_keys, dict)
        else ["language_model.lm_head.weight"]
    )

    def __init__(self, config: LocateAnythingConfig):
        if not isinstance(config.text_config, Qwen2Config):
            raise ValueError(
                f"text_config is a {type(config.text_config).__name__} (model_type "
                f"{config.text_config.model_type!r}); LocateAnything decodes with a Qwen2Config tower."
            )
        mind_a_fork()
        super().__init__(config)
        vision, hidden = config.vision_config, config.text_config.hidden_size
        rows, columns = vision.merge_kernel_size
        merged = vision.hidden_size * rows * columns
        self.vision_model = MoonViTModel(vision)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(merged), nn.Linear(merged, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.language_model = Qwen2ForCausalLM(config.text_config)
        for index, layer in enumerate(self.language_model.model.layers):
            layer.self_attn = WindowAttention(self.language_model.config, index)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.language_model.model

    def set_decoder(self, decoder: nn.Module) -> None:
        self.language_model.model = decoder

    # ---- images

    def extract_feature(
        self,
        pixel_values: torch.Tensor,
        image_grid_hws: torch.Tensor | np.ndarray | None,
        patches_a_pass: int = PATCHES_A_PASS,
    ) -> list[torch.Tensor]:
        """The vision tower's features, which `generate(visual_features=…)` takes to reuse them across calls.

        Args:
            pixel_values: `[patches, 3, 14, 14]`, images one after another. image_grid_hws: `[images, 2]`, (rows,
                columns) in patches. patches_a_pass: at most (one image at least), which bounds memory.

        Returns:
            Per image `[tokens, 4 * vision hidden]`, before the projector.

        Raises:
            ValueError: other pixels, grids that do not make them up, no budget.
        """
        mind_a_fork()
        pixel_values = read_patches(pixel_values, self.config.vision_config.patch_size)
        check_number("patches_a_pass", patches_a_pass, whole=True, least=1)
        sizes = read_grids(image_grid_hws, self.config.vision_config, len(pixel_values))
        pixel_values = pixel_values.to(self._place_of(self.vision_model), self.vision_model.dtype)
        features: list[torch.Tensor] = []
        start = 0
        while len(features) < len(sizes):
            # as many images as fit the budget, one at least
            images, patches = 0, 0
            for height, width in sizes[len(features) :]:
                if images and patches + height * width > patches_a_pass:
                    break
                images, patches = images + 1, patches + height * width
            span = sizes[len(features) : len(features) + images]
            features += self.vision_model(pixel_values[start : start + patches], span)
            start += patches
        return features

    def project(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Projects vision-tower features, `[tokens, 4 * vision hidden]` each, to `[tokens, hidden]`."""
        if not features:
            return []
        return list(self.mlp1(torch.cat(features)).split([len(feature) for feature in features]))

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_hws: torch.Tensor | np.ndarray | None
    ) -> list[torch.Tensor]:
        """Per image `[tokens, hidden]`, ready for the decoder's image slots."""
        return self.project(self.extract_feature(pixel_values, image_grid_hws))

    def embed_prompt(
        self, input_ids: torch.Tensor, features: list[torch.Tensor], shown: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[..., T]` ids → `[..., T, hidden]`, image slots filled in order from `features` `[tokens, hidden]`.

        Args:
            shown: `[..., T]` bool, which ids are image slots; None for all image tokens.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        if features:
            slots = input_ids == self.config.image_token_index if shown is None else shown
            filling = torch.cat(features).to(embeddings.device, embeddings.dtype)
            embeddings = embeddings.masked_scatter(slots.to(embeddings.device).unsqueeze(-1), filling)
        return embeddings

    # ---- forward

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hws: torch.Tensor | np.ndarray | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        visual_features: list[torch.Tensor] | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One causal pass, as any transformers image-text model: `input_ids` `[B, L]`, images in slot order.

        Args:
            pixel_values, image_grid_hws: see `extract_feature`; visual_features: its result, instead of both.
            labels: `[B, L]` long, -100 where no loss is wanted; next-token loss.

        Raises:
            ValueError: image slots in `input_ids` do not match the images' tokens.
        """
        mind_a_fork()
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("forward() needs input_ids or inputs_embeds; got neither.")
            if visual_features is None and pixel_values is not None:
                visual_features = self.extract_feature(pixel_values, image_grid_hws)
            features = self.project(list(visual_features or []))
            slots = int((input_ids == self.config.image_token_index).sum())
            tokens = sum(len(feature) for feature in features)
            if slots != tokens:
                raise ValueError(f"input_ids have {slots} image slots, but the images give {tokens} tokens.")
            inputs_embeds = self.embed_prompt(input_ids, features)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            **kwargs,
        )

    def degenerate_answer_criteria(self, **options: int) -> DegenerateAnswerCriteria:
        """A stopping criterion for rows that repeat a box, cycle through boxes or march a sliver along an axis.

            model.generate(**inputs, stopping_criteria=[model.degenerate_answer_criteria()])

        Args:
            options: `period`, `times`, `march`, `thin`, see `DegenerateAnswerCriteria`; for transformers' own generate
                also `prompt_length`, the tokens of `input_ids` that are not the answer.

        Raises:
            ValueError: a number out of range.
        """
        return DegenerateAnswerCriteria(self.config.token_roles, **options)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        fed = inputs.get("input_ids")
        if fed is not None and not (fed == self.config.image_token_index).any():
            # the images are in the cache already
            for name in ("pixel_values", "image_grid_hws", "visual_features"):
                inputs.pop(name, None)
        return inputs

    @staticmethod
    def _place_of(module: nn.Module) -> torch.device:
        """Where a module runs; if accelerate has offloaded its weights, the hooks on its parts say it."""
        place = next(module.parameters()).device
        if place.type == "meta":
            hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
            places = (getattr(hook, "execution_device", None) for hook in hooks)
            place = torch.device(next(place for place in places if place is not None))
        return place


# GenerationMixin by name: without, AutoModel loads a class made of this one, whose models cannot be pickled
class LocateAnythingBatchedForConditionalGeneration(LocateAnythingForConditionalGeneration, GenerationMixin):
    """LocateAnything whose `generate` takes left-padded batches and predicts a window of tokens a forward."""

    # ---- what the generation loop asks of a model

    def decode(self, embeddings: torch.Tensor, step: PrefillStep | DecodeStep, cache: SlotKVCache) -> torch.Tensor:
        """One packed pass of the decoder, `[T, hidden]` → `[T, hidden]`; keys and values go to the cache."""
        return self.language_model.model(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=step.positions,
            # a dict is transformers' way of saying that masks are made already; the step holds visibility
            attention_mask={"full_attention": None},
            # not as past_key_values, which layers drop that train with gradient checkpointing
            use_cache=False,
            step=step,
            slot_cache=cache,
        ).last_hidden_state.squeeze(0)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[N, hidden]` → `[N, vocabulary]` float32."""
        return self.language_model.lm_head(hidden_states).float()

    # ---- generate

    left_padded = staticmethod(left_padded)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hws: torch.Tensor | np.ndarray | None = None,
        visual_features: Sequence[torch.Tensor] | torch.Tensor | None = None,
        generation_mode: str | Sequence[str] = "hybrid",
        verify_labels: bool | Sequence[bool] = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        streamer: BaseStreamer | None = None,
        max_batch_rows: int | None = None,
        decode_graphs: bool | None = None,
        tokenizer: Any | None = None,
        verbose: bool = False,
        use_cache: bool = True,
        n_future_tokens: int = WINDOW,
        **kwargs: Any,
    ) -> torch.Tensor | LocateAnythingGenerateOutput | str | list[str] | tuple:
        """Answers a batch of prompts; each row as the stock model would answer it alone.

        Args:
            input_ids (or `inputs`): `[rows, L]` long, padded on the left. attention_mask: `[rows, L]`, 0 on padding.
            pixel_values: `[patches, 3, 14, 14]` of all rows' images in order. image_grid_hws: `[images, 2]`, (rows,
                columns) in patches.
            visual_features: instead of pixels, which are not looked at then, `extract_feature`'s result (a list, one
                `[tokens, 4 * vision hidden]` per image), or one tensor `[tokens, hidden]` that is projected already.
            generation_mode: "hybrid", "fast", "slow", or "verified", the answer of "slow" in a fraction of
                its forwards: windows are drafts, and next-token decoding confirms them one forward later. One for all,
                or a list with one per row.
            verify_labels: in "hybrid" and "fast", accept text in `<ref>…</ref>` as "verified" does, if the answer
                itself opens the label. May be a list.
            generation_config and keyword arguments: transformers'. `temperature`, `do_sample`, `top_p`, `top_k`,
                `repetition_penalty`, `max_new_tokens` and `max_length` may be lists with one value per row.
                `max_length` counts a row's own tokens, without padding. A `temperature=` above 0 samples; the default
                is greedy. `eos_token_id` adds ids that end a row to the model's own end of turn.
            logits_processor: called per row with `input_ids` `[6, n]` (its committed tokens, once for each window
                slot; `[1, n]` in a next-token step, and for each token that verifies a draft) and `scores` `[6, V]`
                float32.
            stopping_criteria: asked after every accepted token of every row, with `input_ids` `[1, n]`. See also
                `degenerate_answer_criteria`.
            generator: draws for all rows, or a list with one per row (of the answer, after `num_return_sequences`);
                then a row's draws do not depend on its neighbours.
            streamer: gets prompt and tokens of a single row.
            max_batch_rows: rows decoded at a time, 32 by default, or on CUDA as many as half of the free memory holds;
                the others wait for a place.
            decode_graphs: capture decode steps as CUDA graphs, at the first use of each shape in this call; by
                default where the model is on one CUDA device. Where capture fails, steps run as they are.
            tokenizer: given, the answer is text, as the stock's generate returns it (decoding.md §6); but with
                `stop_strings`, which need it too, the result is that of transformers.
            verbose: with `tokenizer`, also the history and a line of statistics.

        Returns:
            Without `tokenizer`: `[rows, L + new]` long, padded with the pad token behind the answers, or a
            `LocateAnythingGenerateOutput` with `return_dict_in_generate=True`. An MTP step may pass the limit by up
            to five tokens; they stay, as in the stock.
            With `output_scores=True` it also has `token_log_probs` and `accepted_by`. A row whose numbers are no
            longer finite ends there, and `row_errors`, or without the dict a warning, says so; other rows go on.
            With `tokenizer`: the text of one row, or a list of texts; with `verbose=True` the tuple (text, history,
            statistics), history being the (mode, text) of each forward.

        Raises:
            ValueError: anything about the arguments that cannot work, before any image is encoded.
        """
        started = time.perf_counter()
        if inputs is not None and input_ids is not None:
            raise ValueError("generate() got both inputs and input_ids; they are two names of one argument.")
        if not use_cache:
            raise ValueError("use_cache=False: LocateAnything's windows need the cache; leave it on.")
        if n_future_tokens != WINDOW:
            raise ValueError(f"n_future_tokens={n_future_tokens}: this model predicts {WINDOW} tokens at a time.")
        if verbose and tokenizer is None:
            raise ValueError("verbose=True returns texts and needs tokenizer=; got none.")
        if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
            raise ValueError(f"tokenizer: got a {type(tokenizer).__name__}; expected a tokenizer or processor.")
        for name, callbacks in (("logits_processor", logits_processor), ("stopping_criteria", stopping_criteria)):
            if callbacks is not None and not (isinstance(callbacks, Sequence) and all(map(callable, callbacks))):
                raise ValueError(f"{name}: got {callbacks!r}; expected a list of callables.")
        if prefix_allowed_tokens_fn is not None and not callable(prefix_allowed_tokens_fn):
            raise ValueError(f"prefix_allowed_tokens_fn: got {prefix_allowed_tokens_fn!r}; expected a callable.")
        # transformers' own stop_strings come with a tokenizer too, and with its contract
        as_text = tokenizer is not None and (verbose or kwargs.get("stop_strings") is None)
        device = self._place_of(self.get_input_embeddings())
        mind_a_fork()
        prompts = read_prompts(input_ids if inputs is None else inputs, attention_mask, self.config, device)
        cap = self.config.text_config.max_position_embeddings
        known = getattr(tokenizer, "model_max_length", None)  # a processor has none
        if known is not None:
            check_number("tokenizer.model_max_length", known, least=1)
        call = resolve(
            [len(prompt) for prompt in prompts.rows],
            generation_mode=generation_mode,
            verify_labels=verify_labels,
            given=generation_config,
            default=self.generation_config,
            arguments=kwargs,
            stock_call=as_text,
            length_cap=cap if known is None else min(cap, known),
            end_token_id=self.config.token_roles.end,
            pad_token_id=self.config.pad_token_id,
        )
        features = PromptFeatures(self, prompts, pixel_values, image_grid_hws, visual_features)
        asked = "the generation config"
        criteria = or_value_error(
            asked, self._get_stopping_criteria, call.config, StoppingCriteriaList(stopping_criteria or []), tokenizer
        )
        repeats = call.num_return_sequences
        generators = self._generators(generator, len(prompts.rows) * repeats)
        if streamer is not None and len(generators) > 1:
            raise ValueError(f"streamer= follows one row; got {len(generators)}.")
        if max_batch_rows is not None:
            check_number("max_batch_rows", max_batch_rows, whole=True, least=1)
        rows = []
        for index, own_generator in enumerate(generators):
            prompt, settings = prompts.rows[index // repeats], call.rows[index // repeats]
            call.config.max_length = settings.limit
            # transformers' factory builds whatever else the config asks for, some of it by prompt length
            processors = or_value_error(
                asked,
                self._get_logits_processor,
                generation_config=call.config,
                input_ids_seq_length=len(prompt),
                encoder_input_ids=torch.tensor([prompt], device=device),
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                logits_processor=LogitsProcessorList(logits_processor or []),
                device=device,
                model_kwargs={},
            )
            rows.append(Row(index, prompt, settings, processors, own_generator))

        loop = GenerationLoop(
            self,
            features.repeated(repeats),
            rows,
            self.config.token_roles,
            layers=self.config.text_config.num_hidden_layers,
            slots=int(max_batch_rows or 0) or self._rows_that_fit(max(row.room for row in rows), device),
            stops=call.stops,
            criteria=criteria,
            streamer=streamer,
            generator=generator if isinstance(generator, torch.Generator) else None,
            device=device,
            graphs=self._captures(decode_graphs, device),
            scored=call.scored,
        )
        rows = loop.run()
        errors = [row.error for row in rows]
        if any(errors) and (as_text or not call.return_dict):
            logger.warning("generate() ended rows early. " + "; ".join(filter(None, errors)))
        if as_text:
            return self._as_text(rows, tokenizer, verbose, started)
        place = prompts.input_ids.device
        answers = _side_by_side([row.answer for row in rows], call.pad_token_id, torch.long, place)
        sequences = torch.cat([prompts.input_ids.repeat_interleave(repeats, 0), answers], 1)
        if not call.return_dict:
            return sequences
        output = LocateAnythingGenerateOutput(
            sequences=sequences,
            row_forwards=torch.tensor([row.forwards for row in rows], device=place),
            row_errors=errors,
        )
        if call.scored:
            phases = [[PHASES.index(phase) for phase in row.phases] for row in rows]
            output.token_log_probs = _side_by_side([row.scores for row in rows], float("nan"), torch.float32, place)
            output.accepted_by = _side_by_side(phases, -1, torch.long, place)
        return output

    def _rows_that_fit(self, tokens: int, device: torch.device) -> int:
        """Rows whose caches of `tokens` tokens fit into half of the free memory, `ROWS_A_STEP` at most."""
        if device.type != "cuda":
            return ROWS_A_STEP  # pages of a cache on CPU are taken as rows come to need them
        text = self.config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim
        size = tokens * width * self.dtype.itemsize
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
        return max(1, min(ROWS_A_STEP, int(free // 2 // size)))

    def _captures(self, decode_graphs: bool | None, device: torch.device) -> bool:
        """Whether decode steps become CUDA graphs; accelerate's hooks move tensors about, which cannot be captured."""
        if device.type != "cuda" or any(hasattr(module, "_hf_hook") for module in self.modules()):
            return False
        return decode_graphs is not False

    @staticmethod
    def _generators(generator: Any, rows: int) -> list[torch.Generator | None]:
        if generator is None or isinstance(generator, torch.Generator):
            return [None] * rows
        listed = list(generator) if isinstance(generator, Sequence) else [generator]
        odd = [one for one in listed if not isinstance(one, torch.Generator)]
        if odd:
            raise ValueError(
                f"generator: got a {type(odd[0]).__name__}; expected a torch.Generator or a list of them."
            )
        if len(listed) != rows:
            raise ValueError(f"generator has {len(listed)} generators for {rows} rows; expected one or one per row.")
        return listed

    @staticmethod
    def _as_text(rows: list[Row], tokenizer: Any, verbose: bool, started: float) -> Any:
        def text_of(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=False)

        texts = [text_of(row.answer) for row in rows]
        answer = texts[0] if len(rows) == 1 else texts
        if not verbose:
            return answer
        seconds = time.perf_counter() - started
        tokens = sum(len(row.answer) for row in rows)
        boxes = sum(text.count("<box>") for text in texts)
        statistics = (
            f"num_tokens={tokens}; generate_time(s)={seconds:.4f}; tps={tokens / seconds:.4f}; "
            f"forward_step={sum(row.forwards for row in rows)}; num_boxes={boxes}; bps={boxes / seconds:.4f}; "
            f"switch_to_ar={sum(row.switches for row in rows)}"
        )
        histories = []
        for row in rows:
            ids, history = iter(row.answer), []
            for mode, count in row.steps:
                history.append((mode, text_of([next(ids) for _ in range(count)])))
            histories.append(history)
        return answer, histories[0] if len(rows) == 1 else histories, statistics


def _side_by_side(rows: list[list], filling: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Lists of different lengths → `[rows, longest]`, padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [filling] * (width - len(row)) for row in rows], dtype=dtype, device=device)


__all__ = [
    "LocateAnythingBatchedForConditionalGeneration",
    "LocateAnythingConfig",
    "LocateAnythingForConditionalGeneration",
    "LocateAnythingGenerateOutput",
    "LocateAnythingPreTrainedModel",
    "MoonViTConfig",
]
