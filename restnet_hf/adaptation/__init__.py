"""Adaptation of a model to a device, on the device."""
