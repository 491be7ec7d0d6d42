"""Real runs on Ray: a parameter server, its workers and their record."""
