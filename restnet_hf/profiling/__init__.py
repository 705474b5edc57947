"""Costs and accuracy of routes."""
