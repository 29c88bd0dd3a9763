"""`python -m pocketvlm`: the command line if the script is not on the path."""

from pocketvlm.cli import process

process()
