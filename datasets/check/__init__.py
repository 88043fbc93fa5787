"""Checks of a data set in COCO format: `python -m datasets.check FOLDER`."""
