"""Doing it: running, judging and measuring what was built."""
