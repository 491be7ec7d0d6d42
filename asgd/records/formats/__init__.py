"""Formats of logs, a module for each family; `asgd.records.formats.known` lists them."""
