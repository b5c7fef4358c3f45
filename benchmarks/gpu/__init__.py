"""Everything that is claimed about a GPU: `python -m benchmarks.gpu.campaign`."""
