"""The predicted loss curve of a run, by simulation or from exact moments, and its score."""
