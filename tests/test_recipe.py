"""Recipes: values that survive JSON, dotted overrides, and errors that name culprit and choices."""

import pytest

from latmix import recipes
from latmix.errors import LatmixError
from latmix.recipe import from_json, override


@pytest.mark.parametrize("name", recipes.RECIPES.names())
def test_round_trip(name: str) -> None:
    recipe = recipes.find(name)
    assert from_json(recipe.to_json()) == recipe
    assert recipe.name == name


def test_override_reaches_every_level() -> None:
    recipe = override(
        recipes.find("latmix-lu"),
        {
            "learning.steps": "7",
            "learning.lr": "1",
            "learning.top_k": "100",
            "folded.values": "none",
            "online.down": "hadamard",
            "calibration.separator": "\n\n",
            "target": "gguf",
            "quantizer": "gptq:damping=0.05",
        },
    )
    assert recipe.learning is not None
    assert (recipe.learning.steps, recipe.learning.lr, recipe.learning.top_k) == (7, 1.0, 100)
    assert recipe.folded == {"residual": recipes.find("latmix-lu").folded["residual"]}
    assert recipe.online == {"down": "hadamard"}
    assert recipe.calibration.separator == "\n\n"
    assert recipe.target == "gguf"


def test_learning_can_be_switched_on_and_off() -> None:
    assert override(recipes.find("latmix-lu"), {"learning": "none"}).learning is None
    started = override(recipes.find("gptq"), {"learning.steps": "3"}).learning
    assert started is not None and started.steps == 3


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning.stepz", "3", "Unknown recipe key 'learning.stepz': 'stepz' is none of steps, lr"),
        ("stepz", "3", "Unknown recipe key 'stepz': 'stepz' is none of name, weights"),
        ("seed.x", "3", "Unknown recipe key 'seed.x'"),
        ("learning.steps", "many", "Recipe key 'learning.steps' takes int, not 'many'"),
        ("learning.steps", "1.5", "takes int, not 1.5"),
        ("target", "1", "Recipe key 'target' takes str, not 1"),
        ("calibration.windows", "0", "'calibration.windows' is 0; it must be at least 1"),
        ("learning.lr", "NaN", "'learning.lr' takes a number of at most"),
        ("learning.accumulation", "9", "'learning.accumulation' is 9, above learning.batch"),
        ("learning.top_k", "1", "'learning.top_k' is 1; it must be at least 2"),
        ("tuning.damping", "1.5", "'tuning.damping' is 1.5; it must be at most 1"),
        ("folded", "lu", "Recipe key 'folded' takes"),
    ],
)
def test_bad_overrides_name_the_culprit(key: str, value: str, message: str) -> None:
    with pytest.raises(LatmixError, match=message.replace("(", r"\(")):
        override(recipes.find("latmix-lu"), {key: value})


def test_unknown_and_broken_recipes(tmp_path) -> None:
    with pytest.raises(LatmixError, match="Unknown recipe 'latmix'; known: rtn, gptq"):
        recipes.find("latmix")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(LatmixError, match="not JSON"):
        recipes.find(str(tmp_path / "broken.json"))
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(LatmixError, match="takes Recipe"):
        recipes.find(str(tmp_path / "list.json"))
    (tmp_path / "nameless.json").write_text("{}")
    with pytest.raises(LatmixError, match="name"):
        recipes.find(str(tmp_path / "nameless.json"))


def test_digest_follows_content() -> None:
    recipe = recipes.find("latmix-lu")
    assert recipe.digest == recipes.find("latmix-lu").digest
    assert recipe.digest != override(recipe, {"learning.lr": "0.5"}).digest
