"""Trained detectors as files of other engines. None is kept that was not compared with its network."""
