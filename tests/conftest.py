"""Every test: calls are checked against their annotated types and shapes, and nothing reaches the network."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads leave the cores to others
install_import_hook(["danet_core", "danet_study"], "typechecks.check")

# No test asserts a duration, so none fails on a loaded machine; a commit passes or fails always, having the same
# examples each time. `--hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile("study", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("study")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the pipeline, the longest file; skip tests marked `gpu`, with the reason, without a CUDA device."""
    items.sort(key=lambda item: item.path.stem != "test_pipeline")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(autouse=True, scope="session")
def offline() -> Iterator[None]:
    """Refuse connections to other machines."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        is_internet = self.family in (socket.AF_INET, socket.AF_INET6)
        if is_internet and address[0] not in ("localhost", "::1", "") and not str(address[0]).startswith("127."):
            raise OSError(f"a test tried to reach {address[0]}; tests work offline")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield
