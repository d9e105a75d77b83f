"""GGUF for llama.cpp: the same codes and scale bytes in ggml's order, biases included, nothing online.

ggml's MXFP4 block is one scale byte and sixteen bytes of codes, element j in the low nibble of byte j and element
j + 16 in the high one. Its Llama graph takes biases on every linear, and interleaves the two halves of each rotary
head, so the rows of q and k are reordered (packed rows move as they are). Mistral and Qwen2 without a sliding window
are Llamas here. Norms and biases are stored in float32, embedding and head in bfloat16.
"""

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latmix.errors import InputError, UnavailableError
from latmix.export.base import EXPORTS, Export
from latmix.export.source import PACKED, SCALE, Source
from latmix.export.vocabulary import add_tokenizer
from latmix.growing import Part, grow
from latmix.progress import Progress

LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
NAME, ALIGNED = "model.gguf", 32  # bytes


def write(source: Source, folder: Path, progress: Progress) -> None:
    """Raises: LatmixError: no gguf package, a tokenizer or a rotary embedding that is not written to GGUF."""
    try:
        import gguf
    except ImportError:
        raise UnavailableError("Writing GGUF needs the package gguf: pip install 'latmix[export]'.") from None
    every = list(tensors(source))
    sizes = [int(np.prod(shape)) * (4 if kind == "f32" else 1) for _, shape, kind, _ in every]
    writer = gguf.GGUFWriter(None, architecture(source))
    _add_facts(writer, source)
    add_tokenizer(writer, source.path, source.shapes[f"{source.arch.embedding}.weight"][0])
    kinds = {"mxfp4": gguf.GGMLQuantizationType.MXFP4, "bf16": gguf.GGMLQuantizationType.BF16, "f32": None}
    for (name, shape, kind, _), size in zip(every, sizes, strict=True):
        writer.add_tensor_info(name, shape, np.dtype("f4" if kind == "f32" else "u1"), size, kinds[kind])
    head = io.BytesIO()
    writer.fout = [io.BufferedWriter(head)]
    writer.state = gguf.gguf_writer.WriterState.EMPTY  # as if a file had been opened
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    start = np.frombuffer(head.getvalue(), np.uint8)
    made = zip([start.nbytes, *sizes], [lambda: start, *(make for *_, make in every)], strict=True)
    parts = [Part(size + -size % ALIGNED, partial(_padded, make)) for size, make in made]
    grow(folder / NAME, parts, progress)


def _padded(make: Callable[[], np.ndarray]) -> memoryview:
    """Its bytes, and zeros up to where the next tensor may begin; a large table's bytes are whole without."""
    data = make().reshape(-1).view(np.uint8)
    more = -len(data) % ALIGNED
    return np.pad(data, (0, more)).data if more else data.data


def architecture(source: Source) -> str:
    return "qwen3" if source.arch.name == "qwen3" else "llama"


Made = tuple[str, tuple[int, ...], str, Callable[[], np.ndarray]]


def tensors(source: Source) -> Iterator[Made]:
    """(name, shape of the bytes or floats, kind, how to make it), in llama.cpp's names."""
    arch = source.arch
    yield _kept(source, f"{arch.embedding}.weight", "token_embd.weight", "bf16")
    yield _kept(source, f"{arch.final_norm}.weight", "output_norm.weight", "f32")
    yield _kept(source, f"{arch.head}.weight", "output.weight", "bf16")
    for index in range(source.layers):
        prefix, block = f"{arch.layers}.{index}.", f"blk.{index}."
        for ours, theirs in NORMS.items():
            if f"{prefix}{ours}.weight" in source.shapes:
                yield _kept(source, f"{prefix}{ours}.weight", f"{block}{theirs}.weight", "f32")
        for ours, theirs in LINEARS.items():
            rows, width = source.shapes[prefix + ours + PACKED]
            order = rotary_order(source, ours, rows)
            make = partial(_blocks, source, prefix + ours, order)
            yield f"{block}{theirs}.weight", (rows, width // 16 * 17), "mxfp4", make
            if f"{prefix}{ours}.bias" in source.shapes:
                yield _kept(source, f"{prefix}{ours}.bias", f"{block}{theirs}.bias", "f32", order)


def _kept(source: Source, ours: str, theirs: str, kind: str, order: Tensor | None = None) -> Made:
    shape = source.shapes[ours]
    bytes_ = (*shape[:-1], shape[-1] * 2) if kind == "bf16" else shape
    return theirs, bytes_, kind, partial(_floats, source, ours, kind, order)


def _floats(source: Source, name: str, kind: str, order: Tensor | None) -> np.ndarray:
    tensor = source.tensor(name)
    tensor = tensor if order is None else tensor[order]
    found: np.ndarray = tensor.float().numpy() if kind == "f32" else tensor.contiguous().view(torch.uint8).numpy()
    return found


def _blocks(source: Source, path: str, order: Tensor | None) -> np.ndarray:
    packed, scale = source.tensor(path + PACKED), source.tensor(path + SCALE)
    if order is not None:
        packed, scale = packed[order], scale[order]
    found: np.ndarray = ggml_blocks(packed, scale).numpy()
    return found


def ggml_blocks(packed: Tensor, scale: Tensor) -> Tensor:
    """(rows, n/2) codes, element 2j low in byte j, and (rows, n/32) scales → (rows, 17 n/32) bytes in ggml's order."""
    rows = len(packed)
    codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).reshape(rows, -1, 2, 16)  # row, block, half, element
    mixed = codes[:, :, 0] | codes[:, :, 1] << 4
    return torch.cat([scale.unsqueeze(-1), mixed], dim=-1).reshape(rows, -1)


def rotary_order(source: Source, name: str, rows: int) -> Tensor | None:
    """Which row of q or k comes where in ggml's Llama: (first half, second half) of a head become neighbours."""
    if architecture(source) != "llama" or name not in ("self_attn.q_proj", "self_attn.k_proj"):
        return None
    heads = source.config["num_attention_heads" if name.endswith("q_proj") else "num_key_value_heads"]
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).flatten()


def _add_facts(writer: Any, source: Source) -> None:
    config, rope = source.config, source.config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"The rotary embedding '{rope['rope_type']}' is not written to GGUF; known: default.")
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(38)  # llama.cpp's number for "mostly MXFP4"


def serve(folder: Path, activations: str | None) -> str:
    return f"llama-server --model {folder / NAME}"


def engines(source: Source) -> tuple[str, ...]:
    return ("llama",)


EXPORTS.add("gguf", Export(write, serve, engines))
