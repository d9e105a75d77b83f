"""Train the small language models that latmix measures itself on, from plain text, on a CPU or one GPU.

The demo model must be *hurt* by 4 bits, and it is over-trained small models that are. So: few parameters, many tokens,
one pass over real text (no token is seen twice), no dropout, and a warmup-stable-decay schedule. Everything that is not
the model is the plainest choice that works: byte-level BPE, AdamW, packed fixed-length windows. Given up: multi-GPU,
resuming, evaluation harnesses; a run takes an hour or two and a second run is cheap.

    python scripts/train_model.py --family llama --text wiki-*.jsonl.zst --tokens 60_000_000 --out models/demo

`--text` takes `.jsonl.zst` files with a `text` field (an article a line) or `.txt` files (blank lines between).
"""

import argparse
import copy
import io
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a spinning barrier costs milliseconds a region on shared cores

import tokenizers
import torch
import transformers
import zstandard

VOCABULARY, WINDOW = 1024, 256
BOS, EOS = "<s>", "</s>"
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=WINDOW, rms_norm_eps=1e-5, tie_word_embeddings=True,
    bos_token_id=0, eos_token_id=1,
)  # fmt: skip
FAMILIES = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}


def articles(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        if path.name.endswith(".jsonl.zst"):
            with path.open("rb") as raw:
                stream = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), "utf-8")
                yield from (json.loads(line)["text"] for line in stream)
        else:
            yield from path.read_text("utf-8").split("\n\n")


def train_tokenizer(paths: list[Path], characters: int = 20_000_000) -> transformers.PreTrainedTokenizerFast:
    def head() -> Iterator[str]:
        seen = 0
        for text in articles(paths):
            yield text
            seen += len(text)
            if seen > characters:
                return

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(head(), vocab_size=VOCABULARY, special_tokens=[BOS, EOS], show_progress=False)
    bpe._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=BOS, eos_token=EOS)


def windows(paths: list[Path], tokenizer: transformers.PreTrainedTokenizerFast, batch: int) -> Iterator[torch.Tensor]:
    """Batches (batch, WINDOW + 1) of packed articles, each article opened by BOS."""
    buffer: list[int] = []
    group: list[str] = []
    for text in articles(paths):
        group.append(text)
        if len(group) < 64:
            continue
        for ids in tokenizer(group)["input_ids"]:
            buffer += ids
        group = []
        size = batch * (WINDOW + 1)
        while len(buffer) >= size:
            yield torch.tensor(buffer[:size]).view(batch, WINDOW + 1)
            del buffer[:size]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warmup over 2 %, constant, then a linear decay to zero over the last 30 %."""
    return peak * min(1.0, step / max(1, 0.02 * steps), (steps - step) / (0.3 * steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=60_000_000)
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compute",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="float32 is ten times as fast without AVX-512",
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of an existing tokenizer (default: train one)")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.tokenizer:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    else:
        tokenizer = train_tokenizer(args.text)
    tokenizer.save_pretrained(args.out)
    config = FAMILIES[args.family](**SHAPE, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    master = [
        p.detach().clone().requires_grad_() for p in model.parameters()
    ]  # float32, whatever the model computes in
    model.to(getattr(torch, args.compute))
    groups = [
        {"params": [p for p in master if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in master if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)

    @torch.compile  # with plain attention twice as fast as eager flash attention on a CPU core at this width
    def loss_of(window: torch.Tensor) -> torch.Tensor:
        logits = model(window[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())

    steps = math.ceil(args.tokens / (args.batch * WINDOW))
    began, average = time.time(), float("nan")
    for step, window in zip(range(1, steps + 1), windows(args.text, tokenizer, args.batch), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr)
        loss = loss_of(window.to(device))
        loss.backward()
        for exact, rounded in zip(master, model.parameters(), strict=True):
            exact.grad, rounded.grad = rounded.grad.float(), None
        torch.nn.utils.clip_grad_norm_(master, 1.0)
        optimizer.step()
        with torch.no_grad():
            for exact, rounded in zip(master, model.parameters(), strict=True):
                rounded.copy_(exact)
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0 or step == steps:
            speed = step * args.batch * WINDOW / (time.time() - began)
            print(f"step {step}/{steps}  loss {average:.4f}  {speed:,.0f} tokens/s", flush=True)
        if step % 1000 == 0 or step == steps:
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(args.out)
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
