"""The client: a connection to a trunk, and the module that stands where the trunk's layers are. Never imports the
daemon's side."""
