"""One file per graph rewrite; each reports how often it fired."""
