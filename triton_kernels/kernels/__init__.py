"""The code that runs on the device."""
