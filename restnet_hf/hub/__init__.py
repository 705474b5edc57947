"""Adapters as files, on disk and on the Hub. Cards and repositories need no torch."""
