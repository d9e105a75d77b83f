"""`latmix export` and `latmix verify` as they are typed."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from latmix.cli import app
from latmix.errors import UnavailableError
from latmix.export import fingerprint
from tests.exported import Runs
from tests.test_export import WITH_COMPRESSED_TENSORS


def typed(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_three_lines_continue_as_verified(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = typed("export", runs("latmix-lu"), "--to", "transformers", "--out", "served")
    assert said.exit_code == 0 and "agrees" in said.output, said.output
    lines = said.output.partition("Serve it with:\n\n")[2].partition("\n\nNeeds")[0]
    room: dict[str, object] = {}
    exec(lines, room)  # noqa: S102
    kept = fingerprint.read(Path("served"))
    model, tokenizer = room["model"], room["tokenizer"]
    torch.nn.Module.float(model)  # as verified; transformers forbids its own `float` here
    ids, wish = torch.tensor([kept.request["prompt"]]), {"min_new_tokens": 24, "max_new_tokens": 24, "do_sample": False}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **wish)
    assert found[0, ids.shape[1] :].tolist() == kept.tensors["greedy"].tolist()
    assert tokenizer(kept.request["text"])["input_ids"] == kept.tensors["tokens"].tolist()


def test_an_online_transform_is_said_to_be_for_vllm_alone(runs: Runs, tmp_path: Path) -> None:
    said = typed("export", runs("quarot"), "--out", tmp_path / "served")
    assert said.exit_code == 0, said.output
    words = " ".join(said.output.split())
    assert "Not verified in vllm, which is not installed here. Run: latmix verify" in words
    assert f"vllm serve {tmp_path / 'served'}" in words and "Do not load this with transformers" in words


@WITH_COMPRESSED_TENSORS
def test_what_transformers_can_load_too_is_verified_there(runs: Runs, tmp_path: Path) -> None:
    said = typed("export", runs("gptq"), "--out", tmp_path / "served")
    assert said.exit_code == 0 and "agrees" in said.output and "Not verified in vllm" in said.output, said.output
    assert json.loads((tmp_path / "served" / "verdict.json").read_text()).keys() == {"transformers"}
    again = typed("verify", tmp_path / "served").exception  # the first engine, vLLM
    assert isinstance(again, UnavailableError) and "'vllm' cannot load" in str(again) and "--python" in str(again)
