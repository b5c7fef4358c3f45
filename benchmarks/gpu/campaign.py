"""Everything that is claimed about a GPU, in commands that know how much time there is.

    python -m benchmarks.gpu.campaign claims   under 8 minutes: tests, figures, clips, memcheck
    python -m benchmarks.gpu.campaign mends    under 4: clips, their kernel, tests, after a change
    python -m benchmarks.gpu.campaign rest     under 25: all tests, other sizes, first calls, seam

Each writes a JSON file of its own, `--out`, rewritten after each step, so that nothing is lost
where time ends; what counts most comes first. A command builds the library first, where it is not
up to date, or with --built takes the one that lies there.

On a bare machine: torch with CUDA, nvcc, ninja and pybind11; Triton, pytest, hypothesis,
compute-sanitizer and Pillow for the steps that name them; no network. The 3-D VAE that the
networks are compared with comes from diffusers, and fastvae 0.1.0 is the other fast decoder:
installed, or in a folder of wheels with --wheels. What cannot run is named in the file, with the
reason.

Each step is a process of its own with a time limit. With --dry-run, everything that a CPU can run
is run there at tiny sizes, and nothing is measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from datetime import datetime, timezone
from importlib import util
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, commit, machine

BUDGETS = {"claims": 460, "mends": 220, "rest": 1500}  # in seconds
DRY_RUN_NOTE = "dry run on a CPU at tiny sizes: nothing here is a figure about a GPU"


def write_json(path: Path, content: Any) -> None:
    """Replace a file as a whole: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def without_numbers(value: Any) -> Any:
    """The same with a word in place of each number, for files that must not look measured."""
    if isinstance(value, dict):
        return {key: without_numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_numbers(each) for each in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "not measured: dry run"
    return value


def commands() -> dict[str, dict[str, Any]]:
    """The steps of each command, in their order."""
    from benchmarks.gpu import checks, clips, figures, networks
    from benchmarks.gpu.device import Step

    tests = {"gpu_tests": checks.SELECTED_TESTS}
    transforms = {"transforms": Step(clips.transforms, 45)}
    memcheck, *others = (
        {f"sanitizer_{tool}": checks.sanitizer(tool, 60, *checks.NEW_KERNELS)}
        for tool in checks.TOOLS
    )
    claims = {
        **tests,
        **figures.CEILINGS,
        "weights": Step(clips.weights, 60),
        **figures.FRAMES,
        "clips_decode_480x832": clips.USUAL,
        **transforms,
        "clips_17": networks.clip_step(17),
        "numerics": Step(clips.numerics, 60),
        **memcheck,
        "clips_decode_720x1280": clips.LARGE,
        **others[0],
        **others[1],
    }
    mends = {
        **figures.CEILINGS,
        "weights": Step(functools.partial(clips.weights, forms=clips.FORMS[:1]), 40),
        "clips_decode_480x832_again": clips.AGAIN,
        **transforms,
        "encoder_480x832": figures.FRAMES["encoder_480x832"],
        **tests,
    }
    sanitizers = {f"sanitizer_{tool}": checks.sanitizer(tool, 150) for tool in checks.TOOLS}
    rest = {**checks.STEPS, **figures.CEILINGS, **figures.REST, **sanitizers}
    steps = {"claims": claims, "mends": mends, "rest": rest}
    return {command: {**checks.FIRST, **each} for command, each in steps.items()}


def merge(into: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def run_step(
    step: Any,
    result_file: Path,
    dry_run: bool,
    cache: Path,
    earlier: dict[str, Any],
    built: bool = False,
) -> int:
    """Run one step in this process, writing its result so far after each part."""
    import torch

    from benchmarks.gpu.device import Context, Skipped

    outcome: dict[str, Any] = {"status": "running", "result": {}}
    context = Context(dry_run, result_file.parent, cache, earlier, built)

    def write() -> None:
        kept = without_numbers(outcome["result"]) if dry_run else outcome["result"]
        write_json(result_file, {**outcome, "result": kept})

    try:
        with torch.no_grad():
            for part in step.run(context):
                merge(outcome["result"], part)
                write()
        outcome["status"] = "done"
    except Skipped as reason:
        outcome.update(status="skipped", reason=str(reason))
    except (Exception, SystemExit) as error:
        outcome.update(status="failed", reason=f"{type(error).__name__}: {error}")
    write()
    return 0


def run_step_in_child(
    name: str, limit_s: float, scratch: Path, options: argparse.Namespace, earlier: dict[str, Any]
) -> dict[str, Any]:
    """One step under its time limit. Its whole process group ends with it."""
    result_file, earlier_file = scratch / f"{name}.json", scratch / "earlier.json"
    write_json(earlier_file, earlier)
    command = [sys.executable, "-m", "benchmarks.gpu.campaign", options.command, "--step", name]
    command += ["--out", str(result_file), "--earlier", str(earlier_file)]
    command += ["--cache", str(options.cache)]
    command += ["--dry-run"] if options.dry_run else []
    command += ["--built"] if options.built else []
    search = [str(ROOT), os.environ.get("PYTHONPATH", ""), str(scratch / "wheels")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}
    log = scratch / f"{name}.log"
    with log.open("w") as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        problem = None
        try:
            if status := child.wait(limit_s):
                problem = f"the step's process ended with status {status}"
        except subprocess.TimeoutExpired:
            problem = f"stopped at its time limit of {limit_s:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    outcome = json.loads(result_file.read_text()) if result_file.exists() else {"result": {}}
    if problem is not None:
        tail = log.read_text(errors="replace")[-2000:]
        outcome.update(status="failed", reason=f"{problem}; last output: {tail}")
    return outcome


def unpack_wheels(folder: Path, into: Path) -> list[str]:
    """Unpack the wheels of packages that this Python does not have; nothing is installed."""
    unpacked = []
    for wheel in sorted(folder.glob("*.whl")):
        package = wheel.name.split("-")[0]
        with zipfile.ZipFile(wheel) as archive:
            tops = {name.split("/")[0] for name in archive.namelist() if name.endswith(".py")}
            modules = {top.removesuffix(".py") for top in tops}
            if not any(util.find_spec(module) for module in modules if module.isidentifier()):
                archive.extractall(into)
                unpacked.append(package)
    return unpacked


def campaign(options: argparse.Namespace) -> int:
    import torch

    began = time.monotonic()
    if not options.dry_run and not torch.cuda.is_available():
        print("error: torch sees no CUDA device; --dry-run needs none", file=sys.stderr)
        return 2
    steps = commands()[options.command]
    budget = BUDGETS[options.command] if options.budget is None else options.budget
    out = options.out or ROOT / "out" / f"gpu_{options.command}.json"
    wanted = options.steps.split(",") if options.steps else list(steps)
    if unknown := sorted(set(wanted) - set(steps)):
        print(f"error: no such step: {', '.join(unknown)}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "command": options.command,
        "dry_run": options.dry_run,
        "note": DRY_RUN_NOTE if options.dry_run else None,
        "commit": options.commit or commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "steps": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if options.wheels is not None:
            report["wheels"] = unpack_wheels(options.wheels, scratch / "wheels")
        for name, step in steps.items():
            left = budget - (time.monotonic() - began)
            if name not in wanted:
                outcome: dict[str, Any] = {"status": "skipped", "reason": "not asked for"}
            elif options.dry_run and step.gpu_only:
                outcome = {"status": "skipped", "reason": "dry run: needs a CUDA device"}
            elif left < min(step.limit_s, 10):
                outcome = {
                    "status": "skipped",
                    "reason": f"the command's {budget:.0f} s were over",
                }
            else:
                earlier = {each: done.get("result", {}) for each, done in report["steps"].items()}
                # The limits are those of a GPU machine; a CPU may be slow or shared.
                limit = left if options.dry_run else min(step.limit_s, left)
                start = time.monotonic()
                outcome = run_step_in_child(name, limit, scratch, options, earlier)
                if not options.dry_run:
                    outcome["seconds"] = round(time.monotonic() - start, 1)
            report["steps"][name] = outcome
            write_json(out, report)
            reason = f": {outcome['reason']}" if outcome.get("reason") else ""
            print(f"{name:<22} {outcome['status']}{reason}"[:300], file=sys.stderr)
    failed = [name for name, done in report["steps"].items() if done["status"] == "failed"]
    print(f"wrote {out}; {len(failed)} steps failed", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=BUDGETS, nargs="?")
    parser.add_argument("--out", type=Path, help="the file (default out/gpu_<command>.json)")
    limits = ", ".join(f"{command} {seconds}" for command, seconds in BUDGETS.items())
    parser.add_argument("--budget", type=float, help=f"seconds for all (default {limits})")
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / "out" / "gpu_cache",
        help="folder of the random VAE's weights, which are made once",
    )
    parser.add_argument("--steps", help="run only these, separated by commas")
    parser.add_argument("--wheels", type=Path, help="folder of wheels: diffusers, fastvae")
    parser.add_argument("--built", action="store_true", help="take the library that lies there")
    parser.add_argument("--commit", help="what to call the sources where there is no repository")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, measuring nothing")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--earlier", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cold", choices=("fast", "graph", "engine"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step is not None:
        earlier = json.loads(options.earlier.read_text())
        step = commands()[options.command][options.step]
        context = options.dry_run, options.cache, earlier, options.built
        return run_step(step, options.out, *context)
    if options.cold is not None:
        import torch

        from benchmarks.gpu.device import Context
        from benchmarks.gpu.stages import cold

        with torch.no_grad():
            context = Context(options.dry_run, Path(), options.cache, {})
            print(json.dumps(cold(context, options.cold)))
        return 0
    if options.command is None:
        parser.error(f"command must be one of {', '.join(BUDGETS)}")
    return campaign(options)


if __name__ == "__main__":
    sys.exit(main())
