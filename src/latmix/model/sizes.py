"""Numbers in a config.json decide what is allocated, so they are looked at before a library builds anything from them.

transformers makes lists as long as `num_hidden_layers` and reads code from the hub where `attn_implementation` names a
repository: both on the word of the file. The limits lie far above every model there is and far below what hurts. That
the sizes are those of the tensors is checked later, against the shards' headers.
"""

from pathlib import Path
from typing import Any

from latmix.errors import DamagedError, InputError

LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "max_position_embeddings": 2**31,
}
ATTENTION = ("attn_implementation", "_attn_implementation", "experts_implementation")


def check_config(config: dict[str, Any], file: Path) -> None:
    """`config` as read from `file`, not yet given to transformers.

    Raises: LatmixError: a size that is no whole number from 1 to its limit, heads that do not share the keys evenly, or
        an attention that would be fetched from a hub.
    """
    for name, limit in LIMITS.items():
        size = config.get(name)
        if size is not None and not (type(size) is int and 1 <= size <= limit):
            raise DamagedError(f"'{file}' says {name} is {_short(size)}; a whole number from 1 to {limit} can be.")
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and shared and heads % shared:
        raise DamagedError(f"'{file}' says {heads} heads share {shared} keys and values, which does not come out even.")
    for name in ATTENTION:
        if config.get(name) not in (None, "eager", "sdpa"):
            raise InputError(f"'{file}' says {name} is {_short(config[name])}; latmix runs eager or sdpa, remove it.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
