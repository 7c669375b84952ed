"""The demonstration behind ``sgr demo``: what is run, and the report that tells of it."""
