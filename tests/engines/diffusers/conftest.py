"""Needs what requirements.txt lists; elsewhere these tests are not collected."""

import os
from importlib.util import find_spec

# Before torch starts its threads: waiting ones would otherwise spin, which on a busy machine
# costs more than these small networks do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if find_spec("diffusers") is None or find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]
