# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""The checkpoint's shape and its token roles: data only."""

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, Qwen2Config

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
_VISION_3B: dict[str, Any] = {
    "patch_size": 14,
    "init_pos_emb_height": 64,
    "init_pos_emb_width": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "merge_kernel_size": (2, 2),
}
_ROLES_3B: dict[str, int] = {
    "image_token_index": 151665,
    "box_start_token_id": 151668,
    "box_end_token_id": 151669,
    "coord_start_token_id": 151677,
    "coord_end_token_id": 152677,
    "ref_start_token_id": 151672,
    "ref_end_token_id": 151673,
    "none_token_id": 4064,
}
# what a file must say: transformers would fill in the numbers of another Qwen2
_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "rope_theta"),
)


@dataclass(frozen=True)
class TokenRoles:
    """Ids of the tokens that mean something to the decoding rules (docs/stock-behaviour.md §1). All are ints.

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

    @classmethod
    def of(cls, config: Any) -> "TokenRoles":
        """The roles that a config names, this class's or the stock's own.

        Raises:
            ValueError: a tower other than Qwen2, a window that is not six tokens wide, or a role that is missing,
                outside the vocabulary or shared. The message names it.
        """
        text, end = config.text_config, config.text_config.eos_token_id
        if text.model_type != "qwen2":
            raise ValueError(f"text_config.model_type is {text.model_type!r}; LocateAnything decodes with 'qwen2'.")
        window = getattr(text, "block_size", None)
        if window != WINDOW:
            raise ValueError(f"text_config.block_size is {window}; this model decodes windows of {WINDOW}.")
        if text.use_sliding_window:
            raise ValueError("text_config.use_sliding_window is true; LocateAnything attends to its whole prompt.")
        named = ("box_start", "box_end", "coord_start", "coord_end", "ref_start", "ref_end", "none")
        ids: dict[str, Any] = {name: getattr(config, f"{name}_token_id") for name in named}
        ids["image"], ids["end"] = config.image_token_index, end[0] if isinstance(end, list) and end else end
        ids["null"], ids["mask"] = getattr(text, "null_token_id", None), getattr(text, "text_mask_token_id", None)
        outside = {name: i for name, i in ids.items() if not isinstance(i, int) or not 0 <= i < text.vocab_size}
        if outside:
            raise ValueError(f"token roles without an id in the vocabulary of {text.vocab_size}: {outside}.")
        first, last = ids["coord_start"], ids["coord_end"]
        if last - first != 1000:
            raise ValueError(f"coord_start/end_token_id, {first} … {last}, must span the coordinates 0…1000.")
        others = {name: i for name, i in ids.items() if not name.startswith("coord_")}
        inside = {name: i for name, i in others.items() if first <= i <= last}
        if inside or len(set(others.values())) != len(others):
            raise ValueError(f"token roles share an id: {inside or others}.")
        return cls(**ids)


class MoonViTConfig(PretrainedConfig):
    """Shape of the MoonViT vision tower (docs/checkpoint.md, "config.json"), by default `_VISION_3B`.

    Args:
        patch_size: side of a square patch, in pixels.
        init_pos_emb_height, init_pos_emb_width: size of the learned position grid, in patches.
        merge_kernel_size: (rows, columns) of patches that become one image token.
    """

    model_type = "moonvit"
    base_config_key = "vision_config"

    def __init__(self, **kwargs: Any):
        # The published file's vision auto_map points at another repository; this tower is defined here.
        kwargs.pop("auto_map", None)
        super().__init__(**{**_VISION_3B, **kwargs})


class LocateAnythingConfig(PretrainedConfig):
    """Configuration of a LocateAnything checkpoint, read from the official `config.json` as it is.

    Args:
        vision_config: `MoonViTConfig` or its dict.
        text_config: `Qwen2Config` or its dict, with `block_size`, `null_token_id`, `text_mask_token_id` and
            `eos_token_id`. Any other text tower is refused.
        image_token_index … none_token_id: token roles, see `TokenRoles`; by default `_ROLES_3B`.
        use_llm_lora, use_backbone_lora: rank of the LoRA adapters that the checkpoint holds beside the language
            model's and the vision tower's weights, as the stock's fine-tuning saves them; 0 for none.

    Raises:
        ValueError: a number missing that Qwen2 would fill up with another model's, or what `TokenRoles.of` refuses.
    """

    model_type = "locateanything"
    sub_configs = {"vision_config": MoonViTConfig, "text_config": Qwen2Config}
    attribute_map = {"image_token_id": "image_token_index"}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        use_llm_lora: int = 0,
        use_backbone_lora: int = 0,
        **kwargs: Any,
    ):
        if not isinstance(text_config, PretrainedConfig):
            text_config = Qwen2Config(**_with_rope_theta(_TEXT_3B if text_config is None else text_config))
        if not isinstance(vision_config, PretrainedConfig):
            vision_config = MoonViTConfig(**(vision_config or {}))
        self.vision_config: MoonViTConfig = vision_config
        self.text_config: Qwen2Config = text_config
        self.use_llm_lora, self.use_backbone_lora = use_llm_lora, use_backbone_lora
        # <|endoftext|> is both Qwen's bos and the tokenizer's pad token; the official config names only the first.
        pad_token_id = kwargs.pop("pad_token_id", None)
        tie_word_embeddings = kwargs.pop("tie_word_embeddings", text_config.tie_word_embeddings)
        kwargs.pop("_attn_implementation", None)  # the stock writes down what it ran with; who loads it chooses
        super().__init__(**{**_ROLES_3B, **kwargs})
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = text_config.bos_token_id if pad_token_id is None else pad_token_id
        TokenRoles.of(self)

    @property
    def token_roles(self) -> TokenRoles:
        return TokenRoles.of(self)


def _with_rope_theta(text_config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes it into `rope_parameters`, where 4.57 does not look and takes another model's."""
    nested = text_config.get("rope_parameters") or {}
    told = {"rope_theta": nested.get("rope_theta"), **text_config}
    missing = [name for name in _REQUIRED if told.get(name) is None]
    if missing:
        raise ValueError(f"text_config lacks {', '.join(missing)}: not a LocateAnything checkpoint.")
    return told
