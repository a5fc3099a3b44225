"""A host in miniature: the real planner and the real scheduler side, everything around them simulated.

One seed decides a whole run: when requests come and are aborted, when engines start, crash and stop
answering, which messages are lost, late or overtaken, when the node store is replaced. `world.replay(seed)`
runs it again, step by step.

    world      the host and its misfortunes, and what must hold once everybody is at rest
    engine     vLLM's busy loop and those who ask it; scheduler, blocks, requests: vLLM's scheduler
    client     in the place of NodeClient; network: its way to the store
    worker     steps and copies; memory: what lies in the slots
    store      the node store around the planner
    clock      time and chance; it also takes the place of the connector's `time`
"""
