"""`kvstrata demo`: real engines, one long document, several questions; what the host tier saves.

Orchestration only: it starts stock `vllm serve` processes and talks HTTP to them.
"""
