"""The kernels: code that runs on the device, and the host's arithmetic that must agree with it."""
