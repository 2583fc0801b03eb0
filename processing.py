# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Pictures and questions to tensors; tokens to boxes and points (checkpoint.md, "Image preprocessing", "Prompt")."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin

from .grounding import ANSWER_TOKENS, parse_answer, to_pixels
from .media import load_image, load_video

# The vision tower has positions for fewer patches a side than this.
MAX_PATCHES_PER_SIDE = 512
DEFAULT_SYSTEM = "You are a helpful assistant.\n"
# What stands for "unknown" where the published processor reports a frame's time.
UNKNOWN_TIME = -1
UNKNOWN_FPS = 2.0
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")

_TURN_START, _TURN_END = "<|im_start|>", "<|im_end|>"
_ANSWER_START = f"{_TURN_START}assistant\n"
_TEXT_KWARGS = frozenset(
    [
        "add_special_tokens",
        "max_length",
        "pad_to_multiple_of",
        "padding",
        "padding_side",
        "return_tensors",
        "truncation",
    ]
)
_IMAGE_KWARGS = frozenset(["return_tensors"])
_VIDEO_KWARGS = frozenset(["fps", "return_tensors", "timestamps"])
_NESTED_KWARGS = {
    "text_kwargs": _TEXT_KWARGS,
    "images_kwargs": _IMAGE_KWARGS,
    "videos_kwargs": _VIDEO_KWARGS,
    "common_kwargs": frozenset(["return_tensors"]),
}


class LocateAnythingImageProcessor(BaseImageProcessor):
    """Images to MoonViT's patches (checkpoint.md, "Image preprocessing"), bit for bit as the published processor.

    Args:
        patch_size: side of a square patch, in pixels.
        in_token_limit: most patches (before padding to whole merges) that an image keeps; larger ones are shrunk.
        merge_kernel_size: (rows, columns) of patches that become one image token.
        image_mean, image_std: per channel, of pixels in 0…1.
    """

    model_input_names = ["pixel_values", "image_grid_hws"]

    def __init__(
        self,
        patch_size: int = 14,
        in_token_limit: int = 25600,
        merge_kernel_size: Sequence[int] = (2, 2),
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.in_token_limit = in_token_limit
        self.merge_kernel_size = list(merge_kernel_size)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(self, images: Any, return_tensors: str | None = None) -> BatchFeature:
        """Turns images into patches.

        Args:
            images: one image or a list of them, each anything `media.load_image` takes.
            return_tensors: "pt" (also the default) or "np".

        Returns:
            pixel_values: float32 `[patches of all images, 3, patch_size, patch_size]`, each image row-major.
            image_grid_hws: int64 `[images, 2]`, rows and columns in patches.

        Raises:
            ValueError: no images, one that cannot be read, has a zero side, or is 512 patches or more a side.
        """
        images, _ = _image_layout(images)
        if not images:
            raise ValueError("images: got an empty list; expected at least one image.")
        loaded = [_Source(f"images[{index}]", image).load(load_image) for index, image in enumerate(images)]
        for index, image in enumerate(loaded):
            self.grid_of(image.height, image.width, f"images[{index}]")
        patches, grids = zip(*map(self.patchify, loaded), strict=True)
        data = {"pixel_values": torch.cat(patches), "image_grid_hws": torch.tensor(grids, dtype=torch.long)}
        return _batch(data, return_tensors)

    def grid_of(self, height: int, width: int, name: str = "image") -> tuple[int, int]:
        """Rows and columns of patches that an image of `height`×`width` pixels has after preprocessing.

        Raises:
            ValueError: a zero side, or 512 patches or more a side. The message begins with `name`.
        """
        if height < 1 or width < 1:
            raise ValueError(f"{name}: is {width}×{height} pixels; a side of zero has no content.")
        rows, columns = self._snap(*self._shrink(height, width))
        if max(rows, columns) >= MAX_PATCHES_PER_SIDE:
            raise ValueError(
                f"{name}: {width}×{height} pixels make {columns}×{rows} patches of {self.patch_size} pixels; a side "
                f"must have fewer than {MAX_PATCHES_PER_SIDE}."
            )
        return rows, columns

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Patches of an image of `height`×`width` pixels (transformers' helper; there are no `images_kwargs`)."""
        if images_kwargs:
            raise ValueError(f"images_kwargs: got {images_kwargs}; there are none that change the number of patches.")
        rows, columns = self.grid_of(height, width)
        return rows * columns

    def get_number_of_image_tokens(self, height: int, width: int) -> int:
        """Image tokens, one for each merge of patches, of an image of `height`×`width` pixels."""
        return self.tokens_of(self.grid_of(height, width))

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Image tokens of a grid of (rows, columns) patches."""
        return grid[0] * grid[1] // (self.merge_kernel_size[0] * self.merge_kernel_size[1])

    def patchify(self, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """Patches float32 `[rows * columns, 3, patch_size, patch_size]` of one RGB image, and (rows, columns)."""
        rows, columns = self.grid_of(image.height, image.width)
        side = self.patch_size
        height, width = self._shrink(image.height, image.width)
        # Two resizes where the image is over the limit, as published: the pixels depend on it.
        for size in ((width, height), (columns * side, rows * side)):
            if image.size != size:
                image = image.resize(size, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).view(rows, side, columns, side, 3)
        patches = pixels.permute(0, 2, 4, 1, 3).reshape(-1, 3, side, side).float()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return patches.div_(255).sub_(mean).div_(std), (rows, columns)

    def _shrink(self, height: int, width: int) -> tuple[int, int]:
        patches = (width // self.patch_size) * (height // self.patch_size)
        if patches <= self.in_token_limit:
            return height, width
        scale = (self.in_token_limit / patches) ** 0.5
        return max(1, int(height * scale)), max(1, int(width * scale))

    def _snap(self, height: int, width: int) -> tuple[int, int]:
        merge_rows, merge_columns = self.merge_kernel_size
        return (
            -(-height // (merge_rows * self.patch_size)) * merge_rows,
            -(-width // (merge_columns * self.patch_size)) * merge_columns,
        )


class LocateAnythingProcessor(ProcessorMixin):
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
        ValueError: a patch_size or merge_kernel_size that is not the image processor's, or a token that the
            tokenizer does not have.
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
        if patch_size not in (None, image_processor.patch_size):
            raise ValueError(f"patch_size: got {patch_size}; the image processor's is {image_processor.patch_size}.")
        merge = image_processor.merge_kernel_size
        if merge_kernel_size is not None and list(merge_kernel_size) != list(merge):
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
        tokenizer.padding_side = "left"
        self._run = re.compile(
            f"{re.escape(image_start_token)}((?:{re.escape(image_token)})+){re.escape(image_end_token)}"
        )
        self._placeholder = re.compile(f"<({re.escape(image_placeholder)}|{re.escape(video_placeholder)})-([0-9]+)>")

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
                written, K counting over the conversation, unless a user's text names `<image-K>` already.
            tokenize: must be False; `apply_chat_template` tokenises.
            add_generation_prompt: end with the opening of the assistant's turn.

        Returns:
            The text, or a list of texts for a list of conversations.

        Raises:
            ValueError: no messages, or one that is not laid out like this.
        """
        if tokenize:
            raise ValueError("tokenize: got True; use apply_chat_template(…, tokenize=True), or call the processor.")
        conversations, is_batch = _conversations(messages)
        texts = [self._prompt(conversation, add_generation_prompt) for conversation in conversations]
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
        vision = [_Vision.of(conversation) for conversation in _conversations(messages)[0]]
        items = [item for row in vision for item in row.videos]
        images = [load_image(item) for row in vision for item in row.images]
        videos = [load_video(_video_of(item)) for item in items]
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
        conversations, is_batch = _conversations(conversation)
        call = {**kwargs, **(processor_kwargs or {})}
        if return_tensors != "auto":
            call["return_tensors"] = return_tensors
        if chat_template is None:
            _refuse_unknown(extras, set(), "the model card's prompt")
            texts = [self._prompt(c, add_generation_prompt, continue_final_message) for c in conversations]
        else:
            extras.update((name, call.pop(name)) for name in kwargs if name not in _Options.KNOWN)
            texts = super().apply_chat_template(
                conversations,
                chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **extras,
            )

        vision = [_Vision.of(c) for c in conversations]
        videos = [item for row in vision for item in row.videos]
        for name in ("fps", "timestamps"):
            told = [item.get(name) for item in videos]
            given = {**(call.get("videos_kwargs") or {}), **call}
            if name not in given and any(value is not None for value in told):
                call[name] = told
        options = _Options.of(call)
        if return_tensors == "auto" and return_dict and options.return_tensors is None:
            options = replace(options, return_tensors="pt")
        if not tokenize:
            return texts if is_batch else texts[0]
        inputs = self._inputs(
            texts,
            [self._plan(text, f"conversation {index}") for index, text in enumerate(texts)],
            [
                [_Source(f"conversation {i}, image {k + 1}", item) for k, item in enumerate(row.images)]
                for i, row in enumerate(vision)
            ],
            [
                [_Source(f"conversation {i}, video {k + 1}", _video_of(item)) for k, item in enumerate(row.videos)]
                for i, row in enumerate(vision)
            ],
            options,
        )
        return inputs if return_dict else inputs["input_ids"]

    def _prompt(self, conversation: Sequence[Mapping[str, Any]], generate: bool, continue_final: bool = False) -> str:
        # A user's text that names <image-1> puts the image there; other roles' texts do not.
        named = {
            placeholder[0]
            for message in conversation
            if message["role"] == "user"
            for item in _items(message)
            if _kind(item) == "text"
            for placeholder in self._placeholder.finditer(_text(item))
        }
        counts = {self.image_placeholder: 0, self.video_placeholder: 0}
        pieces = []
        if conversation[0]["role"] != "system":
            pieces.append(f"{_TURN_START}system\n{DEFAULT_SYSTEM}{_TURN_END}\n")
        for message in conversation:
            pieces.append(f"{_TURN_START}{message['role']}\n")
            for item in _items(message):
                kind = _kind(item)
                if kind == "text":
                    pieces.append(_text(item))
                    continue
                word = self.image_placeholder if kind == "image" else self.video_placeholder
                counts[word] += 1
                placeholder = f"<{word}-{counts[word]}>"
                if placeholder not in named:
                    pieces.append(placeholder)
            pieces.append(f"{_TURN_END}\n")
        if continue_final:
            pieces.pop()
        if generate:
            pieces.append(_ANSWER_START)
        return "".join(pieces)

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
        options = _Options.of(kwargs)
        if audio is not None:
            raise ValueError("audio: got some; LocateAnything takes images and videos only.")
        texts = _texts(text)
        plans = [self._plan(row, f"text {index}") for index, row in enumerate(texts)]
        pictures = _deal("images", _image_layout(images), [plan.images for plan in plans])
        clips = _deal("videos", _video_layout(videos), [plan.videos for plan in plans])
        return self._inputs(texts, plans, pictures, clips, options)

    def _plan(self, text: str, name: str) -> _Plan:
        numbers: dict[str, list[int]] = {self.image_placeholder: [], self.video_placeholder: []}
        for placeholder in self._placeholder.finditer(text):
            number = int(placeholder[2])
            if number < 1:
                raise ValueError(f"{name}: holds {placeholder[0]}; placeholders count from 1.")
            numbers[placeholder[1]].append(number)
        images, videos = numbers.values()
        slots = text.count(self.image_token)
        if not slots:
            return _Plan(name, tuple(images), tuple(videos))
        runs = tuple(len(run[1]) // len(self.image_token) for run in self._run.finditer(text))
        if images or videos or sum(runs) != slots:
            raise ValueError(
                f"{name}: holds {slots} {self.image_token}, which stand for an image's features; expected only "
                f"placeholders like <{self.image_placeholder}-1>, or the processor's own expansion of all of them."
            )
        return _Plan(name, tuple(range(1, len(runs) + 1)), (), runs)

    def _inputs(
        self,
        texts: list[str],
        plans: list[_Plan],
        images: list[list[_Source]],
        videos: list[list[_Source]],
        options: _Options,
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
            told = [_captions(len(frames), *next(captions)) for frames in row_reels]
            rows.append(self._expand(plan, text, row_shots, row_reels, told))

        slots = [sum(map(self._tokens_of, shown)) for _, shown in rows]
        data = self._tokenize([text for text, _ in rows], slots, options)
        shown = [image for _, row in rows for image in row]
        if shown:
            # An image that stands at several places is preprocessed once.
            distinct = {id(image): image for image in shown}
            encoded = {key: self.image_processor.patchify(image) for key, image in distinct.items()}
            patches, grids = zip(*(encoded[id(image)] for image in shown), strict=True)
            data["pixel_values"] = torch.cat(patches)
            data["image_grid_hws"] = torch.tensor(grids, dtype=torch.long)
        return _batch(data, options.return_tensors)

    def _frames(self, source: _Source, load: Callable[[Any], Any]) -> list[Image.Image]:
        loaded = source.load(load)
        frames = loaded if _is_list(loaded) else [loaded]
        for frame in frames:
            self.image_processor.grid_of(frame.height, frame.width, source.name)
        return frames

    def _expand(
        self,
        plan: _Plan,
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
            number = int(placeholder[2])
            if placeholder[1] == self.image_placeholder:
                words, frames = [f"<{self.image_placeholder} {number}>"], shots[number - 1]
            else:
                words, frames = captions[number - 1], reels[number - 1]
                words = [f"The {_ordinal(number)} video{words[0]}", *words[1:]]
            shown.extend(frames)
            return "".join(word + self._slots_of(frame) for word, frame in zip(words, frames, strict=True))

        return self._placeholder.sub(expansion, text), shown

    def _tokens_of(self, image: Image.Image) -> int:
        return self.image_processor.get_number_of_image_tokens(image.height, image.width)

    def _slots_of(self, image: Image.Image) -> str:
        return f"{self.image_start_token}{self.image_token * self._tokens_of(image)}{self.image_end_token}"

    def _tokenize(self, texts: list[str], slots: list[int], options: _Options) -> dict[str, Any]:
        encoded = self.tokenizer(
            texts,
            return_attention_mask=True,
            return_tensors=options.return_tensors,
            **{"padding": len(texts) > 1 and options.return_tensors is not None, **options.text},
        )
        for index, (row, expected) in enumerate(zip(encoded["input_ids"], slots, strict=True)):
            found = int((np.asarray(row) == self.image_token_id).sum())
            if found != expected:
                raise ValueError(f"text {index}: was tokenised to {found} image slots; its images need {expected}.")
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    def _id_of(self, token: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(token)
        if index is None or index == self.tokenizer.unk_token_id:
            raise ValueError(f"tokenizer: has no token {token!r}; expected LocateAnything's tokenizer.")
        return index

    # ------------------------------------------------------------------------------------------ answers

    def post_process_image_text_to_text(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """Decodes what `generate` returned.

        Args:
            generated_outputs: ids `[rows, length]` or `[length]`, as a tensor, array or lists.
            skip_special_tokens: drop padding, turn marks and image slots. The tokens that carry an answer (labels,
                boxes, coordinates) stay, although the vocabulary calls them special too.
            clean_up_tokenization_spaces: as for the tokenizer's `decode`.

        Returns:
            One text per row. The text of a prompt is a prefix of the text of that prompt with its answer.

        Raises:
            ValueError: something else than ids.
        """
        rows = _id_rows(generated_outputs)
        if skip_special_tokens:
            added = self.tokenizer.added_tokens_decoder.items()
            dropped = {index for index, token in added if token.special and token.content not in ANSWER_TOKENS}
            rows = [[index for index in row if index not in dropped] for row in rows]
        return [
            self.tokenizer.decode(
                row, skip_special_tokens=False, clean_up_tokenization_spaces=clean_up_tokenization_spaces
            )
            for row in rows
        ]

    def post_process_grounding(self, outputs: Any, target_sizes: Any = None) -> list[dict[str, Any]]:
        """Labelled boxes and points of each answer, in the shape of transformers' object-detection post-processing.

        Only the answer is read: what follows the last opening of an assistant's turn, up to its end, or all of a row
        that holds no turns. So a question cannot plant a box. Malformed parts are left out, see
        `grounding.parse_answer`.

        Args:
            outputs: ids `[rows, length]` of prompts with their answers or of answers alone, a `ModelOutput` with such
                `sequences`, lists of ids, a text or a list of texts with special tokens kept.
            target_sizes: `[rows, 2]` or a list of (height, width) in pixels. None leaves fractions of the image's
                sides, 0…1.

        Returns:
            Per row `boxes` float32 `[n, 4]` (x_min, y_min, x_max, y_max), `labels` (n texts, "" for none), `points`
            float32 `[m, 2]` (x, y) and `point_labels` (m texts), in pixels, or fractions without `target_sizes`.

        Raises:
            ValueError: outputs of another kind, another number of target_sizes than rows, or sizes that are not two
                positive numbers each.
        """
        outputs = getattr(outputs, "sequences", outputs)
        if isinstance(outputs, str):
            texts = [outputs]
        elif _is_list(outputs) and all(isinstance(row, str) for row in outputs):
            texts = list(outputs)
        else:
            texts = [self.tokenizer.decode(row, skip_special_tokens=False) for row in _id_rows(outputs)]
        found = []
        for text, (height, width) in zip(texts, _sizes(target_sizes, len(texts)), strict=True):
            items = parse_answer(_answer_of(text))
            placed = [to_pixels(item.coordinates, width, height) for item in items]
            boxes, points = ([i for i, item in enumerate(items) if item.is_point == kind] for kind in (False, True))
            found.append(
                {
                    "boxes": torch.tensor([placed[i] for i in boxes], dtype=torch.float32).view(-1, 4),
                    "labels": [items[i].label for i in boxes],
                    "points": torch.tensor([placed[i] for i in points], dtype=torch.float32).view(-1, 2),
                    "point_labels": [items[i].label for i in points],
                }
            )
        return found


@dataclass(frozen=True)
class _Source:
    """An image or a video as it came, and what an error message calls it."""

    name: str
    value: Any

    def load(self, load: Callable[[Any], Any]) -> Any:
        try:
            return load(self.value)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


@dataclass(frozen=True)
class _Plan:
    """What a text asks for: the numbers of its placeholders in order, or the lengths of its ready runs of slots."""

    name: str
    image_numbers: tuple[int, ...]
    video_numbers: tuple[int, ...]
    runs: tuple[int, ...] = ()

    @property
    def images(self) -> int:
        return max(self.image_numbers, default=0)

    @property
    def videos(self) -> int:
        return max(self.video_numbers, default=0)

    def check(self, word: str, numbers: tuple[int, ...], given: int) -> None:
        """Every number has its image, and every image its number."""
        missing = sorted({number for number in numbers if number > given})
        if missing and self.runs:
            raise ValueError(f"{self.name}: holds slots of {len(self.runs)} {word}s, but got {given}.")
        if missing:
            raise ValueError(f"{self.name}: names <{word}-{missing[0]}>, but got {given} {word}(s).")
        unused = sorted(set(range(1, given + 1)) - set(numbers))
        if unused:
            raise ValueError(
                f"{self.name}: got {given} {word}(s), {len(unused)} of them without a placeholder; write "
                f"<{word}-{unused[0]}> where it belongs."
            )


@dataclass(frozen=True)
class _Options:
    """The keywords of a call, sorted. text: the tokenizer's. fps, timestamps: per video, or None."""

    KNOWN: ClassVar = _TEXT_KWARGS | _VIDEO_KWARGS | _NESTED_KWARGS.keys()

    text: dict[str, Any]
    return_tensors: str | None
    fps: Any
    timestamps: Any

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> _Options:
        flat = {name: value for name, value in kwargs.items() if name not in _NESTED_KWARGS}
        merged: dict[str, Any] = {}
        for group, known in _NESTED_KWARGS.items():
            nested = kwargs.get(group) or {}
            _refuse_unknown(nested, known, group)
            twice = nested.keys() & flat.keys()
            if twice:
                raise ValueError(f"{', '.join(sorted(twice))}: given twice, in {group} and as a keyword.")
            merged.update(nested)
        _refuse_unknown(flat, _TEXT_KWARGS | _VIDEO_KWARGS, "the processor")
        merged.update(flat)
        tensors = merged.pop("return_tensors", None)
        if tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors: got {tensors!r}; expected 'pt', 'np' or None.")
        if merged.pop("truncation", None) not in (None, False, "do_not_truncate"):
            raise ValueError("truncation: a cut prompt would lose image slots; shorten the question, or drop images.")
        fps, timestamps = merged.pop("fps", None), merged.pop("timestamps", None)
        return cls(merged, tensors, fps, timestamps)

    def per_video(self, videos: int) -> tuple[list[Any], list[Any]]:
        """The rate and the times of each of `videos` videos, None where they are not given."""
        rates = [self.fps] * videos if isinstance(self.fps, (int, float)) else self.fps
        for name, values in (("fps", rates), ("timestamps", self.timestamps)):
            if values is not None and (not _is_list(values) or len(values) != videos):
                raise ValueError(f"{name}: got {values!r}; expected a list of {videos}, one for each video.")
        none = [None] * videos
        return list(rates or none), list(self.timestamps or none)


@dataclass(frozen=True)
class _Vision:
    """The items of a conversation that show something, in order of appearance."""

    images: list[Mapping[str, Any]]
    videos: list[Mapping[str, Any]]

    @classmethod
    def of(cls, conversation: Sequence[Mapping[str, Any]]) -> _Vision:
        items = [item for message in conversation for item in _items(message)]
        return cls(*([item for item in items if _kind(item) == kind] for kind in ("image", "video")))


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor))


def _batch(data: dict[str, Any], return_tensors: str | None) -> BatchFeature:
    if return_tensors == "np":
        data = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in data.items()}
    return BatchFeature(data, tensor_type=return_tensors)


def _refuse_unknown(given: Mapping[str, Any], known: Set[str], where: str) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise TypeError(f"{where} got an unknown keyword {', '.join(unknown)}; expected some of {sorted(known)}.")


def _texts(text: Any) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not _is_list(texts) or not all(isinstance(row, str) for row in texts):
        raise ValueError(f"text: got {type(text).__name__}; expected a text or a list of texts.")
    if not texts:
        raise ValueError("text: got an empty list; a batch has at least one text.")
    return list(texts)


def _image_layout(images: Any) -> tuple[list[Any], bool]:
    """The images in a list, and whether it is a list of lists, one per text."""
    if images is None:
        return [], False
    if _is_array(images) and images.ndim == 4:
        return list(images), False
    if not _is_list(images):
        return [images], False
    return list(images), any(map(_is_list, images))


def _video_layout(videos: Any) -> tuple[list[Any], bool]:
    """The videos in a list, and whether it is a list of lists of videos, one per text."""
    if videos is None or (_is_list(videos) and not videos):
        return [], False
    if not _is_list(videos) or not any(map(_is_video, videos)):
        return [videos], False
    return list(videos), any(_is_list(row) and (not row or any(map(_is_video, row))) for row in videos)


def _is_video(value: Any) -> bool:
    return _is_list(value) or (_is_array(value) and value.ndim == 4)


def _deal(name: str, layout: tuple[list[Any], bool], wanted: list[int]) -> list[list[_Source]]:
    """Each text's share of the images or videos, named by where they stand in the argument."""
    given, nested = layout
    if nested:
        if len(given) != len(wanted) or not all(map(_is_list, given)):
            raise ValueError(f"{name}: got {len(given)} lists for {len(wanted)} texts; expected one list per text.")
        return [[_Source(f"{name}[{i}][{k}]", value) for k, value in enumerate(row)] for i, row in enumerate(given)]
    if len(given) != sum(wanted):
        raise ValueError(
            f"{name}: got {len(given)}; the placeholders of the {len(wanted)} text(s) take {sum(wanted)} "
            f"({', '.join(map(str, wanted))}). Write <{name[:-1]}-1> where the first of a text belongs."
        )
    sources = iter([_Source(f"{name}[{i}]", value) for i, value in enumerate(given)])
    return [list(islice(sources, count)) for count in wanted]


def _captions(frames: int, rate: Any, times: Any, source: _Source) -> list[str]:
    """What is written before each frame of a video; the first continues "The first video"."""
    if rate is not None and not isinstance(rate, (int, float)):
        raise ValueError(f"fps: got {rate!r} for {source.name}; expected frames per second or None.")
    if times is not None and not (
        _is_list(times) and len(times) == frames and all(isinstance(time, (int, float)) for time in times)
    ):
        raise ValueError(f"timestamps: got {times!r} for {source.name}; expected {frames} numbers, one per frame.")
    names = [f"Frame-{i + 1}" + ("" if times is None else f"-{times[i]:.2f}s") + ": " for i in range(frames)]
    head = ": " if rate is None else f" sampled with {rate:.2f} fps: "
    return [head + names[0], *names[1:]]


def _ordinal(number: int) -> str:
    if number > len(ORDINALS):
        raise ValueError(f"videos: a text names {number}; the model knows {len(ORDINALS)} in one prompt.")
    return ORDINALS[number - 1]


def _conversations(messages: Any) -> tuple[list[list[Mapping[str, Any]]], bool]:
    """The conversations of a call, checked, and whether it was a list of them."""
    if not _is_list(messages) or not messages:
        raise ValueError(f"messages: got {messages!r}; expected a list of messages, or a list of conversations.")
    is_batch = _is_list(messages[0])
    conversations = list(messages) if is_batch else [messages]
    for index, conversation in enumerate(conversations):
        if not _is_list(conversation) or not conversation:
            raise ValueError(f"conversation {index}: got {conversation!r}; expected a list of messages.")
        for message in conversation:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"conversation {index}: got a message without a role; expected role and content.")
            if not isinstance(message.get("content"), (str, list, tuple)):
                raise ValueError(
                    f"conversation {index}: the content of a {message['role']} message is a "
                    f"{type(message.get('content')).__name__}; expected a text or a list of items."
                )
    return conversations, is_batch


def _items(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message["content"]
    return [content] if isinstance(content, str) else content


def _kind(item: Any) -> str:
    """text, image or video. Keys without a value do not count: datasets fill items up with them."""
    if isinstance(item, str):
        return "text"
    if isinstance(item, Mapping):
        named = item.get("type")
        for kind, keys in (("image", ("image", "image_url")), ("video", ("video",)), ("text", ("text",))):
            if any(item.get(key) is not None for key in keys):
                return kind
        if named in ("image", "image_url"):
            return "image"
        if named in ("video", "text"):
            return named
    shown = sorted(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
    raise ValueError(f"content: got an item {shown}; expected a text, or a dict with a text, an image or a video.")


def _text(item: str | Mapping[str, Any]) -> str:
    text = item if isinstance(item, str) else item.get("text", "")
    if not isinstance(text, str):
        raise ValueError(f"content: the text of an item is a {type(text).__name__}; expected a string.")
    return text


def _video_of(item: Mapping[str, Any]) -> Any:
    for key in ("video", "url", "path"):
        if item.get(key) is not None:
            return item[key]
    raise ValueError(f"content: got a video item with the keys {sorted(map(str, item))}; expected its frames.")


def _id_rows(outputs: Any) -> list[list[int]]:
    rows = outputs.tolist() if _is_array(outputs) else outputs
    if _is_list(rows):
        rows = [row.tolist() if _is_array(row) else row for row in rows]
        if all(isinstance(row, int) for row in rows):
            rows = [rows] if rows else []
        if all(_is_list(row) and all(isinstance(index, int) for index in row) for row in rows):
            return [list(row) for row in rows]
    raise ValueError(f"outputs: got {type(outputs).__name__}; expected token ids [rows, length] or lists of them.")


def _sizes(target_sizes: Any, rows: int) -> list[tuple[float, float]]:
    if target_sizes is None:
        return [(1, 1)] * rows
    sizes = target_sizes.tolist() if _is_array(target_sizes) else target_sizes
    if not _is_list(sizes) or len(sizes) != rows:
        raise ValueError(f"target_sizes: got {sizes!r} for {rows} row(s); expected one (height, width) per row.")
    checked = []
    for size in sizes:
        pair = size.tolist() if _is_array(size) else size
        if not _is_list(pair) or len(pair) != 2 or not all(isinstance(s, (int, float)) and s > 0 for s in pair):
            raise ValueError(f"target_sizes: got {size!r}; expected (height, width) in pixels.")
        checked.append((pair[0], pair[1]))
    return checked


def _answer_of(text: str) -> str:
    _, opening, answer = text.rpartition(_ANSWER_START)
    if not opening and _TURN_START in text:  # a prompt without an answer
        return ""
    return answer.partition(_TURN_END)[0]


__all__ = ["LocateAnythingImageProcessor", "LocateAnythingProcessor"]
