"""The loss curve of a run from models or exact moments, and its score."""
