"""The node store (`node/`), the clients that talk to it, and the command line."""
