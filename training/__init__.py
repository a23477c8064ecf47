"""Learning what a method needs."""
