"""Run an engine's tests on its other releases: `python releases.py sglang [0.5.21]`.

The release, and what it needs otherwise than the newest one, is put into a folder of its own before
the packages of the engine's environment, whose Python has to run this. Nothing is installed there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from cosmos3_fast.engines.releases import TESTED, installed

ROOT = Path(__file__).parents[2]
HTTPX = ["httpx==0.28.1", "httpcore==1.0.9", "h11==0.16.0", "anyio==4.15.0"]
IMAGEIO = ["cloudpickle==3.1.3", "imageio-ffmpeg==0.6.0"]
# The first releases of SGLang import their server with everything else.
SERVER = [
    *HTTPX,
    *IMAGEIO,
    "cache-dit==1.3.0",
    "fastapi==0.165.0",
    "opentelemetry-api==1.45.2",
    "python-multipart==0.0.34",
    "scipy==1.17.1",
    "setproctitle==1.3.8",
    "uvicorn==0.54.0",
    "xgrammar==0.2.1",
]
OTHER_REQUIREMENTS: dict[tuple[str, str], list[str]] = {
    ("diffusers", "0.39.0"): HTTPX,
    ("diffusers", "0.40.0"): HTTPX,
    ("sglang", "0.5.19"): [
        *SERVER,
        "huggingface-hub==1.33.0",
        "tokenizers==0.22.2",
        "transformers==5.12.1",
    ],
    ("sglang", "0.5.20"): SERVER,
    ("sglang", "0.5.21"): [*IMAGEIO, "scipy==1.17.1"],
    ("sglang", "0.5.22"): IMAGEIO,
    ("vllm-omni", "0.22.0"): ["diffusers==0.38.0", "gguf==0.19.0"],
    ("vllm-omni", "0.24.0"): ["diffusers==0.38.0"],
    ("vllm-omni", "0.26.0"): ["diffusers==0.38.0"],
}
"""What a release requires and its engine's environment has not, or otherwise."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=list(TESTED))
    parser.add_argument("release", nargs="?", help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="only some, on two of them")
    args, pytest_arguments = parser.parse_known_args()
    others = [each for each in TESTED[args.engine] if each != installed(args.engine)]
    releases = [args.release] if args.release else others
    if args.quick:
        releases = sorted({releases[0], releases[-1]}, key=releases.index)
        pytest_arguments += ["-m", "not slow"]
    failed = [each for each in releases if not run_tests(args.engine, each, pytest_arguments)]
    print(f"{args.engine}: {len(releases) - len(failed)} of {len(releases)} releases passed")
    return len(failed)


def run_tests(engine: str, release: str, pytest_arguments: list[str]) -> bool:
    site = ROOT / "build" / "releases" / f"{engine}-{release}"
    if not site.is_dir():
        install(engine, release, site)
    print(f"{engine} {release}", flush=True)
    # Not `python -m pytest`, which would import the working tree instead of the installed package.
    pytest = str(Path(sys.executable).with_name("pytest"))
    tests = f"tests/engines/{engine.replace('-', '_')}"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return not subprocess.run(
        [pytest, tests, *pytest_arguments], cwd=ROOT, env=environment, check=False
    ).returncode


def install(engine: str, release: str, site: Path) -> None:
    """Put the release into `site`, whole or not at all."""
    partial = site.with_name(site.name + ".partial")
    wanted = [f"{engine}=={release}", *OTHER_REQUIREMENTS.get((engine, release), [])]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    command = [*pip, "--no-deps", "--upgrade", "--target", str(partial), *wanted]
    subprocess.run(command, check=True)
    if engine == "vllm-omni":
        unpack = ROOT / "tests" / "engines" / "vllm_omni" / "unpack_vllm.py"
        vllm = release.split("rc", maxsplit=1)[0]
        subprocess.run([sys.executable, str(unpack), vllm, str(partial)], check=True)
    partial.rename(site)


if __name__ == "__main__":
    sys.exit(main())
