"""Commands around the pipeline: python -m tools.batch | variation | report | bench | kill_test."""
