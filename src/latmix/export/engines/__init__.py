"""Scripts that run an exported folder in one engine, each with that engine's own interpreter: none imports latmix unless
it has to, and their names differ from the packages they import, beside which they would otherwise stand.

    PYTHON run_ENGINE.py FOLDER REQUEST.json ANSWER.npz

The request holds `windows` (token ids, all of one length), `prompt` (ids to continue greedily), `continue` (how many
tokens) and `text`. The answer holds `logprobs` (windows, length − 1, vocabulary), float32, of the token after each
position; `greedy`, ids; `tokens`, what the engine's tokenizer makes of the text; `engine`, its name and version.
"""
