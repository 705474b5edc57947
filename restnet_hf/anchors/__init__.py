"""Anchors: pre-trained classifiers, loaded, cut and run in segments."""
