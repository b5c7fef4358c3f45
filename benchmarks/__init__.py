"""What the package claims about speed and memory, measured: `python -m benchmarks.run`."""
