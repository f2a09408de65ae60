"""`python -m compressor`, which is the command `compressor`."""

from compressor.cli import main

main()
