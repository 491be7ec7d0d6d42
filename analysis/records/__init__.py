"""The analysis of a record: its law, its means, and the cost of a cap."""
