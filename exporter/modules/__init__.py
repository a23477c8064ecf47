"""Modules written once: run as they are they are the PyTorch reference, traced they are the graphs."""
