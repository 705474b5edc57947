"""Choice of the cuts at which to join two anchors."""
