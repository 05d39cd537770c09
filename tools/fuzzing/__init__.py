"""Fuzzers that are guided by coverage: of the codec, and of a daemon by whole conversations."""
