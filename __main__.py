"""Lets ``python -m tokexport`` stand for the command ``tokexport``."""

from tokexport.cli import main

if __name__ == "__main__":
    main()
