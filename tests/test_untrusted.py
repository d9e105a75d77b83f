"""A checkpoint from a stranger: its code is not run, its sizes are not believed, its paths stay in its folder."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from latmix.errors import DamagedError, InputError, LatmixError
from latmix.model.load import load, load_tokenizer
from tests.test_pipeline import save_tiny

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", **SMALL)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_code_in_a_checkpoint_is_not_run(model: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: ...\n")
    change(model / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    load(model)
    change(
        model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil"
    )
    with pytest.raises(DamagedError, match="No tokenizer could be loaded"):
        load(model)
    assert not ran.exists()


def test_pickles_are_not_read(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(DamagedError, match=r"'model.safetensors' is missing \(safetensors only\)"):
        load(model)


def test_a_tokenizer_stays_in_its_folder(model: Path) -> None:
    (model / "tokenizer.json").rename(model.parent / "tokenizer.4.0.0.json")
    change(model / "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.0.json"])
    with pytest.raises(DamagedError, match="names '../tokenizer.4.0.0.json', which is no file of the folder"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 10**9, "says hidden_size is 1000000000; a whole number from 1 to"),
        ("num_hidden_layers", 10**9, "says num_hidden_layers is 1000000000"),
        ("num_hidden_layers", 4000, "lacks the tensors of 'model.layers.3999'"),
        ("vocab_size", -1, "says vocab_size is -1"),
        ("intermediate_size", "96", "says intermediate_size is '96'"),
        ("num_attention_heads", 2.5, "says num_attention_heads is 2.5"),
        ("head_dim", float("nan"), "says head_dim is nan"),
        ("num_key_value_heads", 3, "4 heads share 3 keys"),
        ("vocab_size", 10**6, "its config says"),
        ("attn_implementation", "someone/kernel", "says attn_implementation is 'someone/kernel'"),
        ("rope_parameters", {"rope_type": "unheard-of"}, "makes no model: .*unheard-of"),
        ("dtype", "float3", "makes no model: .*float3"),
    ],
)
def test_sizes_are_checked_before_anything_is_built(key: str, value: Any, message: str, model: Path) -> None:
    change(model / "config.json", **{key: value})
    with pytest.raises(LatmixError, match=message):
        load(model)


def test_an_attention_from_a_hub_is_an_input_error(model: Path) -> None:
    change(model / "config.json", _attn_implementation="someone/kernel")
    with pytest.raises(InputError, match="latmix runs eager or sdpa"):
        load(model)
