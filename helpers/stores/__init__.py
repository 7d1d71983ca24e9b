"""Makes a tracking store ready behind ``helpers.tracking``: a local database, or a server that answers."""
