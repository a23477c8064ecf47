"""Parts of the command line that do not fit into ``cli.py``: shared options, groups of commands."""
