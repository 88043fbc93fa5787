"""What shared machines need: preemption, lost processes, limits of time."""
