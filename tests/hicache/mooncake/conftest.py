from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mooncake import Master, master


@pytest.fixture(scope="package")
def shared_master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    """A pool without segments between tests: what a tier has stored goes with it."""
    with master(tmp_path_factory.mktemp("mooncake") / "master") as started:
        yield started


@pytest.fixture
def own_master(tmp_path: Path) -> Iterator[Master]:
    """A master to be killed and stopped."""
    with master(tmp_path / "master") as started:
        yield started
