"""Sections of the report: each shows what an experiment returned, as tables, figures and verdicts."""
