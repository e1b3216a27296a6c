"""The daemon: what it holds, in which order it works, and how it answers. Never imports the client's side."""
