"""What reads results and runs: tables, curves, plots and the report's page. Nothing here samples or trains."""
