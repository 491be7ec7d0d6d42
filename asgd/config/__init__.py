"""The configuration: its tables, how it is made, and what is refused."""
