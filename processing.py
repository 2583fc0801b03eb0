# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The processor: pictures and questions → tensors (checkpoint.md, "Image preprocessing", "Prompt"), and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .configuration import TokenRoles  # noqa: F401, grounding names it, and transformers 4.57 copies only what is here
from .conversations import (
    Placeholders,
    Vision,
    prompt_text,
    read_conversations,
    refuse_repeated,
    video_of,
)
from .grounding import TURN_END, TURN_START, GroundingMixin
from .image_processing import (
    LocateAnythingImageProcessor,
    Source,
    as_batch,
    image_layout,
    is_list,
)
from .keywords import Options, refuse_unknown
from .layouts import Plan, deal, frame_captions, ordinal, read_texts, video_layout
from .media import load_image, load_video, shorten

# What stands for "unknown" where the published processor reports a frame's time.
UNKNOWN_TIME = -1
UNKNOWN_FPS = 2.0
MAX_DIGITS = 9  # of the K of <image-K>


class LocateAnythingProcessor(GroundingMixin, ProcessorMixin):
    """Conversations to model inputs, and answers to boxes and points.

    It serves the model card's calls (`py_apply_chat_template`, `process_vision_info`, `processor(text=…, images=…)`,
    `batch_decode`) and transformers' (`apply_chat_template`, `post_process_image_text_to_text`); both write the
    card's prompt. Batches are padded on the left, whatever the tokenizer's files say.

    Args:
        image_processor, tokenizer: as `from_pretrained` loads them.
        chat_template: the checkpoint's Jinja template, kept for saving. It lacks the newline that ends the card's
            system turn, so `apply_chat_template` uses a template only where one is passed to it.
        image_token, video_token: the slot that an image feature replaces.
        image_start_token, image_end_token: what encloses an image's slots.
        image_placeholder, video_placeholder: the words of `<image-1>` and `<video-1>`.
        patch_size, merge_kernel_size: the image processor's, where given.

    Raises:
        ValueError: a patch_size or merge_kernel_size that is not the image processor's, a token that the tokenizer
            does not have, a placeholder that is no word, or coordinates whose ids are not in a row.
    """

    if not hasattr(ProcessorMixin, "get_attributes"):  # transformers 4.57 is told, 5.x reads the signature
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<IMG_CONTEXT>",
        video_token: str = "<IMG_CONTEXT>",
        image_start_token: str = "<img>",
        image_end_token: str = "</img>",
        image_placeholder: str = "image",
        video_placeholder: str = "video",
        patch_size: int | None = None,
        merge_kernel_size: Sequence[int] | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        for name, word in {
            "image_token": image_token,
            "video_token": video_token,
            "image_start_token": image_start_token,
            "image_end_token": image_end_token,
            "image_placeholder": image_placeholder,
            "video_placeholder": video_placeholder,
        }.items():
            if not isinstance(word, str) or not word:
                raise ValueError(f"{name}: got {word!r}; expected a text.")
            if name.endswith("token") and word not in tokenizer.get_added_vocab():
                raise ValueError(
                    f"tokenizer: has no token {word!r} of its own, the {name}; expected LocateAnything's."
                )
        if image_placeholder == video_placeholder:
            raise ValueError(
                f"video_placeholder: got {video_placeholder!r}, the image_placeholder's; expected another."
            )
        most = tokenizer.model_max_length
        if not isinstance(most, (int, float)) or not most >= 1:
            raise ValueError(f"tokenizer: its model_max_length is {most!r}; expected a number of 1 or more.")
        if patch_size not in (None, image_processor.patch_size):
            raise ValueError(f"patch_size: got {patch_size}; the image processor's is {image_processor.patch_size}.")
        merge = image_processor.merge_kernel_size
        if merge_kernel_size is not None and (
            not is_list(merge_kernel_size) or list(merge_kernel_size) != list(merge)
        ):
            raise ValueError(f"merge_kernel_size: got {merge_kernel_size}; the image processor's is {merge}.")
        self.image_token = image_token
        self.video_token = video_token
        self.image_start_token = image_start_token
        self.image_end_token = image_end_token
        self.image_placeholder = image_placeholder
        self.video_placeholder = video_placeholder
        self.patch_size = image_processor.patch_size
        self.merge_kernel_size = list(image_processor.merge_kernel_size)
        self.image_token_id, self.video_token_id = map(self._id_of, (image_token, video_token))
        for token in (TURN_START, TURN_END):
            self._id_of(token)
        self._refuse_other_coordinates()
        self._slot_tokens = (image_token, video_token)
        tokenizer.padding_side = "left"
        # transformers' advice to pad in the call, which threads that share a tokenizer must not
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
        self._run = re.compile(
            f"{re.escape(image_start_token)}((?:{re.escape(image_token)})+){re.escape(image_end_token)}"
        )
        self._placeholders = Placeholders(image_placeholder, video_placeholder)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_grid_hws"]

    # ------------------------------------------------------------------------------------------ conversations

    def py_apply_chat_template(
        self, messages: Sequence[Any], tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str | list[str]:
        """The model card's prompt text (checkpoint.md, "Prompt").

        Args:
            messages: a conversation, a list of `{"role": …, "content": …}`, or a list of conversations. Content is a
                text or a list of texts and of items with `text`, an image (`image`, `image_url`, or type "image" with
                `url`, `path`, `base64`) or a `video` (a list of frames). Where an image stands, `<image-K>` is
                written, K counting over the conversation, unless a user's text names `<image-K>` already, which it may
                do once.
            tokenize: must be False; `apply_chat_template` tokenises.
            add_generation_prompt: end with the opening of the assistant's turn.

        Returns:
            The text, or a list of texts for a list of conversations.

        Raises:
            ValueError: no messages, or one that is not laid out like this, or that holds `<|im_start|>`, `<|im_end|>`
                or the image token, or `<image-K>` a second time: no question can open a turn, end one or add an image.
        """
        if tokenize:
            raise ValueError("tokenize: got True; use apply_chat_template(…, tokenize=True), or call the processor.")
        conversations, is_batch = read_conversations(messages, self._slot_tokens)
        texts = [prompt_text(each, self._placeholders, add_generation_prompt) for each in conversations]
        self._refuse_repeated(texts)
        return texts if is_batch else texts[0]

    def process_vision_info(
        self,
        messages: Sequence[Any],
        return_video_kwargs: bool = False,
        video_reader_backend: str | None = None,
    ) -> tuple[Any, ...]:
        """The images and videos of a conversation, or of a list of them, in order of appearance.

        Args:
            messages: as for `py_apply_chat_template`. Image items hold anything `media.load_image` takes.
            return_video_kwargs: also return the frames' rates and times.
            video_reader_backend: accepted for scripts written for the model card; videos are given as frames here.

        Returns:
            A list of RGB images or None, and a list of videos (lists of RGB images) or None. With
            `return_video_kwargs` also `{"fps": [per video], "timestamps": [[seconds per frame] per video]}`, from the
            items' `fps` and `timestamps`, or else as the published processor fills them: 2.0 and -1.

        Raises:
            ValueError: a message that is not laid out as expected, or an image or frame that cannot be read.
        """
        vision = [Vision.of(conversation) for conversation in read_conversations(messages, self._slot_tokens)[0]]
        items = [item for row in vision for item in row.videos]
        images = [load_image(item) for row in vision for item in row.images]
        videos = [load_video(video_of(item)) for item in items]
        found = images or None, videos or None
        if not return_video_kwargs:
            return found
        return *found, {
            "fps": [item.get("fps") or UNKNOWN_FPS for item in items],
            "timestamps": [
                item.get("timestamps") or [UNKNOWN_TIME] * len(frames)
                for item, frames in zip(items, videos, strict=True)
            ],
        }

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "auto",
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' call: a conversation, or a list of them, to text or to model inputs.

        Args:
            conversation: as for `py_apply_chat_template`, whose text it makes.
            chat_template: a Jinja template to render instead, with `tools`, `documents` and keywords as variables.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: leave the last message open, for the model to go on with it.
            tokenize: return what the processor makes of the text and the conversations' images and videos.
            return_dict: with `tokenize`: all of it, and not only `input_ids`.
            return_tensors: "pt", "np", or None for lists; "auto" is "pt" with `return_dict`.
            processor_kwargs, **kwargs: passed to the processor (`padding=True`, …).

        Returns:
            A text, or a list for a list of conversations; with `tokenize`, `input_ids` or a BatchFeature.

        Raises:
            ValueError: as `py_apply_chat_template` and the processor's call do.
            TypeError: an unknown keyword.
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError("continue_final_message and add_generation_prompt: got both; the last turn ends or not.")
        extras = {name: value for name, value in (("tools", tools), ("documents", documents)) if value is not None}
        conversations, is_batch = read_conversations(conversation, self._slot_tokens)
        if processor_kwargs is not None and not isinstance(processor_kwargs, Mapping):
            raise ValueError(
                f"processor_kwargs: got a {type(processor_kwargs).__name__}; expected a dict of keywords."
            )
        call = {**kwargs, **(processor_kwargs or {})}
        if return_tensors != "auto":
            call["return_tensors"] = return_tensors
        if chat_template is None:
            refuse_unknown(extras, set(), "the model card's prompt")
            texts = [
                prompt_text(each, self._placeholders, add_generation_prompt, continue_final_message)
                for each in conversations
            ]
        else:
            extras.update((name, call.pop(name)) for name in kwargs if name not in Options.KNOWN)
            texts = super().apply_chat_template(
                conversations,
                chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **extras,
            )
        self._refuse_repeated(texts)

        vision = [Vision.of(c) for c in conversations]
        videos = [item for row in vision for item in row.videos]
        for name in ("fps", "timestamps"):
            told = [item.get(name) for item in videos]
            given = {**(call.get("videos_kwargs") or {}), **call}
            if name not in given and any(value is not None for value in told):
                call[name] = told
        options = Options.of(call)
        if return_tensors == "auto" and return_dict and options.return_tensors is None:
            options = replace(options, return_tensors="pt")
        if not tokenize:
            return texts if is_batch else texts[0]
        inputs = self._inputs(
            texts,
            [self._plan(text, f"conversation {index}") for index, text in enumerate(texts)],
            [
                [Source(f"conversation {i}, image {k + 1}", item) for k, item in enumerate(row.images)]
                for i, row in enumerate(vision)
            ],
            [
                [Source(f"conversation {i}, video {k + 1}", video_of(item)) for k, item in enumerate(row.videos)]
                for i, row in enumerate(vision)
            ],
            options,
        )
        return inputs if return_dict else inputs["input_ids"]

    # ------------------------------------------------------------------------------------------ model inputs

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts with placeholders and their images to model inputs.

        `<image-K>` becomes `<image K><img>…</img>` with one slot for each image token, `<video-K>` the frames' images
        under the words the model was trained on (checkpoint.md, "Prompt"); K restarts in every text. A text without
        placeholders may hold its slots already, where they fit its images.

        Args:
            images: one image, a list (each text takes as many, in order, as its highest K), or a list of one list
                per text. Anything `media.load_image` takes.
            text: a text or a list of texts.
            videos: a video (a list of frames, or anything `media.load_video` takes), a list of videos, or a list of
                one list of videos per text; taken like the images.
            audio: must be None; part of transformers' signature.
            **kwargs: flat or in `text_kwargs`, `videos_kwargs`, …: `padding` (default: several texts are padded, on
                the left, where tensors are asked for), `padding_side`, `max_length` (to pad to), `pad_to_multiple_of`,
                `add_special_tokens`, `return_tensors` ("pt", "np"), and per video over all texts `fps` (frames a
                second) and `timestamps` (a list of seconds per frame).

        Returns:
            input_ids, attention_mask: `[rows, length]` int64 with return_tensors, else lists. Where there are images,
            pixel_values float32 `[patches, 3, patch_size, patch_size]` and image_grid_hws int64 `[images, 2]`, both in
            the order of the slots.

        Raises:
            ValueError: no text, a placeholder without an image, an image that no placeholder uses, slots that do not
                fit, an image that cannot be used, truncation.
            TypeError: an unknown keyword.
        """
        options = Options.of(kwargs)
        if audio is not None:
            raise ValueError("audio: got some; LocateAnything takes images and videos only.")
        texts = read_texts(text)
        plans = [self._plan(row, f"text {index}") for index, row in enumerate(texts)]
        pictures = deal("images", image_layout(images), [plan.images for plan in plans])
        clips = deal("videos", video_layout(videos), [plan.videos for plan in plans])
        return self._inputs(texts, plans, pictures, clips, options)

    def _refuse_repeated(self, texts: Sequence[str]) -> None:
        for index, text in enumerate(texts):
            refuse_repeated(text, self._placeholders, f"conversation {index}")

    def _plan(self, text: str, name: str) -> Plan:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}: holds {text[error.start]!r} at {error.start}, half of a character; expected valid Unicode."
            ) from None
        numbers: dict[str, list[int]] = {self.image_placeholder: [], self.video_placeholder: []}
        for placeholder in self._placeholders.pattern.finditer(text):
            if len(placeholder[2].lstrip("0")) > MAX_DIGITS:
                raise ValueError(f"{name}: names {shorten(placeholder[0], 30)}; there are not as many images.")
            number = int(placeholder[2].lstrip("0") or "0")
            if number < 1:
                raise ValueError(f"{name}: holds {placeholder[0]}; placeholders count from 1.")
            numbers[placeholder[1]].append(number)
        images, videos = numbers.values()
        slots = text.count(self.image_token)
        if not slots:
            return Plan(name, tuple(images), tuple(videos))
        runs = tuple(len(run[1]) // len(self.image_token) for run in self._run.finditer(text))
        if images or videos or sum(runs) != slots:
            raise ValueError(
                f"{name}: holds {slots} {self.image_token}, which stand for an image's features; expected only "
                f"placeholders like <{self.image_placeholder}-1>, or the processor's own expansion of all of them."
            )
        return Plan(name, tuple(range(1, len(runs) + 1)), (), runs)

    def _inputs(
        self,
        texts: list[str],
        plans: list[Plan],
        images: list[list[Source]],
        videos: list[list[Source]],
        options: Options,
    ) -> BatchFeature:
        for plan, pictures, clips in zip(plans, images, videos, strict=True):
            plan.check(self.image_placeholder, plan.image_numbers, len(pictures))
            plan.check(self.video_placeholder, plan.video_numbers, len(clips))
        rates, times = options.per_video(sum(map(len, videos)))

        shots = [[self._frames(source, load_image) for source in row] for row in images]
        reels = [[self._frames(source, load_video) for source in row] for row in videos]
        captions = zip(rates, times, chain(*videos), strict=True)
        rows = []
        for plan, text, row_shots, row_reels in zip(plans, texts, shots, reels, strict=True):
            told = [frame_captions(len(frames), *next(captions)) for frames in row_reels]
            rows.append(self._expand(plan, text, row_shots, row_reels, told))

        slots = [sum(map(self._tokens_of, shown)) for _, shown in rows]
        data = self._tokenize([text for text, _ in rows], slots, options)
        shown = [image for _, row in rows for image in row]
        if shown:
            # equal pictures, at several places or in several rows, are preprocessed once
            keys = [(image.size, blake2b(image.tobytes()).digest()) for image in shown]
            distinct = dict(zip(keys, shown, strict=True))
            encoded = {key: self.image_processor.patchify(image) for key, image in distinct.items()}
            patches, grids = zip(*map(encoded.__getitem__, keys), strict=True)
            data["pixel_values"] = torch.cat(patches)
            data["image_grid_hws"] = torch.tensor(grids, dtype=torch.long)
        return as_batch(data, options.return_tensors)

    def _frames(self, source: Source, load: Callable[[Any], Any]) -> list[Image.Image]:
        loaded = source.load(load)
        frames = loaded if is_list(loaded) else [loaded]
        for frame in frames:
            self.image_processor.grid_of(frame.height, frame.width, source.name)
        return frames

    def _expand(
        self,
        plan: Plan,
        text: str,
        shots: list[list[Image.Image]],
        reels: list[list[Image.Image]],
        captions: list[list[str]],
    ) -> tuple[str, list[Image.Image]]:
        """The text with its slots, and the images that fill them, in order."""
        if plan.runs:
            pictures = list(chain(*shots))
            tokens = tuple(map(self._tokens_of, pictures))
            if tokens != plan.runs:
                raise ValueError(f"{plan.name}: holds runs of {plan.runs} image slots; its images need {tokens}.")
            return text, pictures
        shown: list[Image.Image] = []

        def expansion(placeholder: re.Match[str]) -> str:
            number = int(placeholder[2].lstrip("0"))
            if placeholder[1] == self.image_placeholder:
                words, frames = [f"<{self.image_placeholder} {number}>"], shots[number - 1]
            else:
                words, frames = captions[number - 1], reels[number - 1]
                words = [f"The {ordinal(number)} video{words[0]}", *words[1:]]
            shown.extend(frames)
            return "".join(word + self._slots_of(frame) for word, frame in zip(words, frames, strict=True))

        return self._placeholders.pattern.sub(expansion, text), shown

    def _tokens_of(self, image: Image.Image) -> int:
        return self.image_processor.get_number_of_image_tokens(image.height, image.width)

    def _slots_of(self, image: Image.Image) -> str:
        return f"{self.image_start_token}{self.image_token * self._tokens_of(image)}{self.image_end_token}"

    def _tokenize(self, texts: list[str], slots: list[int], options: Options) -> dict[str, Any]:
        # padded by `pad`, which is Python: a call would set the padding of the tokenizer that threads share
        rows = self.tokenizer(texts, padding=False, add_special_tokens=options.special, return_attention_mask=True)
        for index, (row, expected) in enumerate(zip(rows["input_ids"], slots, strict=True)):
            found = int((np.asarray(row) == self.image_token_id).sum())
            if found != expected:
                raise ValueError(f"text {index}: was tokenised to {found} image slots; its images need {expected}.")
        padding = {"padding": len(texts) > 1 and options.return_tensors is not None, **options.padding}
        data = {name: rows[name] for name in ("input_ids", "attention_mask")}
        return dict(self.tokenizer.pad(data, return_tensors=options.return_tensors, **padding))

    def _id_of(self, token: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(token)
        if index is None or index == self.tokenizer.unk_token_id:
            raise ValueError(f"tokenizer: has no token {token!r}; expected LocateAnything's tokenizer.")
        return index

    def _refuse_other_coordinates(self) -> None:
        """The model gives coordinates as ids in a row; read by other words, every box would be another."""
        ids = self.tokenizer.convert_tokens_to_ids([f"<{value}>" for value in range(1001)])
        first = self._id_of("<0>")
        for coordinate, index in enumerate(ids):
            if index != first + coordinate:
                raise ValueError(
                    f"tokenizer: <{coordinate}> has the id {index}; expected {first + coordinate}, as <0> has {first}."
                )


__all__ = ["LocateAnythingImageProcessor", "LocateAnythingProcessor"]
