"""Before anything imports latmix: its shape annotations are executed, and OpenMP waits without spinning."""

import os
from pathlib import Path

import hypothesis
import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported
hypothesis.settings.register_profile("campaign", max_examples=10_000, deadline=None)  # --hypothesis-profile=campaign
install_import_hook("latmix", "beartype.beartype")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data beside the repository, which a fresh clone does not have."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engines", type=Path, metavar="FOLDER", help="what scripts/engines.sh made: runs those tests")


@pytest.fixture(scope="session")
def engines(request: pytest.FixtureRequest) -> Path:
    """The folder of the engines' environments."""
    folder: Path | None = request.config.getoption("--engines")
    if folder is None:
        pytest.skip("no --engines FOLDER (scripts/engines.sh FOLDER makes it)")
    return folder.absolute()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> object:
    """`tests.exported.Runs`, which imports latmix and so has to wait for the hook above."""
    from tests.exported import Runs

    return Runs(tmp_path_factory.mktemp("runs"))
