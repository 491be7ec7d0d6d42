"""What a terminal sees: commands, options, the live view, tables."""
