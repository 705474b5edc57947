"""The best route for a device, found on the device."""
