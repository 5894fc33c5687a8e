"""`lorica doctor`: whether this machine can do what Lorica is asked for, check by check, each with what mends it."""
