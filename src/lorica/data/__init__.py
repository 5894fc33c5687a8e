"""Rows of any source to examples, tokens and micro-batches. `registry` says which module reads which data set."""
