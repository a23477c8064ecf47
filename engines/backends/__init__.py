"""One file per engine; the file name, with hyphens, is the engine's name on the command line."""
