"""Plans: choices of workers, learning rate and batch size, judged before a run."""
