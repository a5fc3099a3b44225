"""Where bytes are kept below the GPU: one file for each tier."""
