"""Stitches, and the other parts of a route that can be trained."""
