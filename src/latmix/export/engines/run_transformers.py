"""transformers: with compressed-tensors, or with latmix's own quantizer where the folder says so."""

import json
import sys

import numpy as np
import torch
import transformers


def main(folder: str, request_file: str, answer_file: str) -> None:
    with open(request_file) as file:
        request = json.load(file)
    with open(f"{folder}/config.json") as file:
        ours = json.load(file)["quantization_config"]["quant_method"] == "latmix"
    if ours:
        import latmix  # noqa: F401  (registers the quantizer)
    dtype = torch.float32 if ours else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
    ).eval()
    if not ours:  # compressed-tensors decodes weights in the first forward, to bfloat16, which holds them exactly
        with torch.no_grad():
            model(torch.tensor([request["prompt"]]))
        torch.nn.Module.float(model)  # transformers forbids its own `float` here
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with torch.no_grad():
        found = [model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1) for ids in request["windows"]]
    prompt = torch.tensor([request["prompt"]])
    wish = {"max_new_tokens": request["continue"], "min_new_tokens": request["continue"], "do_sample": False}
    continued = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **wish)
    np.savez(
        answer_file,
        logprobs=torch.stack(found).numpy(),
        greedy=continued[0, prompt.shape[1] :].numpy(),
        tokens=np.array(tokenizer(request["text"])["input_ids"]),
        engine=np.array(f"transformers {transformers.__version__}"),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
