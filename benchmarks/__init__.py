"""One file per question; each has `run() -> list[Row]`. ``python -m benchmarks [NAME ...]`` runs them and prints ratios."""
