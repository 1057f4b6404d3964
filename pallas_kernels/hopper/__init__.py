"""Absorbed MLA decode in Pallas Mosaic GPU, for NVIDIA GPUs of compute capability 9.0."""
