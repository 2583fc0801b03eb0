# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""The processor: conversations and pictures → model inputs (docs/checkpoint.md, "Prompt"); answers: grounding.py."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from typing import Any

from PIL import Image
from transformers import AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin

from .answers import TURN_END, TURN_START
from .configuration import TokenRoles  # noqa: F401, answers names it, and transformers 4.57 copies only what is here
from .grounding import GroundingMixin
from .image_processing import LocateAnythingImageProcessor, is_list, load_image, load_video

# The model card's prompt, of a conversation as `LocateAnythingProcessor._typed` leaves it.
CARD_TEMPLATE = r"""
{%- if messages[0].role != 'system' -%}
  {{ '<|im_start|>system\nYou are a helpful assistant.\n<|im_end|>\n' }}
{%- endif -%}
{%- for message in messages -%}
  {{ '<|im_start|>' ~ message.role ~ '\n' }}
  {%- set words = message.content | map(attribute='text') | join ~ '<|im_end|>' -%}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{{ words }}{%- endgeneration -%}
  {%- else -%}
    {{ words }}
  {%- endif -%}
  {{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
# Keywords: of rendering a template, of the tokenizer's `pad`, and all that a call takes, flat or in a group
RENDERING = ("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask")
PADDING = ("padding", "padding_side", "max_length", "pad_to_multiple_of")
OFFSETS = ("return_offsets_mapping", "return_text_replacement_offsets")
KEYWORDS = {*PADDING, *OFFSETS, "add_special_tokens", "fps", "return_tensors", "timestamps", "truncation"}
GROUPS = ("common_kwargs", "images_kwargs", "text_kwargs", "videos_kwargs")

SLOT, IMAGE_START, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"  # an image: one slot for each of its tokens
_PLACEHOLDER = re.compile("<(image|video)-([0-9]{1,9})>")
_MARK = re.compile(f"{_PLACEHOLDER.pattern}|{IMAGE_START}(?:{SLOT})+{IMAGE_END}")
Images = list[Image.Image]
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


class LocateAnythingProcessor(GroundingMixin, ProcessorMixin):
    """Conversations to model inputs, and answers to boxes and points, by the model card's calls and transformers'.

    Batches are padded on the left, whatever the tokenizer's files say. A streamer that skips special tokens is given
    the processor itself: its tokenizer would drop the answer's coordinates with them.

    Args:
        image_processor, tokenizer: as `from_pretrained` loads them.
        chat_template: the checkpoint's Jinja template, kept for saving. It lacks the newline that ends the card's
            system turn, so `apply_chat_template` uses a template only where one is passed to it.

    Raises:
        ValueError: a tokenizer without LocateAnything's tokens.
    """

    image_token = video_token = SLOT

    if not hasattr(ProcessorMixin, "get_attributes"):  # transformers 4.57 is told, 5.x reads the signature
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

        @classmethod
        def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> list[Any]:
            """4.57 would look for a fast image processor, fail on 5.x's list of extra tokens, and warn of Mistral."""
            LocateAnythingImageProcessor.register_for_auto_class()
            images = LocateAnythingImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
            kwargs = {"extra_special_tokens": {}, "fix_mistral_regex": False, **kwargs}
            return [images, AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)]

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        ids = tokenizer.get_added_vocab()
        for token in (SLOT, IMAGE_START, IMAGE_END, TURN_START, TURN_END):
            if token not in ids:
                raise ValueError(f"tokenizer: has no token {token!r} of its own; expected LocateAnything's.")
        self.image_token_id = self.video_token_id = ids[SLOT]
        tokenizer.padding_side = "left"
        # transformers' advice to pad in the call, which threads that share a tokenizer must not
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A conversation, or a list of them, to the model card's prompt (docs/checkpoint.md), or to model inputs.

        Args:
            conversation: a list of `{"role": …, "content": …}`, or a list of such lists. Content is a text or a list
                of texts and of items with a `text`, an image (`image`, `image_url`, or type "image" with a key that
                `load_image` takes) or a `video` (`fps` and `timestamps` beside it). Where an image stands,
                `<image-K>` is written, K counting over the conversation, unless a user's text names it, once.
            chat_template: a Jinja template to render instead of the card's prompt.
            tokenize: return what the processor makes of the text and the conversations' images and videos.
            return_dict: with `tokenize`: all of it, as tensors if not told otherwise, and not only `input_ids`.
            processor_kwargs: keywords of the processor's call (`{"padding": True}`); they may also stand flat.
            **kwargs: transformers' own (`add_generation_prompt`, `continue_final_message`,
                `return_assistant_tokens_mask`), and variables that the template reads (`tools`, `documents`, …).

        Returns:
            A text, or a list for a list of conversations; with `tokenize`, `input_ids` or a BatchFeature.

        Raises:
            ValueError: no messages, or one that is not laid out like this, or that holds `<|im_start|>`, `<|im_end|>`
                or the image token, or `<image-K>` a second time: no question can open a turn, end one or add an image.
            TypeError: a keyword that neither the processor nor the template has.
        """
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name in KEYWORDS}
        conversations, is_batch = self._conversations(conversation)
        template = CARD_TEMPLATE if chat_template is None else chat_template
        # what the template does not read is the processor's, as in transformers 5
        ours = [name for name in kwargs if name in KEYWORDS or not re.search(rf"\b{name}\b", f"{template}{RENDERING}")]
        call = _read_keywords({**{name: kwargs.pop(name) for name in ours}, **(processor_kwargs or {})})
        call.setdefault("return_tensors", "pt" if return_dict else None)
        if kwargs.get("return_assistant_tokens_mask"):
            call["return_offsets_mapping"] = True

        texts = super().apply_chat_template(conversations, template, **kwargs)
        for index, text in enumerate(texts):
            named = Counter((found[1], int(found[2])) for found in _PLACEHOLDER.finditer(text))
            if twice := [f"<{kind}-{number}>" for (kind, number), count in named.items() if count > 1]:
                other = twice[0].replace("-", " ")
                raise ValueError(f"conversation {index}: has {twice[0]!r} more than once; write others as {other}.")
        if not tokenize:
            return texts if is_batch else texts[0]
        kwargs |= {"tokenize": True, "return_dict": return_dict, "return_tensors": call["return_tensors"]}
        kwargs["processor_kwargs"] = {"common_kwargs": call}  # flat, 5.x would read into them
        return super().apply_chat_template(conversations, template, **kwargs)

    py_apply_chat_template = apply_chat_template  # as the model card calls it

    def process_vision_info(
        self, messages: Sequence[Any], return_video_kwargs: bool = False, video_reader_backend: str | None = None
    ) -> tuple[Any, ...]:
        """The images and videos of a conversation, or of a list of them, in order of appearance.

        Args:
            messages: as for `apply_chat_template`.
            return_video_kwargs: also return the frames' rates and times.
            video_reader_backend: accepted for scripts written for the model card; videos are given as frames here.

        Returns:
            A list of RGB images or None, a list of videos (lists of RGB images) or None; with `return_video_kwargs`
            also `{"fps": [per video], "timestamps": [[seconds per frame] per video]}`, 2.0 and -1 where not known.

        Raises:
            ValueError: a message that is not laid out as expected, or an image or frame that cannot be read.
        """
        messages = [message for conversation in self._conversations(messages)[0] for message in conversation]
        items = [item for message in messages for item in message["content"]]
        images = [self._load("image", item["image"]) for item in items if item["type"] == "image"]
        clips = [self._load_clip("video", item["video"]) for item in items if item["type"] == "video"]
        fps = [clip.fps or 2.0 for clip in clips]
        timestamps = [clip.timestamps or [-1] * len(clip.frames) for clip in clips]
        found = images or None, [clip.frames for clip in clips] or None
        return (*found, {"fps": fps, "timestamps": timestamps}) if return_video_kwargs else found

    def _conversations(self, messages: Any) -> tuple[list[list[dict[str, Any]]], bool]:
        """The conversations of a call, typed, and whether it was a list of them."""
        is_batch = is_list(messages) and len(messages) > 0 and is_list(messages[0])
        conversations = messages if is_batch else [messages]
        return [self._typed(each, f"conversation {index}") for index, each in enumerate(conversations)], is_batch

    def _typed(self, conversation: Any, name: str) -> list[dict[str, Any]]:
        """A conversation whose contents are lists of items with a `type` (text, image or video) and a `text`, which
        for an image or a video is its placeholder, or empty where a user's text names that."""
        if not is_list(conversation) or not conversation:
            raise ValueError(f"messages: got a {type(conversation).__name__} as {name}; expected a list of messages.")
        typed: list[dict[str, Any]] = []
        named: set[str] = set()
        for message in conversation:
            role, content = (message.get(k) if isinstance(message, Mapping) else None for k in ("role", "content"))
            if not isinstance(role, str) or not isinstance(content, (str, list, tuple)):
                kind = type(content).__name__
                raise ValueError(f"{name}: got a {kind} as content of the role {role!r}; expected texts or a list.")
            items = [_typed_item(item) for item in ([content] if isinstance(content, str) else content or [""])]
            typed.append({**message, "content": items})
            texts = [item["text"] for item in items if item["type"] == "text"]
            if role == "user":
                named.update(found[0] for text in texts for found in _PLACEHOLDER.finditer(text))
            # an assistant's message may be an answer as the model gave it
            written = f"{role}\n{''.join(texts)}".removesuffix(TURN_END if role == "assistant" else "")
            if held := [mark for mark in (TURN_START, TURN_END, SLOT) if mark in written]:
                raise ValueError(f"{name}: a {role[:20]!r} message holds {held[0]}, a mark of the prompt itself.")
        counts: Counter[str] = Counter()
        for item in (item for message in typed for item in message["content"] if item["type"] != "text"):
            counts[item["type"]] += 1
            placeholder = f"<{item['type']}-{counts[item['type']]}>"
            item["text"] = "" if placeholder in named else placeholder
        return typed

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
        under the words the model was trained on (docs/checkpoint.md, "Prompt"); K restarts in every text. A text
        without placeholders may hold its slots already, where they fit its images. Equal pictures, in one text or
        several, are preprocessed once.

        Args:
            images: one image, a list (each text takes as many, in order, as its highest K), or a list of one list
                per text. Anything `load_image` takes.
            text: a text or a list of texts.
            videos: a video (what `load_video` takes, or an item with it as `video`, and `fps` and `timestamps`), a
                list of videos, or a list of one list of videos per text; taken like the images.
            **kwargs: flat or in `text_kwargs`, `videos_kwargs`, … (the flat one counts): `padding` (default: several
                texts are padded, on the left, where tensors are asked for), `padding_side`, `max_length` (to pad to),
                `pad_to_multiple_of`, `add_special_tokens`, `return_tensors` ("pt", "np"), `return_offsets_mapping`,
                and per video over all texts `fps` (frames a second) and `timestamps` (a list of seconds per frame).

        Returns:
            input_ids, attention_mask: `[rows, length]` int64 with return_tensors, else lists. Where there are images,
            pixel_values float32 `[patches, 3, patch_size, patch_size]` and image_grid_hws int64 `[images, 2]`, both in
            the order of the slots. With `return_offsets_mapping` also offset_mapping `[rows, length, 2]`: where in
            the text as given a token stands, in characters; an image's slots stand at its placeholder.

        Raises:
            ValueError: no text, images that do not fit the placeholders or the slots or cannot be used, truncation.
            TypeError: an unknown keyword.
        """
        # transformers 4.57's apply_chat_template hands on its template's variables beside them
        options = _read_keywords(kwargs.get("processor_kwargs", kwargs))
        if audio is not None:
            raise ValueError("audio: got some; LocateAnything takes images and videos only.")
        texts = [text] if isinstance(text, str) else text
        if not is_list(texts) or not texts or not all(isinstance(row, str) for row in texts):
            raise ValueError(f"text: got a {type(text).__name__}; expected a text, or a list of at least one.")
        asked = [self._numbers(row, f"text {index}") for index, row in enumerate(texts)]
        read: dict[Any, Image.Image] = {}  # rows about one file or URL read it once

        def load(name: str, value: Any) -> Image.Image:
            if (key := _key(value)) not in read:
                read[key] = self._load(name, value)
            return read[key]

        shots = _deal("images", images, _is_image, [numbers for numbers, _ in asked], load)
        clips = _deal("videos", videos, _is_video, [numbers for _, numbers in asked], self._load_clip)
        _tell_times([clip for row in clips for clip in row], options)
        rows = list(map(self._expand, texts, shots, clips))
        data = self._tokenize([text for text, _, _ in rows], [origin for _, origin, _ in rows], options)
        shown = [image for _, _, images in rows for image in images]
        if shown:
            data |= self.image_processor.encode(shown)
        return BatchFeature(data, tensor_type=options.get("return_tensors"))

    def _numbers(self, text: str, name: str) -> tuple[list[int], list[int]]:
        """The numbers of a text's images and of its videos, in order; ready runs of slots count from 1."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}: holds half of a character at {error.start}; expected valid Unicode.") from None
        marks = list(_MARK.finditer(text))
        images = [int(mark[2]) for mark in marks if mark[1] == "image"]
        videos = [int(mark[2]) for mark in marks if mark[1] == "video"]
        runs = [mark[0] for mark in marks if not mark[1]]
        slots = text.count(SLOT)
        if slots and (images or videos or slots != "".join(runs).count(SLOT)):
            raise ValueError(f"{name}: holds {slots} {SLOT}; expected placeholders, or runs of slots alone.")
        return images or list(range(1, len(runs) + 1)), videos

    def _load(self, name: str, value: Any, load: Callable[..., Any] = load_image) -> Any:
        """An image, or with `load_video` the frames of a video, that the model can take; errors begin with `name`."""
        try:
            loaded = load(value, upright=self.image_processor.upright, copy=False)
            for image in loaded if is_list(loaded) else [loaded]:
                self.image_processor.grid_of(image.height, image.width)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return loaded

    def _load_clip(self, name: str, value: Any) -> "Clip":
        item = {**value} if isinstance(value, Mapping) else {"video": value}
        fps, timestamps = item.pop("fps", None), item.pop("timestamps", None)
        if "video" in item:  # which `url` and `path` are other names of
            item["image"] = item.pop("video")
            item.pop("url", None), item.pop("path", None)
        return Clip(self._load(name, item, load_video), fps, timestamps)

    def _expand(self, text: str, images: Images, clips: "list[Clip]") -> tuple[str, list[int], Images]:
        """The text with its slots; where each of its characters was in `text`, and one behind; the images shown."""
        words: list[str] = []
        origin: list[int] = []
        shown: Images = []
        ready, done = iter(images), 0
        for mark in _MARK.finditer(text):
            kind, number = mark[1], int(mark[2] or 0)
            if kind == "video":
                frames, captions = clips[number - 1].frames, clips[number - 1].captions(number)
            else:
                frames = [images[number - 1] if kind else next(ready)]
                captions = [f"<{kind} {number}>" if kind else ""]
            slots = "".join(caption + self._slots_of(frame) for caption, frame in zip(captions, frames, strict=True))
            if not kind and slots != mark[0]:
                have, need = (run.count(SLOT) for run in (mark[0], slots))
                raise ValueError(f"text: holds a run of {have} image slots; its image needs {need}.")
            words += [text[done : mark.start()], slots]
            origin += [*range(done, mark.start()), *[mark.start()] * len(slots)]
            shown += frames
            done = mark.end()
        return "".join([*words, text[done:]]), [*origin, *range(done, len(text) + 1)], shown

    def _slots_of(self, image: Image.Image) -> str:
        count = self.image_processor.get_number_of_image_tokens(image.height, image.width)
        return f"{IMAGE_START}{SLOT * count}{IMAGE_END}"

    def _tokenize(self, texts: list[str], origins: list[list[int]], options: Mapping[str, Any]) -> dict[str, Any]:
        tensors = options.get("return_tensors")
        # padded by `pad`, which is Python: a call would set the padding of the tokenizer that threads share
        rows = self.tokenizer(
            texts,
            padding=False,
            add_special_tokens=options.get("add_special_tokens", True),
            return_attention_mask=True,
            return_offsets_mapping=options.get("return_offsets_mapping", False),
        )
        self._check_special_mm_tokens(texts, rows, modalities=["image"])
        padding = {"padding": len(texts) > 1 and tensors is not None}
        padding |= {name: options[name] for name in PADDING if name in options}
        unpadded = {name: rows[name] for name in ("input_ids", "attention_mask")}
        data = dict(self.tokenizer.pad(unpadded, return_tensors=tensors, **padding))
        if "offset_mapping" in rows:
            left = (padding.get("padding_side") or self.tokenizer.padding_side) == "left"
            data["offset_mapping"] = []
            for ids, spans, origin in zip(data["input_ids"], rows["offset_mapping"], origins, strict=True):
                told = [(origin[a], origin[max(a, b - 1)] + (b > a)) for a, b in spans]
                blank = [(0, 0) if left else (origin[-1], origin[-1])] * (len(ids) - len(told))
                data["offset_mapping"].append(blank + told if left else told + blank)
        return data


@dataclass
class Clip:
    """A video: its frames, how many there are a second, and when each was, in seconds; None where it is not known."""

    frames: Images
    fps: float | None
    timestamps: Sequence[float] | None

    def captions(self, number: int) -> list[str]:
        """What is written before each frame of a prompt's `number`th video."""
        if number > len(ORDINALS):
            raise ValueError(f"videos: a text names {number}; the model knows {len(ORDINALS)} in one prompt.")
        if self.timestamps is not None and len(self.timestamps) != len(self.frames):
            raise ValueError(f"timestamps: got {len(self.timestamps)} for a video of {len(self.frames)} frames.")
        if not all(isinstance(each, Real) and abs(each) < 1e9 for each in (self.fps or 0, *(self.timestamps or ()))):
            raise ValueError(f"fps: got {self.fps!r} with timestamps {self.timestamps!r}; expected numbers, or None.")
        rate = "" if self.fps is None else f" sampled with {self.fps:.2f} fps"
        times = [""] * len(self.frames) if self.timestamps is None else [f"-{time:.2f}s" for time in self.timestamps]
        captions = [f"Frame-{index}{time}: " for index, time in enumerate(times, 1)]
        return [f"The {ORDINALS[number - 1]} video{rate}: {captions[0]}", *captions[1:]]


def _tell_times(clips: Sequence[Clip], options: Mapping[str, Any]) -> None:
    """`fps` and `timestamps` of a call, one for each video over all texts, count before the items' own."""
    for name in ("fps", "timestamps"):
        values = options.get(name)
        if name == "fps" and isinstance(values, (int, float)):
            values = [values] * len(clips)
        if values is not None and (not is_list(values) or len(values) != len(clips)):
            raise ValueError(f"{name}: got {values!r}; expected a list of {len(clips)}, one for each video.")
        for clip, value in zip(clips, values or (), strict=False):
            setattr(clip, name, value)


def _read_keywords(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a call, without transformers' groups; the flat ones count before those."""
    options = {name: value for group in GROUPS for name, value in (given.get(group) or {}).items()}
    options |= {name: value for name, value in given.items() if name not in GROUPS}
    if unknown := sorted(options.keys() - KEYWORDS):
        raise TypeError(f"unknown keyword {', '.join(unknown)}; the processor takes {', '.join(sorted(KEYWORDS))}.")
    if options.get("truncation") not in (None, False, "do_not_truncate"):
        raise ValueError("truncation: a cut prompt would lose image slots; shorten the question, or drop images.")
    return options


def _typed_item(item: Any) -> dict[str, Any]:
    """An item of a content with its `type`; of an image or a video, the item itself stands under that name.

    Keys without a value do not count: datasets fill items up with them.
    """
    told = {"text": item} if isinstance(item, str) else item if isinstance(item, Mapping) else {}
    filled = {key: value for key, value in told.items() if value is not None}
    kind = next((key for key in ("image", "image_url", "video", "text") if key in filled), told.get("type"))
    if kind == "text" and isinstance(filled.get("text", ""), str):
        return {"type": "text", "text": filled.get("text", "")}
    if kind in ("image", "image_url"):
        return {"type": "image", "image": item}
    if kind == "video":
        source = next((filled[key] for key in ("video", "url", "path") if key in filled), None)
        return {"type": "video", "video": {**item, "video": source}}
    what = sorted(told) or type(item).__name__
    raise ValueError(f"content: got an item {what}; expected a text, or a dict with a text, an image or a video.")


def _deal(
    name: str, values: Any, is_one: Callable[[Any], bool], asked: list[list[int]], load: Callable[[str, Any], Any]
) -> list[list[Any]]:
    """Each text's share of the images or videos, loaded. `asked`: the numbers of each text's placeholders."""
    given = [] if values is None else [values] if is_one(values) else list(values)
    word = name.removesuffix("s")
    if any(is_list(row) and not is_one(row) for row in given):
        if len(given) != len(asked) or not all(map(is_list, given)):
            raise ValueError(f"{name}: got {len(given)} lists for {len(asked)} texts; expected one list per text.")
        shares = [[(f"{name}[{i}][{k}]", value) for k, value in enumerate(row)] for i, row in enumerate(given)]
    else:
        wanted = [max(numbers, default=0) for numbers in asked]
        if len(given) != sum(wanted):
            raise ValueError(
                f"{name}: got {len(given)}; the texts' placeholders take {wanted}. Write <{word}-1> where one belongs."
            )
        sources = iter([(f"{name}[{i}]", value) for i, value in enumerate(given)])
        shares = [list(islice(sources, count)) for count in wanted]
    for index, (numbers, share) in enumerate(zip(asked, shares, strict=True)):
        if {*numbers} != {*range(1, len(share) + 1)}:
            raise ValueError(
                f"text {index}: names {word}s {sorted({*numbers})}, but got {len(share)}, counted from 1."
            )
    return [[load(*source) for source in share] for share in shares]


def _key(value: Any) -> Any:
    """What two sources have in common that are the same text, the same object, or items of these."""
    if isinstance(value, Mapping):
        return tuple((name, _key(part)) for name, part in value.items())
    return value if isinstance(value, str) else id(value)


def _is_image(value: Any) -> bool:
    return not is_list(value) and getattr(value, "ndim", 0) != 4


def _is_video(value: Any) -> bool:
    """What is no list, or a list that begins with a frame, which is no list, 4-D array or item with a `video`."""
    return not is_list(value) or (
        len(value) > 0 and _is_image(value[0]) and not (isinstance(value[0], Mapping) and "video" in value[0])
    )


__all__ = ["LocateAnythingImageProcessor", "LocateAnythingProcessor"]
