import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # small_models, serving
import serving
import small_models

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "NUMBA_NUM_THREADS": "1"}


def pytest_collection_modifyitems(items):
    """Speculation last: no engine starts in this process after it (see its fixture)."""
    items.sort(key=lambda item: item.path.name == "test_speculation.py")


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return small_models.write(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def engines():
    """Engines by what they were asked for, alive to the end: one that is collected takes the process group along."""
    made = {}

    def get(folder, **options):
        key = repr((str(folder), sorted(options.items())))
        if key not in made:
            made[key] = serving.engine(folder, **options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield get
        made.clear()


@pytest.fixture(scope="session")
def stock(engines, llama):
    return engines(llama)


@pytest.fixture(scope="session")
def lossless(engines, llama):
    return engines(llama, kv_cache_dtype="kvarn_k16v16")


@pytest.fixture(scope="session")
def smooth(tmp_path_factory):
    """A model whose output follows small changes of its cache by small changes."""
    return small_models.write(tmp_path_factory.mktemp("smooth"), attention=0.5)
