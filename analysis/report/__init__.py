"""The report: one HTML file of one run or several."""
