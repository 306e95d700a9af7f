"""What keeps a run alive: several processes, the run folder, checks before the start."""
