"""llama.cpp through llama-cpp-python: evaluates each window from an empty cache, with flash attention, which is
llama-server's own choice and computes other last digits."""

import glob
import json
import sys

import llama_cpp
import numpy as np


def main(folder: str, request_file: str, answer_file: str) -> None:
    with open(request_file) as file:
        request = json.load(file)
    (path,) = glob.glob(f"{folder}/*.gguf")
    windows, prompt = request["windows"], request["prompt"]
    longest = max(len(windows[0]), len(prompt) + request["continue"])
    wish = {"flash_attn": True, "logits_all": True, "n_threads": 1, "verbose": False}
    model = llama_cpp.Llama(path, n_ctx=longest, n_batch=longest, **wish)
    logprobs = []
    for ids in windows:
        model.reset()
        model.eval(ids)
        logits = np.array(model.scores[: len(ids) - 1], dtype=np.float64)
        peak = logits.max(-1, keepdims=True)
        logprobs.append(logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True)))
    model.reset()
    model.eval(prompt)
    greedy: list[int] = []
    for _ in range(request["continue"]):
        greedy.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(greedy[-1:])
    np.savez(
        answer_file,
        logprobs=np.array(logprobs, dtype=np.float32),
        greedy=np.array(greedy),
        tokens=np.array(model.tokenize(request["text"].encode(), add_bos=True, special=False)),
        engine=np.array(f"llama-cpp-python {llama_cpp.__version__}"),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
