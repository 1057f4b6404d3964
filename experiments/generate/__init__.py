"""A whole model of the DeepSeek-V2 and V3 family in plain JAX, and an engine that serves it."""
