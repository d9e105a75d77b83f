"""What an analysis measures: errors by hand, the closed form against its theorem, places, and a whole study."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import latmix
from latmix.analysis.amplitudes import amplitudes
from latmix.analysis.candidates import CANDIDATES, ORTHOGONAL
from latmix.analysis.optimum import closed_form
from latmix.analysis.plots import FIGURES, plot, read_csv
from latmix.analysis.study import Question, analyze
from latmix.archs import ARCHS
from latmix.eval.activations import Place, collect, places
from latmix.eval.errors import block_errors, error
from latmix.model.load import load
from latmix.numerics import fake_quant, parse_format
from latmix.transforms import Affine, Hadamard, Rotation, Transform, initial_matrix
from tests.models import perturb
from tests.test_pipeline import save_tiny
from tests.texts import CALIBRATION

FMT = parse_format("mxfp4:scale=even")


def coloured(tokens: int, n: int, decay: float = 1.0, seed: int = 0) -> Tensor:
    """Gaussian with spectrum i^-decay in a random basis, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, n + 1, dtype=torch.float64) ** (-decay / 2)
    basis = initial_matrix("random-rotation", n, seed=seed)
    x = torch.randn(tokens, n, dtype=torch.float64, generator=generator) * scales @ basis.T
    return (x + 0.2 * torch.randn(n, dtype=torch.float64, generator=generator)).float()


def test_error_is_the_mean_over_blocks_in_the_original_basis() -> None:
    x = coloured(300, 80)
    map = Affine(Rotation(initial_matrix("random-rotation", 80)).float())
    perturb(map, 0.3)
    back = map.inverse(fake_quant(map(x), FMT)).detach()
    squares = (back - x).double().square().mean(0)
    by_hand = [squares[:32].mean(), squares[32:64].mean(), squares[64:].mean()]  # the last block has 16
    torch.testing.assert_close(block_errors(map, x, FMT), torch.stack(by_hand), rtol=1e-3, atol=0)
    assert error(map, x, FMT) == pytest.approx(float(squares.mean()), rel=1e-3)
    assert error(None, x, FMT) == pytest.approx(float((fake_quant(x, FMT) - x).double().square().mean()))


def white_loss(a: Tensor, x: Tensor) -> float:
    """tr(A⁻¹A⁻ᵀ) tr(A C Aᵀ) / d², relative to a rotation's E‖x‖²/d."""
    covariance = torch.cov(x.T.double(), correction=0)
    inverse = torch.linalg.inv(a)
    loss = (inverse @ inverse.T).trace() * (a @ covariance @ a.T).trace() / len(a) ** 2
    return float(loss / x.double().square().mean())


def test_the_closed_form_reaches_its_promise_and_nothing_beats_it() -> None:
    x = coloured(4000, 32)
    found = closed_form(x)
    a = found.map.matrix().detach().double()
    assert white_loss(a, x) == pytest.approx(found.ratio, rel=1e-4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        nearby = a + 0.05 * torch.randn(a.shape, dtype=torch.float64, generator=generator)
        assert white_loss(nearby, x) > found.ratio
    torch.testing.assert_close(found.map(x).mean(0), torch.zeros(32), rtol=0, atol=1e-4)


def test_the_promise_comes_true_on_gaussians() -> None:
    """On a steep spectrum the measured error falls as predicted, to a few per cent, and below every rotation."""
    taught, held_out = coloured(8000, 64, 1.5)[:4000], coloured(8000, 64, 1.5)[4000:]
    found = closed_form(taught)
    rotated = error(Hadamard(64, signs_seed=0), held_out, FMT)
    assert error(found.map, held_out, FMT) / rotated == pytest.approx(found.ratio, rel=0.1)


def test_what_a_map_does_to_norms() -> None:
    x = coloured(500, 64)
    rotation: Transform = Rotation(initial_matrix("random-rotation", 64)).float()
    assert amplitudes(rotation, x, FMT).rms_variation == pytest.approx(0, abs=1e-5)
    affine = closed_form(x).map
    found = amplitudes(affine, x, FMT)
    gain = affine.linear(x).detach().norm(dim=-1) / x.norm(dim=-1)
    assert found.rms_variation == pytest.approx(float(gain.std() / gain.mean()), rel=1e-2)
    assert found.condition > 1 and 0.98 < sum(found.histogram) <= 1


def test_places_and_their_activations(tmp_path: Path) -> None:
    llama = ARCHS["llama"]
    assert [str(place) for place in places(llama, 2, "residual")] == ["qkv/0", "gate_up/0", "qkv/1", "gate_up/1"]
    assert [str(place) for place in places(llama, 2, "values/1")] == ["o/1"]
    for word, message in (("stream", "known: residual, values, .*qkv"), ("down/2", "layers 0 to 1")):
        with pytest.raises(latmix.LatmixError, match=message):
            places(llama, 2, word)
    loaded = load(save_tiny(tmp_path / "model"))
    ids = torch.arange(40).view(2, 20)
    seen = collect(loaded, ids, tokens=30, seed=0)
    assert {tuple(x.shape) for x in seen.values()} == {(30, 64), (30, 96)}
    everything = collect(loaded, ids, tokens=1000, seed=0)[Place("qkv", 0)]
    norm = loaded.model.get_submodule("model.layers.0.input_layernorm")
    embedded = loaded.model.get_submodule("model.embed_tokens")(ids)
    torch.testing.assert_close(everything, norm(embedded).flatten(0, 1))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latmix.analysis.candidates.STEPS", 30)


def test_a_whole_study(tmp_path: Path, hurried: None) -> None:
    question = Question(CALIBRATION, blocks=(8, 16), window=32, windows=8)
    folder = analyze(save_tiny(tmp_path / "model"), tmp_path / "out", question)
    errors = read_csv(folder / "errors.csv")
    assert {row["block"] for row in errors} == {"8", "16", "32"}
    assert {row["map"] for row in errors} == set(CANDIDATES)
    for row in errors:
        assert 0 < float(row["error"]) < min(float(row["simple"]), float(row["two_terms"]))
    best = [row for row in errors if row["map"] in ORTHOGONAL and float(row["of_best_orthogonal"]) == 1]
    assert len(best) == 3  # one at every block size
    mean = [float(row["error"]) for row in read_csv(folder / "blocks.csv") if row["map"] == "none"]
    whole = next(float(row["error"]) for row in errors if row["map"] == "none" and row["block"] == "32")
    assert sum(mean) / len(mean) == pytest.approx(whole, rel=1e-4)
    perplexity = {(row["block"], row["map"]): float(row["perplexity"]) for row in read_csv(folder / "perplexity.csv")}
    assert len(perplexity) == 1 + 3 * len(CANDIDATES.names())
    assert len(read_csv(folder / "places.csv")) == 8
    pytest.importorskip("matplotlib", reason="the extra 'plots' is not installed")
    files = plot(folder)
    assert {file.name for file in files} == {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    assert all(file.stat().st_size > 5000 for file in files)


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    with pytest.raises(latmix.LatmixError, match="Unknown site or input 'stream'"):
        analyze(model, tmp_path / "out", Question(CALIBRATION, site="stream"))
    with pytest.raises(latmix.LatmixError, match="'values/9' names no layer"):
        analyze(model, tmp_path / "out", Question(CALIBRATION, site="values/9"))
    assert not (tmp_path / "out").exists()
