"""Refuses settings of a config.json that change what is computed and that the decoder does not read.

A setting that is ignored makes a model answer subtly wrong. So a key is known to be read (``READ``) or known
to have no influence on inference (``HARMLESS``); any other key that by its name belongs to the maths must
have a neutral value, which says that the feature is not used. All other keys are notes of the people and
tools that made the model. docs/models.md has the table for users.
"""

from __future__ import annotations

import re
from typing import Any

READ = {
    *("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "dtype", "torch_dtype"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "quantization_config"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "eos_token_id"),
}
HARMLESS = {
    *("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "resid_pdrop", "embd_pdrop"),
    *("hidden_dropout", "hidden_dropout_prob", "initializer_range", "output_attentions"),
    *("output_hidden_states", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset"),
    # How weights were cut in training, and memory for time in training; the sums are the same.
    *("pretraining_tp", "chunk_size_feed_forward", "head_type", "layer_norm_eps"),
}
ROPE_READ = {
    *("rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "attention_factor", "divisors"),
    *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"),
}
_MATHS = re.compile(
    "act|alibi|attention|attn|bias|cap|chunk|clamp|clip|embed|expert|head|hidden|intermediate|kv_|layer|logit"
    "|lora|mamba|mlp|moe|mult|norm|offset|parallel|position|qk|query|residual|rope|rotary|router|scal|sink"
    "|ssm|temperature|window"
)
_FACTOR = re.compile("mult|scal")  # where one is neutral, too


def unread(raw: dict[str, Any], head_dim: int) -> list[str]:
    """What of a config.json, ``key (value)``, changes the maths and is not read."""
    neutral = {"attention_multiplier": head_dim**-0.5, "query_pre_attn_scalar": head_dim}
    found = [
        f"{key} ({value!r})"
        for key, value in raw.items()
        if key not in READ | HARMLESS
        and _MATHS.search(key)
        and not (not value or value == neutral.get(key) or (_FACTOR.search(key) and value == 1))
    ]
    for name in ("rope_parameters", "rope_scaling"):
        inner = raw.get(name) or {}
        found += [
            f"{name}.{key} ({value!r})" for key, value in inner.items() if key not in ROPE_READ and value
        ]
    return found
