"""Layouts of data sets: each module finds the splits of one layout in a folder, as `Source` objects."""
