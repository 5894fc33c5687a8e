"""`lorica export`: what was trained as files for other runtimes, each read back there and measured beside the original."""
