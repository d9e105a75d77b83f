"""Why a learned affine map works, step by step on the model that ships with latmix.

A notebook as a script: cells begin with `# %%`. Runs without a screen: python examples/why_it_works.py
"""

# %% The model, its norm gains absorbed, and some text
from latmix.analysis import bounds, closed_form
from latmix.analysis.candidates import CANDIDATES
from latmix.assets import CALIBRATION, DEMO_MODEL
from latmix.data import read_text, windows
from latmix.eval.activations import Place, collect
from latmix.eval.errors import block_errors, error
from latmix.model.fold import absorb_gains
from latmix.model.load import load
from latmix.numerics import parse_format

loaded = load(DEMO_MODEL)
absorb_gains(loaded.model, loaded.arch)
ids = windows(read_text(CALIBRATION), loaded.tokenizer, 64, loaded.vocabulary)[:64]

# %% What the attention of layer 1 sees: half to learn from, half to measure on
place, fmt = Place("qkv", 1), parse_format("mxfp4:scale=even")
taught, held_out = (collect(loaded, part, tokens=2048, seed=0)[place] for part in ids.chunk(2))
print(f"{place}: {len(taught)} tokens of width {taught.shape[-1]}")

# %% Without a map: outliers decide, block by block
for index, value in enumerate(block_errors(None, held_out, fmt).tolist()):
    print(f"block {index}: mean squared error {value:.5f}")

# %% What theory promises: the best map under white error, against any rotation
print(f"the closed form promises {closed_form(taught).ratio:.2f} of a rotation's error")

# %% What maps do, and how far the bound of docs/theory.md is from it
for name in ("none", "block-hadamard", "learned-rotation", "optimum", "learned-affine"):
    map = CANDIDATES[name](taught, fmt, 0)
    value = error(map, held_out, fmt)
    limit = "" if map is None else f", bound {bounds(map, held_out, fmt).two_terms / value:.1f} times as large"
    print(f"{name.replace('-', ' ')}: E(T) = {value:.5f}{limit}")
