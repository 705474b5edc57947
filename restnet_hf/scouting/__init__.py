"""Which two of many classifiers to stitch, from one pass of each over the same images."""
