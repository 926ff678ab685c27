"""A step of one group on this rank: prepare, then execute."""
