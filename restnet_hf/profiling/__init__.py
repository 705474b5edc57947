"""What routes cost, and what they give."""
