"""The benchmark program's parts; tools/bench.py starts it."""
