"""`python -m kvik.cli`."""

from kvik.cli import main

main()
