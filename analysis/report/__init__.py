"""The report: one HTML file on one or several runs."""
