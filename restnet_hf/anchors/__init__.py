"""Anchors: pre-trained classifiers, loaded, cut and run piece by piece."""
