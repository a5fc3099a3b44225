"""`kvstrata bench`: what kvstrata does on this machine's GPU, beside its neighbours."""
