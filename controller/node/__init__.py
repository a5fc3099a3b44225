"""The node store: the process that owns one host's hierarchy below the GPU."""
