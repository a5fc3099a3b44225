"""Pure logic: keys, layout, catalogue, planner, config. No I/O, clock, threads or torch."""
