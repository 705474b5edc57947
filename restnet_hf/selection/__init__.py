"""Where to join two anchors."""
