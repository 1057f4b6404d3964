"""Prefill in the expanded form: attention of many query tokens, with keys and values per head."""
