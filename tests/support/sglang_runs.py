"""SGLang whole, with its workers: `python sglang_runs.py FOLDER` does what FOLDER/runs.json says.

Each run is a `DiffGenerator` with an environment and arguments of its own, and makes the same
requests. FOLDER/<run>.npz holds the frames of each, or FOLDER/<run>/<request>.mp4 those that are
saved, FOLDER/<run>.json what `counted` gives.

`register` is a plugin for SGLang: it counts what the VAE's own modules compute in a worker.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

CALLS = "COSMOS3_FAST_TEST_CALLS"
"""Names the file of a line for each call of the VAE's own encoder or decoder."""
VAES = "sglang.multimodal_gen.runtime.models.vaes.wanvae"


def register() -> None:
    """Not by a hook: a VAE with one is not folded."""
    import importlib

    import cosmos3_fast
    from cosmos3_fast.vae.live.patch import ATTRIBUTE

    calls = Path(os.environ[CALLS])
    write_line(calls, {"package": cosmos3_fast.__file__})
    module = importlib.import_module(VAES)
    for part, cls in (("encoder", module.WanEncoder3d), ("decoder", module.WanDecoder3d)):
        own = cls.forward

        def forward(
            self: Any, x: Any, *args: Any, own: Any = own, part: str = part, **kw: Any
        ) -> Any:
            write_line(calls, {"part": part, "frames": x.shape[2], "size": list(x.shape[3:])})
            return own(self, x, *args, **kw)

        # A look at the VAE sees through it to the class's own.
        functools.update_wrapper(forward, own)
        setattr(forward, ATTRIBUTE, True)
        cls.forward = forward


def write_line(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def counted(calls: Path, pixels: int) -> dict[str, Any]:
    """Frames through the VAE's own encoder (pixel frames) and decoder (latent frames) since the
    last time, and where the worker has this package from.

    Args:
        calls: the file that `CALLS` names; it is emptied.
        pixels: height of the requests; what has another is a probe of the folded networks.
    """
    found: dict[str, Any] = {"encoder": 0, "decoder": 0}
    for line in calls.read_text().splitlines():
        entry = json.loads(line)
        if "package" in entry:
            found["package"] = entry["package"]
        # The encoder takes patches of two pixels, the decoder cells of sixteen.
        elif entry["size"][0] == pixels // {"encoder": 2, "decoder": 16}[entry["part"]]:
            found[entry["part"]] += entry["frames"]
    calls.write_text("")
    return found


def main() -> None:
    import numpy as np
    from sglang.multimodal_gen import DiffGenerator

    folder = Path(sys.argv[1])
    calls = Path(os.environ[CALLS])
    told = json.loads((folder / "runs.json").read_text())
    before = dict(os.environ)
    for name, run in told["runs"].items():
        os.environ.clear()
        os.environ.update(before, **run["environment"])
        calls.write_text("")
        frames, counts = {}, {}
        with DiffGenerator.from_pretrained(
            model_path=told["model"], num_gpus=1, local_mode=True, **run["arguments"]
        ) as generator:
            for request, wanted in told["requests"].items():
                arguments = dict(wanted)
                if arguments["save_output"]:
                    files = {
                        "output_path": str(folder / name),
                        "output_file_name": f"{request}.mp4",
                    }
                    arguments |= files
                result = generator.generate(sampling_params_kwargs=arguments)
                if result.frames is not None:
                    frames[request] = np.asarray(result.frames)
                counts[request] = counted(calls, arguments["height"])
        np.savez(folder / f"{name}.npz", **frames)
        (folder / f"{name}.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main()
