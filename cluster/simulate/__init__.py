"""The service without its machines: see `python -m cluster.simulate --help`."""
