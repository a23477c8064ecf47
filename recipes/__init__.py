"""What to do: recipes as data."""
