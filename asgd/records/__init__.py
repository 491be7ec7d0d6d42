"""Records: the staleness that other systems, or a loop of one's own, have logged."""
