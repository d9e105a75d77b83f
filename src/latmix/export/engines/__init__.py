"""Scripts that run an exported folder in one engine, with that engine's own interpreter. None imports latmix unless it
has to; their names differ from the packages they import, which they would hide otherwise.

    PYTHON run_ENGINE.py FOLDER REQUEST.json ANSWER.npz

The request holds `windows` (token ids, all of one length), `prompt` (ids to continue greedily), `continue` (how many
tokens) and `text`. The answer holds `logprobs` (windows, length − 1, vocabulary), float32, of the token after each
position; `greedy`, ids; `tokens`, what the engine's tokenizer makes of the text; `engine`, its name and version.
"""
