"""Stitches and what else of a route can be trained."""
