"""Which recipes depend on their seed. One that does not is computed once, however many seeds a comparison has.

Derived, not declared: a seed orders the windows of whatever learns, and draws maps. Whether a map is drawn is asked of
its builder, by building it at two seeds. Given up: noticing a builder that draws only at other sizes.
"""

from latmix.model.maps import build_transform
from latmix.recipe import Recipe

SIZE, BLOCK = 64, 32  # of the maps that are built to see


def seeded(recipe: Recipe) -> bool:
    """Whether another seed can give another result."""
    learns = recipe.learning or recipe.layerwise or recipe.tuning
    return learns is not None or any(_drawn(spec) for spec in {*recipe.folded.values(), *recipe.online.values()})


def _drawn(spec: str) -> bool:
    one, other = (build_transform(spec, SIZE, BLOCK, seed).state_dict() for seed in (0, 1))
    return any(not one[name].equal(other[name]) for name in one)
