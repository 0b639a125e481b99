"""Benchmarks of speed, memory and accuracy for asv; every class takes the parameters of `common.GroupNorm`."""
