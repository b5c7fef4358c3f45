"""Needs what requirements.txt lists; elsewhere these tests are not collected."""

from importlib.util import find_spec

import torch

# On networks this small a second thread mostly waits; test_exact_with_more_threads has them.
torch.set_num_threads(1)

if find_spec("diffusers") is None or find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]
elif find_spec("diffusers.modular_pipelines.cosmos") is None:
    collect_ignore_glob = ["test_diffusers_modular.py"]
