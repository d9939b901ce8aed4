from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """Recordings of the original system, where they lie beside the repository."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip(f"no recordings of the original system at {folder}")
    return folder
