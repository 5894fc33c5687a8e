"""The fast path. Each kernel stands beside a plain reference that it must equal."""
