"""The model card, README.md of an export: what it is, what it costs, how it is served, what was verified."""

from pathlib import Path
from typing import Any

from latmix.export.base import EXPORTS, MANIFEST, TENSORS
from latmix.rundir import read_json

CARD, VERDICT = "README.md", "verdict.json"

CAVEATS = {
    "compressed-tensors": (
        "vLLM computes with rounded activations on Blackwell GPUs (SM100 and later); older GPUs run the same weights "
        "with 16-bit activations (Marlin), so their results differ."
    ),
    "transformers": (
        "Needs `import latmix` before loading; without it transformers refuses the folder, whose model type it does "
        "not know. Weights stay packed in memory and are decoded in every forward: small, not fast."
    ),
    "gguf": "llama.cpp rounds activations to 8 bits, not to MXFP4, so its results lie nearer to full precision.",
}


def text(folder: Path, final: Path) -> str:
    """The card of `folder`, which will be called `final`."""
    manifest = read_json(folder / MANIFEST)
    recipe, target = manifest["recipe"], manifest["target"]
    held_out = manifest["held_out"]
    measured = "not measured"
    if held_out is not None:
        kl, agreement = held_out["kl"]["mean"], held_out["top1_agreement"]["mean"]
        measured = f"perplexity {held_out['perplexity']['mean']:.3f}, KL to the original {kl:.4f} nats a token,\n"
        measured += f"top-1 agreement {100 * agreement:.1f} %"
    online = ", ".join(f"`{spec}` at the input of {spot}" for spot, spec in manifest["online"].items()) or "none"
    served = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in TENSORS)
    # the hub suggests code by this name: not transformers', where that would compute nonsense
    library = "gguf" if target == "gguf" else "transformers" if "transformers" in manifest["engines"] else "vllm"
    rounded = f"`{recipe['activations']}` (the scale rule they were learned under)"
    rounded = rounded if recipe["activations"] else "left alone"
    return f"""---
library_name: {library}
tags: [{recipe["weights"].partition(":")[0]}, latmix, {target}]
---

Quantized by latmix {manifest["latmix"]} ([method](https://arxiv.org/abs/2602.17681)), recipe `{recipe["name"]}`.

- Weights `{recipe["weights"]}`, activations {rounded}.
- Embedding, norms, head and biases in bfloat16; the head is untied.
- Online transforms: {online}. Biases: {", ".join(manifest["biases"]) or "none"}.
- {served:,} bytes of tensors; {manifest["bf16_bytes"]:,} in bfloat16 with the head untied.

On held-out calibration text: {measured}.

## Serve

    {EXPORTS[target].serve(final, recipe["activations"]).replace(chr(10), chr(10) + "    ")}

{caveats(manifest)}

## Verified

{_verdicts(folder)}
"""


A16 = "Without that option vLLM 0.32 rounds activations where the GPU can (Blackwell), whatever the file says."

IGNORED = (
    "**Do not load this with transformers:** it ignores `transform_config` without an error and computes nonsense. "
    "vLLM applies it."
)


def caveats(manifest: dict[str, Any]) -> str:
    found = [CAVEATS[manifest["target"]]]
    if manifest["target"] == "compressed-tensors":
        found = found if manifest["recipe"]["activations"] else [A16]
        found += [IGNORED] if manifest["online"] else []
    return "\n\n".join(found)


def _verdicts(folder: Path) -> str:
    if not (folder / VERDICT).exists():
        return f"Not yet: no engine has loaded this folder. Run `latmix verify {folder.name.removesuffix('.partial')}`."
    found: dict[str, dict[str, Any]] = read_json(folder / VERDICT)
    rows = [
        f"| {each['engine']} | {each['perplexity']:.4f} | {each['run_perplexity']:.4f} | {each['kl']:.2e} | "
        f"{each['greedy']} of {each['of']} | {'yes' if each['passed'] else '**no**'} | {each['date']} |"
        for each in found.values()
    ]
    head = "| engine | perplexity | of the run | KL to the run | same greedy tokens | agrees | date |\n"
    return head + "|---|---|---|---|---|---|---|\n" + "\n".join(rows)
