"""What is measured: a scenario a file, named in :mod:`bench.harness.registry`."""
