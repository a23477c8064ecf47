"""How a graph is made."""
