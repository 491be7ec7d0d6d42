"""File names of a `StalenessLog` that is not closed."""

LOG = "log.jsonl"  # a line per item
PUBLISHED = "published"  # the newest version, shared by processes
