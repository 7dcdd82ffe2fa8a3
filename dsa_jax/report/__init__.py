"""The report of a run: tables, plots and the HTML page."""
