"""Rows of published tables, and the models that predict them."""
