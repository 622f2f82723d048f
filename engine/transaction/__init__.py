"""Reads and writes of one run, and how runs become commits."""
