"""Commands around the pipeline: python -m tools.batch | variation | report | bench | gpu | kill_test."""
