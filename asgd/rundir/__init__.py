"""The run directory: its files and tables, and how they are written, read and repaired."""
