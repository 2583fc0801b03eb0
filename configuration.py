# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The checkpoint's shape and its token roles: data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, Qwen2Config
from transformers.activations import ACT2FN

# A window is one box: <box> x1 y1 x2 y2 </box>. The decoding rules are written for exactly this width.
WINDOW = 6

# nvidia/LocateAnything-3B, so that LocateAnythingConfig() describes the published model.
_TEXT_3B: dict[str, Any] = {
    "vocab_size": 152681,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "block_size": WINDOW,
    "causal_attn": False,
    "null_token_id": 152678,
    "switch_token_id": 152679,
    "text_mask_token_id": 151676,
}
# The largest that each number of a tower may be: beyond, a broken file, which would be built for hours.
_LARGEST = 2**24
_COUNTS = {"num_hidden_layers": 2**10, "num_attention_heads": 2**10, "hidden_size": 2**20, "intermediate_size": 2**20}
_TEXT_COUNTS = {
    **_COUNTS,
    **dict.fromkeys(("vocab_size", "num_key_value_heads", "max_position_embeddings"), _LARGEST),
}
_VISION_COUNTS = {
    **_COUNTS,
    **dict.fromkeys(("patch_size", "init_pos_emb_height", "init_pos_emb_width"), 2**12),
}
_TEXT_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)
_ROLES_IN_TEXT_CONFIG = ("block_size", "null_token_id", "text_mask_token_id", "eos_token_id")


@dataclass(frozen=True)
class TokenRoles:
    """Ids of the tokens that mean something to the decoding rules (decoding.md §1). All are ints.

    `coord_start … coord_end` (inclusive) are the coordinates 0 … 1000, in thousandths of the image's side.
    """

    image: int
    box_start: int
    box_end: int
    coord_start: int
    coord_end: int
    ref_start: int
    ref_end: int
    none: int
    null: int
    mask: int
    end: int


class MoonViTConfig(PretrainedConfig):
    """Shape of the MoonViT vision tower (checkpoint.md, "config.json").

    Args:
        patch_size: side of a square patch, in pixels.
        init_pos_emb_height, init_pos_emb_width: size of the learned position grid, in patches.
        merge_kernel_size: (rows, columns) of patches that become one image token.

    Raises:
        ValueError: a number out of range.
    """

    model_type = "moonvit"
    base_config_key = "vision_config"

    def __init__(
        self,
        patch_size: int = 14,
        init_pos_emb_height: int = 64,
        init_pos_emb_width: int = 64,
        num_attention_heads: int = 16,
        num_hidden_layers: int = 27,
        hidden_size: int = 1152,
        intermediate_size: int = 4304,
        merge_kernel_size: tuple[int, int] | list[int] = (2, 2),
        **kwargs: Any,
    ):
        # The published file's vision auto_map points at another repository; this tower is defined here.
        kwargs.pop("auto_map", None)
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.init_pos_emb_height = init_pos_emb_height
        self.init_pos_emb_width = init_pos_emb_width
        self.num_attention_heads = num_attention_heads
        self.num_hidden_layers = num_hidden_layers
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        _refuse_counts(vars(self), _VISION_COUNTS, "vision_config")
        self.merge_kernel_size = _merge_of(merge_kernel_size, "vision_config.merge_kernel_size")
        if hidden_size % num_attention_heads or (hidden_size // num_attention_heads) % 4:
            raise ValueError(
                f"vision_config: hidden_size={hidden_size} over num_attention_heads={num_attention_heads} must give "
                "a head size that is a multiple of 4 (its 2-D rotary embedding pairs x and y)."
            )


class LocateAnythingConfig(PretrainedConfig):
    """Configuration of a LocateAnything checkpoint, read from the official `config.json` as it is.

    Args:
        vision_config: `MoonViTConfig` or its dict.
        text_config: `Qwen2Config` or its dict, with `block_size`, `null_token_id`, `text_mask_token_id` and
            `eos_token_id`. Any other text tower is refused.
        image_token_index … none_token_id: token roles, see `TokenRoles`. The defaults are the 3B checkpoint's.

    Raises:
        ValueError: another text tower than Qwen2, a missing or out-of-range number of a tower, a missing,
            out-of-range or shared token role, or a window that is not six tokens wide. The message names it.
    """

    model_type = "locateanything"
    sub_configs = {"vision_config": MoonViTConfig, "text_config": Qwen2Config}
    attribute_map = {"image_token_id": "image_token_index"}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        image_token_index: int = 151665,
        box_start_token_id: int = 151668,
        box_end_token_id: int = 151669,
        coord_start_token_id: int = 151677,
        coord_end_token_id: int = 152677,
        ref_start_token_id: int = 151672,
        ref_end_token_id: int = 151673,
        none_token_id: int = 4064,
        mlp_connector_layers: int = 2,
        **kwargs: Any,
    ):
        if text_config is None:
            text_config = Qwen2Config(**_TEXT_3B)
        elif isinstance(text_config, dict):
            _refuse_other_tower(text_config.get("model_type", "qwen2"))
            missing = [name for name in _TEXT_REQUIRED if name not in text_config]
            if missing:  # Qwen2's defaults are those of another model
                raise ValueError(f"text_config lacks {', '.join(missing)}: not a LocateAnything checkpoint.")
            _refuse_counts(text_config, _TEXT_COUNTS, "text_config")
            text_config = _with_rope_theta(text_config)
            text_config = _built(Qwen2Config, text_config, "text_config")
        if vision_config is None:
            vision_config = MoonViTConfig()
        elif isinstance(vision_config, dict):
            vision_config = _built(MoonViTConfig, vision_config, "vision_config")
        for name, value in (("text_config", text_config), ("vision_config", vision_config)):
            if not isinstance(value, PretrainedConfig):
                raise ValueError(f"{name} is a {type(value).__name__}; expected the tower's config or its dict.")
        if mlp_connector_layers != 2:
            raise ValueError(f"mlp_connector_layers={mlp_connector_layers}: the projector of this model has 2 layers.")

        self.vision_config: MoonViTConfig = vision_config
        self.text_config: Qwen2Config = text_config
        self.image_token_index = image_token_index
        self.box_start_token_id = box_start_token_id
        self.box_end_token_id = box_end_token_id
        self.coord_start_token_id = coord_start_token_id
        self.coord_end_token_id = coord_end_token_id
        self.ref_start_token_id = ref_start_token_id
        self.ref_end_token_id = ref_end_token_id
        self.none_token_id = none_token_id
        self.mlp_connector_layers = mlp_connector_layers
        # <|endoftext|> is both Qwen's bos and the tokenizer's pad token; the official config names only the first.
        pad_token_id = kwargs.pop("pad_token_id", None)
        pad_token_id = pad_token_id if pad_token_id is not None else text_config.bos_token_id
        self._validate(pad_token_id)

        tie_word_embeddings = kwargs.pop("tie_word_embeddings", text_config.tie_word_embeddings)
        kwargs = _without_magi(kwargs)
        attention = kwargs.pop("_attn_implementation", None)
        kwargs["attn_implementation"] = kwargs.pop("attn_implementation", None) or attention
        try:
            super().__init__(**kwargs)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"config: {error}") from error
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id

    @property
    def _attn_implementation(self):
        return PretrainedConfig._attn_implementation.fget(self)

    @_attn_implementation.setter
    def _attn_implementation(self, value):
        PretrainedConfig._attn_implementation.fset(self, None if value == "magi" else value)

    @property
    def token_roles(self) -> TokenRoles:
        text = self.text_config
        end = text.eos_token_id
        return TokenRoles(
            image=self.image_token_index,
            box_start=self.box_start_token_id,
            box_end=self.box_end_token_id,
            coord_start=self.coord_start_token_id,
            coord_end=self.coord_end_token_id,
            ref_start=self.ref_start_token_id,
            ref_end=self.ref_end_token_id,
            none=self.none_token_id,
            null=text.null_token_id,
            mask=text.text_mask_token_id,
            end=end[0] if isinstance(end, list) and end else end,
        )

    def get_text_config(self, *args: Any, **kwargs: Any) -> Qwen2Config:
        return self.text_config

    def _validate(self, pad_token_id: int | None) -> None:
        text = self.text_config
        _refuse_other_tower(text.model_type)
        heads, groups = text.num_attention_heads, text.num_key_value_heads
        if heads % groups:
            raise ValueError(
                f"text_config.num_attention_heads={heads} is no multiple of num_key_value_heads={groups}."
            )
        head = getattr(text, "head_dim", None)
        if head is not None and (not _is_id(head, 1025) or head < 2 or head % 2):
            raise ValueError(f"text_config.head_dim is {head!r}; expected an even number from 2 to 1024.")
        if head is None and (text.hidden_size % heads or text.hidden_size // heads % 2):
            raise ValueError(
                f"text_config.hidden_size={text.hidden_size} over num_attention_heads={heads} must give an even head "
                "size (its rotary embedding turns pairs)."
            )
        if not isinstance(text.rms_norm_eps, float) or not 0 < text.rms_norm_eps < 1:
            raise ValueError(f"text_config.rms_norm_eps is {text.rms_norm_eps}; expected a small number above 0.")
        dropout = text.attention_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"text_config.attention_dropout is {dropout!r}; expected a number of 0 or more below 1.")
        if text.hidden_act not in ACT2FN:
            raise ValueError(f"text_config.hidden_act is {text.hidden_act!r}; expected one of transformers' own.")
        if text.pad_token_id is not None and not _is_id(text.pad_token_id, text.vocab_size):
            raise ValueError(
                f"text_config.pad_token_id is {text.pad_token_id!r}; expected one of {text.vocab_size} ids."
            )
        if not isinstance(text.tie_word_embeddings, bool):
            raise ValueError(
                f"text_config.tie_word_embeddings is {text.tie_word_embeddings!r}; expected true or false."
            )
        missing = [key for key in _ROLES_IN_TEXT_CONFIG if getattr(text, key, None) is None]
        if missing:
            raise ValueError(f"text_config lacks {', '.join(missing)}: not a LocateAnything checkpoint.")
        if text.block_size != WINDOW:
            raise ValueError(f"text_config.block_size is {text.block_size}; this model decodes windows of {WINDOW}.")
        if text.use_sliding_window:
            raise ValueError("text_config.use_sliding_window is true; LocateAnything attends to its whole prompt.")
        roles = vars(self.token_roles)
        outside = {name: i for name, i in {**roles, "pad": pad_token_id}.items() if not _is_id(i, text.vocab_size)}
        if outside:
            raise ValueError(f"token ids outside the vocabulary of {text.vocab_size}: {outside}.")
        if len(set(roles.values())) != len(roles):
            raise ValueError(f"two token roles share one id: {roles}.")
        if pad_token_id in roles.values() and pad_token_id != roles["end"]:
            raise ValueError(
                f"pad_token_id={pad_token_id} (or text_config.bos_token_id) is a token role too: {roles}."
            )
        if roles["coord_end"] - roles["coord_start"] != 1000:
            raise ValueError(
                f"coord_start_token_id={roles['coord_start']} … coord_end_token_id={roles['coord_end']} must span the "
                "1001 coordinates 0…1000."
            )
        coordinates = range(roles["coord_start"], roles["coord_end"] + 1)
        inside = {name: i for name, i in roles.items() if i in coordinates and not name.startswith("coord_")}
        if inside:
            raise ValueError(
                f"token ids among the coordinates {roles['coord_start']} … {roles['coord_end']}: {inside}."
            )


def _without_magi(config: dict[str, Any]) -> dict[str, Any]:
    """The published file asks for "magi", training's kernel, under one name or another; it means the default here."""
    return {name: value for name, value in config.items() if value != "magi" or "attn_implementation" not in name}


def _with_rope_theta(text_config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes it into `rope_parameters`, where 4.57 does not look and takes another model's."""
    nested = text_config.get("rope_parameters")
    theta = text_config.get("rope_theta", nested.get("rope_theta") if isinstance(nested, dict) else None)
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 1 < theta < 1e12:
        raise ValueError(f"text_config.rope_theta is {theta!r}; expected a number above 1, as 1000000.0.")
    return {**text_config, "rope_theta": theta}


def _built(tower: type[PretrainedConfig], values: dict[str, Any], name: str) -> Any:
    try:
        return tower(**_without_magi(values))
    except ValueError:
        raise
    except Exception as error:  # transformers 5 checks types by errors of its own, 4.57 fails on what they lead to
        raise ValueError(f"{name}: {error}") from error


def _refuse_counts(values: Mapping[str, Any], largest: dict[str, int], name: str) -> None:
    for key, most in largest.items():
        value = values.get(key, 1)  # what is missing has the tower's default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name}.{key} is {value!r}; expected a whole number from 1 to {most}.")


def _merge_of(value: Any, name: str) -> list[int]:
    """(rows, columns) of patches that become one image token, checked."""
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(_is_id(side, 65) and side for side in value):
        raise ValueError(f"{name} is {value!r}; expected two whole numbers from 1 to 64.")
    return list(value)


def _is_id(value: Any, size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size


def _refuse_other_tower(model_type: str) -> None:
    if model_type != "qwen2":
        raise ValueError(
            f"text_config.model_type is {model_type!r}; LocateAnything decodes with a 'qwen2' tower, and no other "
            "is supported."
        )


__all__ = ["WINDOW", "LocateAnythingConfig", "MoonViTConfig", "TokenRoles"]
