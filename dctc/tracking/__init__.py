"""Where a run's numbers, pictures and files go: ``metrics.jsonl``, MLflow, tables and figures."""
