"""The terminal interface: commands, options, the live view, tables."""
