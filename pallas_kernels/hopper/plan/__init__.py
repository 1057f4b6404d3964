"""The decode plan, made in one Mosaic GPU kernel."""
