"""From a CSV to tables, plots and a verdict."""
