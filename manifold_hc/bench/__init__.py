"""Benchmarks: speed and memory of mHC, against other implementations of it."""
