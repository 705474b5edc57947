"""Routes, profiles and budgets. No module of this room needs torch."""
