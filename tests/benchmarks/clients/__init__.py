"""One module for each client, all of the shape of ``worker.ClientModule``."""
