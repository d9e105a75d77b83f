"""Llama: the pattern that most dense decoders follow."""

from latmix.archs.base import ARCHS, Arch, Input, Site

LLAMA = ARCHS.add(
    "llama",
    Arch(
        name="llama",
        causal_lm="LlamaForCausalLM",
        sites=(
            Site(
                name="residual",
                writers=("self_attn.o_proj", "mlp.down_proj"),
                readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
                stream=True,
                exact_for="rotation",
            ),
            Site(
                name="values",
                writers=("self_attn.v_proj",),
                readers=("self_attn.o_proj",),
                stream=False,
                exact_for="affine",
                width="heads",
            ),
            Site(
                name="attention_norm",
                writers=("input_layernorm",),
                readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                stream=False,
                exact_for="diagonal",
            ),
            Site(
                name="mlp_norm",
                writers=("post_attention_layernorm",),
                readers=("mlp.gate_proj", "mlp.up_proj"),
                stream=False,
                exact_for="diagonal",
            ),
            Site(
                name="up",
                writers=("mlp.up_proj",),
                readers=("mlp.down_proj",),
                stream=False,
                exact_for="diagonal",
                width="intermediate",
            ),
        ),
        inputs=(
            Input("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm="input_layernorm"),
            Input("o", ("self_attn.o_proj",)),
            Input("gate_up", ("mlp.gate_proj", "mlp.up_proj"), norm="post_attention_layernorm"),
            Input("down", ("mlp.down_proj",)),
        ),
        tiny={
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 64,
        },
    ),
)
