"""`python -m compressor`, which is the command `compressor`."""

from compressor.cli.main import main

main()
