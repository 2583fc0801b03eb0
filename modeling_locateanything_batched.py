# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""LocateAnything on transformers' Qwen2, and its batched `generate`.

`LocateAnythingForConditionalGeneration` is the plain model (forward, next-token generate).
`LocateAnythingBatchedForConditionalGeneration` overrides `generate` with multi-token prediction over batches, each row
answered as the stock model would answer it alone (docs/stock-behaviour.md).
"""

import functools
import inspect
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, Qwen2ForCausalLM
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import TransformersKwargs, logging

# 4.57 copies from a local folder only what the entry file itself imports: name every remote-code file here.
from .answers import DegenerateAnswerCriteria
from .attention import chosen_backends, replace_parts
from .configuration import LocateAnythingConfig, TokenRoles
from .continuous_batching import ContinuousBatching
from .cuda_graphs import release
from .decoding import Phase  # noqa: F401
from .generation import GenerationLoop
from .inputs import (
    LocateAnythingGenerateOutput,
    Pictures,
    check_number,
    read_call,
    rows_that_fit,
    side_by_side,
    texts_of,
)
from .kv_cache import DecodeStep, PrefillStep, SlotKVCache
from .model_runner import ModelRunner  # noqa: F401
from .rows import Row  # noqa: F401
from .sampling import Sampler  # noqa: F401
from .vision import ImageFeatures, MoonViTModel, of_flagged, place_of

logger = logging.get_logger(__name__)

# Whatever else reaches Qwen2's forward, it passes over without a word
_TEXT_ARGUMENTS = {*inspect.signature(Qwen2ForCausalLM.forward).parameters, *TransformersKwargs.__optional_keys__}
_TEXT_ARGUMENTS |= {"past_key_values", "cache_position", "return_dict"}  # of either line


class LocateAnythingTextForCausalLM(Qwen2ForCausalLM):
    """Qwen2 that attends over the engine's slots too, and takes projected image features, as the stock's does."""

    def __init__(self, config: Any):
        super().__init__(config)
        replace_parts(self.model)

    @functools.wraps(Qwen2ForCausalLM.forward)  # GenerationMixin and Trainer read the signature
    def forward(self, input_ids=None, *args, visual_features=None, image_token_index=None, windows=None, **kwargs):
        unknown = kwargs.keys() - _TEXT_ARGUMENTS
        if unknown:
            raise ValueError(f"forward() got {', '.join(sorted(unknown))}, which would have no effect.")
        if visual_features is not None:
            slots = input_ids == image_token_index
            count, tokens = int(slots.sum()), len(visual_features)
            if count != tokens:
                raise ValueError(f"input_ids have {count} image slots, but the images give {tokens} tokens.")
            kwargs["inputs_embeds"] = self.embed(input_ids, [visual_features], slots)
            input_ids = None
        if windows is not None:  # samples for training and their windows: training/pack.py of the repository
            return windows.run(self, input_ids=input_ids, **kwargs)
        return super().forward(input_ids, *args, **kwargs)

    def embed(
        self, input_ids: torch.Tensor, features: Sequence[torch.Tensor] = (), shown: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[…, T]` ids → `[…, T, hidden]`, the places of `shown`, `[…, T]` bool, filled in order from `features`,
        `[tokens, hidden]` each."""
        embeddings = self.get_input_embeddings()(input_ids)
        if shown is None or not features:
            return embeddings
        filling = torch.cat([*features]).to(embeddings.device, embeddings.dtype)
        return embeddings.masked_scatter(shown.to(embeddings.device).unsqueeze(-1), filling)


class LocateAnythingPreTrainedModel(PreTrainedModel):
    config_class = LocateAnythingConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "MoonViTBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """transformers' call, from safetensors only; what it would load wrong, with a warning at most, is refused.

        Raises:
            ValueError: `use_safetensors=False`; weights that lack a tensor, have one that the config makes no place
                for (as a config with fewer layers), or have one in two files; an unknown quantisation method.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False: pickle can run any code and is never loaded; leave it out.")
        model, info = super().from_pretrained(*args, output_loading_info=True, **{**kwargs, "use_safetensors": True})
        told = getattr(model.config, "quantization_config", None)
        if isinstance(told, dict) and not AutoHfQuantizer.supports_quant_method(told):
            raise ValueError(f"quantization_config is {told}, a method that transformers lacks.")
        twice = _doubled(Path(str(args[0] if args else ""), kwargs.get("subfolder") or ""))
        more = [] if getattr(model, "hf_quantizer", None) else info["unexpected_keys"]  # scales and the like are right
        faults = {"missing": info["missing_keys"], "unexpected": more, "in two files": twice}
        named = [f"{fault}: {', '.join(sorted(names)[:3])} ({len(names)})" for fault, names in faults.items() if names]
        if named:
            raise ValueError(f"the weights are not those of the config; tensors {'; '.join(named)}.")
        return (model, info) if output_loading_info else model


def _doubled(folder: Path) -> list[str]:
    """Tensors that two files of a local folder hold: which one is read depends on the release of transformers."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return []
    held: Counter[str] = Counter()
    for shard in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
        with (folder / shard).open("rb") as file:
            held.update(json.loads(file.read(int.from_bytes(file.read(8), "little"))).keys() - {"__metadata__"})
    return [name for name, times in held.items() if times > 1]


class LocateAnythingForConditionalGeneration(ImageFeatures, LocateAnythingPreTrainedModel, GenerationMixin):
    """MoonViT, a two-layer projector and Qwen2, with the official checkpoint's parameter names.

    config: `LocateAnythingConfig`, or the stock's own class of that name.
    """

    # of the kind that the decoder's own is: 5.x maps to what a weight is tied to, 4.57 lists what is tied
    _tied_weights_keys: Any = type(Qwen2ForCausalLM._tied_weights_keys)(
        {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
    )

    def __init__(self, config: Any):
        TokenRoles.of(config)
        if config._attn_implementation == "magi":  # the kernel of the stock's training, which its config.json names
            config._attn_implementation = None
        super().__init__(config)
        vision, hidden = config.vision_config, config.text_config.hidden_size
        merged = vision.hidden_size * math.prod(vision.merge_kernel_size)
        self.vision_model = MoonViTModel(vision)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(merged), nn.Linear(merged, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.language_model = LocateAnythingTextForCausalLM(config.text_config)
        self.image_token_index = config.image_token_index
        self.post_init()
        # a checkpoint of the stock's fine-tuning
        if rank := getattr(config, "use_backbone_lora", 0):
            self.wrap_backbone_lora(r=rank, lora_alpha=2 * rank)
        if rank := getattr(config, "use_llm_lora", 0):
            self.wrap_llm_lora(r=rank, lora_alpha=2 * rank)

    @property
    def text_model(self) -> Any:
        """The language model, out of peft's wrapper."""
        model = self.language_model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def pad_token_id(self) -> int:
        pad = getattr(self.config, "pad_token_id", None)  # the stock's config names none
        return self.config.text_config.bos_token_id if pad is None else pad

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.text_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.text_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.text_model.model

    def set_decoder(self, decoder: nn.Module) -> None:
        self.text_model.model = decoder

    # ---- the stock's calls for fine-tuning

    def wrap_llm_lora(self, **options: Any) -> None:
        """Puts peft's adapters on the language model, as the stock's scripts ask. options: of `LoraConfig`."""
        linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        told = {"task_type": "CAUSAL_LM", "target_modules": linears, **options}
        self.language_model = _with_lora(self.language_model, told)
        self.language_model.enable_input_require_grads()
        inside = "language_model.base_model.model"
        tied = {f"{inside}.lm_head.weight": f"{inside}.model.embed_tokens.weight"}
        self._tied_weights_keys = type(self._tied_weights_keys)(tied)
        if getattr(self, "all_tied_weights_keys", None):  # of 5.x
            self.all_tied_weights_keys = tied

    def wrap_backbone_lora(self, **options: Any) -> None:
        """The same on the vision tower: as in the stock, on `mlp.fc1` of its blocks unless `target_modules` tells."""
        self.vision_model = _with_lora(self.vision_model, {"target_modules": ["mlp.fc1"], **options})

    def embed_prompt(self, *args: Any) -> torch.Tensor:
        """`LocateAnythingTextForCausalLM.embed`."""
        return self.text_model.embed(*args)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hws: torch.Tensor | None = None,
        # GenerationMixin looks for these names: without, it makes no mask, no positions, and logits of whole prompts
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        inputs_embeds: torch.Tensor | None = None,
        visual_features: Sequence[torch.Tensor] | None = None,
        image_flags: torch.Tensor | Sequence[int] | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One causal pass, as any transformers image-text model: `input_ids` `[B, L]`, images in slot order.

        Args:
            pixel_values, image_grid_hws: see `extract_feature`; visual_features: its result, instead of both.
            image_flags: per row how many images it shows, as the stock's collator gives it; 0 for a row with one
                image that stands for none and is passed over. None: every image counts.
            labels: `[B, L]` long, -100 where no loss is wanted. They train next tokens: the windows of the other
                modes share the weights and unlearn by this loss alone.
            kwargs: those of Qwen2ForCausalLM.

        Raises:
            ValueError: images that do not fill the image slots of `input_ids` exactly, flags for another number of
                images, or a keyword that Qwen2 lacks.
        """
        if input_ids is not None and inputs_embeds is None:
            if visual_features is None:
                visual_features = self.extract_feature(pixel_values, image_grid_hws)
            features = self.project(visual_features)
            if image_flags is not None:
                features = of_flagged(features, image_flags)
            kwargs["visual_features"] = torch.cat(features) if features else torch.empty(0)
            kwargs["image_token_index"] = self.image_token_index
        elif pixel_values is not None or visual_features is not None:
            raise ValueError("images fill slots of input_ids; inputs_embeds show theirs already, so leave images out.")
        return self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            logits_to_keep=logits_to_keep,
            labels=labels,
            **kwargs,
        )

    def degenerate_answer_criteria(self, **options: int) -> DegenerateAnswerCriteria:
        """A stopping criterion for rows that repeat a box, cycle through boxes or march a sliver along an axis.

            model.generate(**inputs, stopping_criteria=[model.degenerate_answer_criteria()])

        Args:
            options: see `DegenerateAnswerCriteria`; for transformers' own generate also `prompt_length`, the tokens
                of `input_ids` that are not the answer.
        """
        return DegenerateAnswerCriteria(TokenRoles.of(self.config), **options)


def _with_lora(model: nn.Module, options: dict[str, Any]) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA adapters need peft, which is not installed: pip install peft") from error
    return get_peft_model(model, LoraConfig(**{"r": 128, "lora_alpha": 256, "lora_dropout": 0.05, **options}))


# GenerationMixin by name: without, AutoModel loads a class made of this one, whose models cannot be pickled
class LocateAnythingBatchedForConditionalGeneration(
    ContinuousBatching, LocateAnythingForConditionalGeneration, GenerationMixin
):
    """LocateAnything whose `generate` takes batches and predicts a window of tokens a forward."""

    def decode(self, embeddings: torch.Tensor, step: PrefillStep | DecodeStep, cache: SlotKVCache) -> torch.Tensor:
        """One packed pass of the decoder, `[T, hidden]` → `[T, hidden]`; keys and values go to the cache."""
        with chosen_backends(embeddings.device):
            output = self.get_decoder()(
                inputs_embeds=embeddings.unsqueeze(0),
                position_ids=step.positions,
                # a dict is transformers' way of saying that masks are made already; the step holds visibility
                attention_mask={"full_attention": None},
                # not as transformers' cache, which layers drop that train with gradient checkpointing
                use_cache=False,
                step=step,
                slot_cache=cache,
            )
        return output.last_hidden_state.squeeze(0)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[N, hidden]` → `[N, vocabulary]` float32."""
        return self.get_output_embeddings()(hidden_states).float()

    def engine(
        self,
        room: int,
        *,
        expected: int = sys.maxsize,
        max_batch_rows: int | None = None,
        most: int = sys.maxsize,
        share_images: bool = True,
        **options: Any,
    ) -> GenerationLoop:
        """An engine for rows of at most `room` places, `most` at a time. expected: places that a row needs as a rule.
        options: of `GenerationLoop`."""
        if max_batch_rows is not None:
            check_number("max_batch_rows", max_batch_rows, whole=True, least=1)
        device = place_of(self.get_input_embeddings())
        return GenerationLoop(
            self,
            Pictures(self, share_images),
            TokenRoles.of(self.config),
            slots=min(int(max_batch_rows or 0) or rows_that_fit(self, min(room, expected), device), most),
            capacity=room,
            device=device,
            **options,
        )

    def release_memory(self) -> None:
        """Gives back what generate keeps for its next call where it uses CUDA graphs: these, and the KV cache."""
        release(self)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hws: torch.Tensor | None = None,
        visual_features: Sequence[torch.Tensor] | None = None,
        generation_mode: str | Sequence[str] = "hybrid",
        verify_labels: bool | Sequence[bool] = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        streamer: BaseStreamer | None = None,
        max_batch_rows: int | None = None,
        decode_graphs: bool | None = None,
        share_images: bool = True,
        share_prefixes: bool = True,
        compile: bool = False,
        batch_invariant: bool = False,
        tokenizer: Any | None = None,
        verbose: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | LocateAnythingGenerateOutput | str | list[str] | tuple:
        """Answers a batch of prompts; each row as the stock model would answer it alone.

        Args:
            input_ids (or `inputs`): `[rows, L]` long, padded on any side. attention_mask: `[rows, L]`, 0 on padding.
            pixel_values, image_grid_hws: of all rows' images in order, see `extract_feature`.
            visual_features: `extract_feature`'s result, instead of pixels, which are not looked at then.
            generation_mode: "hybrid", "fast", "slow", or "verified", the answer of "slow" in a fraction of
                its forwards (docs/modes.md). One for all, or a list with one per row.
            verify_labels: in "hybrid" and "fast", accept text in `<ref>…</ref>` as "verified" does, if the answer
                itself opens the label. May be a list.
            generation_config and keyword arguments: transformers'. `temperature`, `do_sample`, `top_p`, `top_k`,
                `repetition_penalty`, `max_new_tokens` and `max_length` may be lists with one value per row.
                `max_length` counts a row's own tokens, without padding. A `temperature=` above 0 samples; the default
                is greedy. `eos_token_id` adds ids that end a row to the model's own end of turn. `labels` of a batch
                for training are passed over.
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
            decode_graphs: capture decode steps as CUDA graphs; by default where the model is on one CUDA device.
            share_images, share_prefixes: encode equal images once, and compute once what prompts begin with alike.
            compile: the decoder's layers with torch.compile, once and for good; the first steps wait for it.
            batch_invariant: in half precision too, a row gets bit for bit what it gets alone; slower (docs/api.md).
            tokenizer, verbose: given, the answer is text, as the stock's generate returns it (docs/stock-behaviour.md
                §6); but with `stop_strings`, which need a tokenizer too, only with `verbose=True`.

        Returns:
            Without `tokenizer`: `[rows, L + new]` long, prompts padded on the left, answers with the pad token behind
            them, or a `LocateAnythingGenerateOutput` with `return_dict_in_generate=True`. An MTP step may pass the
            limit by up to five tokens; they stay, as in the stock. A row whose numbers are no longer finite ends
            there, as `row_errors` says, or a warning without the dict; other rows go on.
            With `tokenizer`: the text of one row, or a list of texts; with `verbose=True` (text, history, statistics),
            history being the (mode, text) of each forward.

        Raises:
            ValueError: anything about the arguments that cannot work, before any image is encoded.
        """
        started = time.perf_counter()
        if inputs is not None and input_ids is not None:
            raise ValueError("generate() got both inputs and input_ids; they are two names of one argument.")
        if verbose and tokenizer is None:
            raise ValueError("verbose=True returns texts and needs tokenizer=; got none.")
        # transformers' own stop_strings come with a tokenizer too, and with its contract
        as_text = tokenizer is not None and (verbose or kwargs.get("stop_strings") is None)
        padded, rows, config = read_call(
            self,
            generation_config,
            {
                **kwargs,
                "input_ids": input_ids if inputs is None else inputs,
                "attention_mask": attention_mask,
                "pixel_values": pixel_values,
                "image_grid_hws": image_grid_hws,
                "visual_features": visual_features,
                "generation_mode": generation_mode,
                "verify_labels": verify_labels,
                "generator": generator,
                "tokenizer": tokenizer,
                "logits_processor": logits_processor,
                "stopping_criteria": stopping_criteria,
                "streamer": streamer,
            },
            as_text=as_text,
        )
        self.engine(
            max(row.room for row in rows),
            max_batch_rows=max_batch_rows,
            most=len(rows),
            generator=generator if isinstance(generator, torch.Generator) else None,
            decode_graphs=decode_graphs,
            share_images=share_images,
            share_prefixes=share_prefixes,
            compile=compile,
            batch_invariant=batch_invariant,
        ).run(rows)
        errors, as_dict = [row.error for row in rows], config.return_dict_in_generate and not as_text
        if any(errors) and not as_dict:
            logger.warning("generate() ended rows early. " + "; ".join(filter(None, errors)))
        if as_text:
            return texts_of(rows, tokenizer, time.perf_counter() - started if verbose else None)
        place = padded.device
        answers = side_by_side([row.answer for row in rows], config.pad_token_id, torch.long, place)
        sequences = torch.cat([padded.repeat_interleave(len(rows) // len(padded), 0), answers], 1)
        if not as_dict:
            return sequences
        output = LocateAnythingGenerateOutput(
            sequences=sequences,
            row_forwards=torch.tensor([row.forwards for row in rows], device=place),
            finish_reasons=[row.finish_reason for row in rows],
            row_errors=errors,
        )
        if config.output_scores:
            output.token_log_probs = side_by_side([row.scores for row in rows], math.nan, torch.float32, place)
            output.accepted_by = side_by_side([row.phases for row in rows], -1, torch.long, place)
        return output
