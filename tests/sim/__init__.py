"""A host in miniature: the real planner and the real books, everything around them simulated.

One seed decides a whole run: when engines start, crash and stop answering, which messages are lost,
late or overtaken, when the node store is replaced. `replay.replay(seed)` runs it again, step by step.
"""
