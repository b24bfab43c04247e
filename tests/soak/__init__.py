"""A soak: requests of all kinds to servers of all kinds, for minutes or hours, and then nothing is left."""
