"""`python -m lorica VERB ...`."""

from lorica.cli import main

main()
