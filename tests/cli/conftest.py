from pathlib import Path

import pytest
import torch
from tiny_model import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()
