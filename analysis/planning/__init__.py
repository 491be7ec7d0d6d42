"""What if: choices of workers, rate and batch, judged before a run."""
