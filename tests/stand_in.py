"""A stand-in for the stock model, written from the spec for the tests of patch/ only.

The module tree and parameter names are the official checkpoint's (docs/checkpoint.md), `generate` has the stock's
contract for one row (docs/stock-behaviour.md §6) and decodes naively: everything is recomputed at every step, under
dense masks.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from locateanything.configuration import LocateAnythingConfig as DropInConfig
from locateanything.configuration import MoonViTConfig
from locateanything.decoding import Phase, accept_next, accept_window, stock_warpers, window_tokens
from locateanything.vision import MoonViTModel


class LocateAnythingConfig(PretrainedConfig):
    model_type = "locateanything"
    sub_configs = {"vision_config": MoonViTConfig, "text_config": Qwen2Config}

    def __init__(self, vision_config=None, text_config=None, **kwargs):
        self.vision_config = MoonViTConfig(**(vision_config or {}))
        self.text_config = Qwen2Config(**(text_config or {}))
        kwargs.pop("_attn_implementation", None)
        super().__init__(**kwargs)

    def to_dict(self):
        """The stock's config says in its dict what attention it was loaded with, and its dtype as torch's object."""
        return {**super().to_dict(), "_attn_implementation": self._attn_implementation, "torch_dtype": torch.float32}

    def to_diff_dict(self):
        return {**super().to_diff_dict(), "torch_dtype": "float32"}


class LocateAnythingForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config_class = LocateAnythingConfig
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer"]
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        merged, hidden = 4 * config.vision_config.hidden_size, config.text_config.hidden_size
        self.vision_model = MoonViTModel(config.vision_config)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(merged), nn.Linear(merged, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.language_model = Qwen2ForCausalLM(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.model.embed_tokens

    def get_output_embeddings(self):
        return self.language_model.lm_head

    def forward(self, pixel_values=None, input_ids=None, image_grid_hws=None, **kwargs):
        return "the stock's forward"

    @torch.no_grad()
    def generate(
        self, pixel_values=None, input_ids=None, attention_mask=None, visual_features=None, image_grid_hws=None,
        tokenizer=None, n_future_tokens=6, **kwargs,
    ):  # fmt: skip
        assert kwargs.get("use_cache"), "Only use_cache=True is supported."
        assert len(input_ids) == 1, "only batch size = 1 is supported now"
        roles = DropInConfig.from_dict(self.config.to_dict()).token_roles
        mode = kwargs.get("generation_mode", "hybrid")
        assert mode in ("fast", "slow", "hybrid"), f"Unsupported generation_mode={mode!r}."
        recipe = {
            "repetition_penalty": kwargs.get("repetition_penalty", 1.0),
            "temperature": kwargs.get("temperature", 0),
            "top_p": kwargs.get("top_p"),
            "top_k": kwargs.get("top_k"),
        }
        pixel_values = pixel_values.to(self.language_model.dtype)  # asked for even beside visual_features
        if visual_features is None:
            visual_features = self.extract_feature(pixel_values, image_grid_hws)
        features = self.mlp1(torch.cat(list(visual_features)))
        tokens = input_ids[0].tolist()
        limit = min(tokenizer.model_max_length, len(tokens) + kwargs.get("max_new_tokens", 2048))
        start, autoregressive, finished = len(tokens), mode == "slow", False
        hybrid = torch.tensor([mode == "hybrid"])
        history, switches = [], 0
        while len(tokens) < limit and not finished:
            logits = self.logits_of(tokens, features, roles, windowed=not autoregressive)
            ids = torch.tensor([tokens]).expand(len(logits), -1)
            p = stock_warpers(**recipe)(ids, logits).softmax(-1).unsqueeze(0)
            x = torch.distributions.Categorical(probs=p).sample() if recipe["temperature"] > 0 else p.argmax(-1)
            if autoregressive:
                accepted = accept_next(x[:, 0], hybrid, roles)
            else:
                accepted = accept_window(window_tokens(p, x, hybrid, roles), hybrid, roles)
            new = accepted.tokens[0, : accepted.lengths[0]].tolist()
            finished = bool(accepted.finished)
            # the step that ends an autoregressive stretch for good counts as the other kind, as in the stock
            history.append(("ar" if autoregressive and not finished else "mtp", tokenizer.decode(new)))
            switches += accepted.phase == Phase.AR and not autoregressive
            tokens, autoregressive = tokens + new, accepted.phase == Phase.AR
        text = tokenizer.decode(tokens[start:], skip_special_tokens=False)
        if not kwargs.get("verbose", False):
            return text
        statistics = f"num_tokens={len(tokens) - start}; forward_step={len(history)}; switch_to_ar={switches}"
        print(statistics)
        return text, history, statistics

    def extract_feature(self, pixel_values, image_grid_hws):
        return self.vision_model(pixel_values, [tuple(size) for size in image_grid_hws.tolist()])

    def logits_of(self, tokens, features, roles, windowed):
        """`[6, V]` of the window, or `[1, V]` of the next token; docs/stock-behaviour.md §2 as one dense mask."""
        n = len(tokens)
        fed = tokens + [tokens[-1]] + [roles.mask] * 5 if windowed else tokens
        positions = [*range(n), *range(n - 1, n + 5)] if windowed else [*range(n)]
        visible = torch.ones(len(fed), len(fed), dtype=torch.bool).tril()
        visible[n:, n:] = True
        visible[n:, n - 1] = False
        embeddings = self.get_input_embeddings()(torch.tensor([fed]))
        slots = torch.tensor(fed) == roles.image
        slots[n:] = False
        embeddings[0, slots] = features
        hidden = self.language_model.model(
            inputs_embeds=embeddings,
            position_ids=torch.tensor([positions]),
            attention_mask=torch.zeros(1, 1, len(fed), len(fed)).masked_fill(~visible, -torch.inf),
        ).last_hidden_state[0]
        return self.language_model.lm_head(hidden[n:] if windowed else hidden[-1:]).float()
