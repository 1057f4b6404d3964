"""Microbenchmarks that measure the on-chip constants of a profile on the GPU at hand."""
