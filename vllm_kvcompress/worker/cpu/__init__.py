"""Compiled page moves for the CPU, beside those in torch, which are their reference."""
