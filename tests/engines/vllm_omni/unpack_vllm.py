"""Put vLLM's Python files where this interpreter imports from, without its CUDA libraries.

vLLM-Omni imports vLLM, whose wheel holds 650 MB of CUDA code that no CPU test can load. pip
fetches the wheel (315 MB); 48 MB of it are kept.

    python unpack_vllm.py [VERSION FOLDER]
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.30.0"


def main() -> None:
    if sys.argv[1:]:
        version, target = sys.argv[1:]
        unpack(version, target)
        return
    try:
        if importlib.metadata.version("vllm") == VERSION:
            return
    except importlib.metadata.PackageNotFoundError:
        pass
    unpack(VERSION, sysconfig.get_path("purelib"))


def unpack(version: str, target: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run(
            [*pip, "download", "--quiet", "--no-deps", "--dest", folder, f"vllm=={version}"],
            check=True,
        )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            kept = [n for n in archive.namelist() if n.endswith(".py") or ".dist-info/" in n]
            # The metadata last: it is what tells the next run that nothing is left to do.
            kept.sort(key=lambda name: ".dist-info/" in name)
            archive.extractall(target, kept)


if __name__ == "__main__":
    main()
