"""Triton page moves for GPUs, beside those in torch, which are their reference."""
