"""What scenarios are built from: engines, fair pairs, results and their report."""
