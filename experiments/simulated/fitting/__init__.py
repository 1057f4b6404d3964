"""Fits the constants of the profiles to measured rows."""
