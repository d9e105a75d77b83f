"""Text → windows: the protocol, and texts that are too short, missing or not text."""

from pathlib import Path

import pytest
import torch

from latmix.assets import DEMO_MODEL
from latmix.data import Corpus, calibration_windows, read_text, windows
from latmix.errors import LatmixError
from latmix.model.load import load_tokenizer
from latmix.recipe import Calibration


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_MODEL)


def test_one_document_is_opened_by_bos_once_and_cut_without_overlap(tokenizer) -> None:
    text = "A quiet river. " * 50
    cut = windows(Corpus(text, "memory"), tokenizer, 16, 2048)
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert cut.flatten().tolist() == ids[: len(ids) // 16 * 16]


def test_documents_do_not_share_windows(tokenizer) -> None:
    texts = ["One river. " * 20, "Another river. " * 20, "Short."]
    cut = windows(Corpus("\n--\n".join(texts), "memory", "\n--\n"), tokenizer, 16, 2048)
    alone = [windows(Corpus(text, "memory"), tokenizer, 16, 2048) for text in texts[:2]]
    assert torch.equal(cut, torch.cat(alone))
    assert sum(tokenizer.bos_token_id in row for row in cut.tolist()) == 2


def test_calibration_and_held_out_windows_are_disjoint_and_window_is_capped(tokenizer) -> None:
    text = " ".join(f"Number {i} is followed by {i + 1}." for i in range(2000))
    wish = Calibration(windows=20, held_out=5, window=10_000)
    taught, held_out = calibration_windows(Corpus(text, "memory"), tokenizer, wish, 32, 2048)
    assert taught.shape == (20, 32) and held_out.shape == (5, 32)
    assert not {tuple(row) for row in taught.tolist()} & {tuple(row) for row in held_out.tolist()}


def test_bad_texts_are_named(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(LatmixError, match="cannot be read"):
        read_text(tmp_path / "missing.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(LatmixError, match="not UTF-8"):
        read_text(tmp_path / "binary")
    with pytest.raises(LatmixError, match="cannot be read: embedded null"):
        read_text("a\0b")
    with pytest.raises(LatmixError, match="separator is empty"):
        read_text(tmp_path / "binary", "")
    (tmp_path / "blank").write_text(" \n")
    with pytest.raises(LatmixError, match="is empty"):
        read_text(tmp_path / "blank")
    with pytest.raises(LatmixError, match=r"holds \d+ tokens, less than one window of 64"):
        windows(Corpus("Too short", "x.txt"), tokenizer, 64, 2048)
    with pytest.raises(LatmixError, match=r"token \d+ of the text 'x.txt', its model has 40 tokens"):
        windows(Corpus("word " * 200, "x.txt"), tokenizer, 16, 40)
    with pytest.raises(LatmixError, match=r"holds \d+ windows of 16 tokens and the recipe asks for 256 \+ 16"):
        calibration_windows(Corpus("word " * 200, "x.txt"), tokenizer, Calibration(), 16, 2048)
