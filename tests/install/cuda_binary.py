"""What nvcc made of the CUDA kernels: resources, global accesses, launches. No GPU needed.

As a script: prints each kernel's registers, stack and shared memory per architecture for the
library given (default: the installed one), and fails if a kernel spills.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    architecture: str
    name: str
    registers: int
    stack: int
    shared: int
    sass: str


@cache
def _tool(name: str) -> str | None:
    """From the CUDA toolkit, or from inside Triton, which ships it."""
    if found := shutil.which(name):
        return found
    try:
        import triton
    except ImportError:
        return None
    inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(inside) if inside.exists() else None


def tools_error() -> str | None:
    return None if _tool("cuobjdump") else "neither the CUDA toolkit nor Triton gives cuobjdump"


def installed_library() -> Path | None:
    import cosmos3_fast

    return next(iter(sorted(Path(cosmos3_fast.__file__).parent.glob("_C*.so"))), None)


def _dump(option: str, library: Path) -> str:
    tool = _tool("cuobjdump")
    assert tool is not None
    return subprocess.run(
        [tool, option, library], capture_output=True, text=True, check=True
    ).stdout


def _short(mangled: str) -> str:
    """`blend_kernel<__half>` of a mangled name."""
    name = re.search(r"\d+([a-z][a-z_]*_kernel)", mangled)
    types = {"If": "float", "Id": "double", "IN3c108BFloat16E": "bf16", "IN3c104HalfE": "half"}
    suffix = next((t for code, t in types.items() if f"_kernel{code}" in mangled), "")
    return f"{name.group(1) if name else mangled}<{suffix}>"


def _declared(shared: int, architecture: str) -> int:
    """Without the kilobyte that CUDA reserves of each block's, which is reported from sm_90 on."""
    reserved = 1024 if shared and int(re.sub(r"\D", "", architecture)) >= 90 else 0
    return shared - reserved


def kernels(library: Path) -> list[Kernel]:
    """Every kernel in `library`, once per architecture; empty if it was built without CUDA."""
    usage: dict[tuple[str, str], dict[str, int]] = {}
    architecture = function = ""
    for line in _dump("-res-usage", library).splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\s*Function (\S+):", line):
            function = match.group(1)
        elif "REG:" in line:
            numbers = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
            usage[architecture, function] = numbers
    sass: dict[tuple[str, str], list[str]] = {}
    for line in _dump("-sass", library).splitlines():
        if match := re.match(r"\s*arch = (sm_\w+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\s*Function : (\S+)", line):
            function = match.group(1)
        else:
            sass.setdefault((architecture, function), []).append(line)
    return [
        Kernel(
            architecture,
            _short(function),
            numbers["REG"],
            numbers["STACK"] + numbers.get("LOCAL", 0),
            _declared(numbers["SHARED"], architecture),
            "\n".join(sass.get((architecture, function), [])),
        )
        for (architecture, function), numbers in usage.items()
    ]


def main() -> int:
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else installed_library()
    found = kernels(library) if library and tools_error() is None else []
    if not found:
        print("no CUDA kernels to inspect:", tools_error() or f"{library} has none")
        return 0
    print(f"{'kernel':<40} {'arch':<8} {'registers':>9} {'stack':>6} {'shared':>7}")
    for kernel in sorted(found, key=lambda k: (k.name, k.architecture)):
        print(
            f"{kernel.name:<40} {kernel.architecture:<8} {kernel.registers:>9} "
            f"{kernel.stack:>6} {kernel.shared:>7}"
        )
    spilling = [k for k in found if k.stack]
    for kernel in spilling:
        print(f"spills: {kernel.name} on {kernel.architecture} uses {kernel.stack} bytes of stack")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
