"""Training of stitches."""
