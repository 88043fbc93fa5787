"""XML of strangers: plain elements. There are no entities, which could read files or fill the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from samdetr.datasets.values import shown
from samdetr.util.regular_files import open_regular


class _Refused(Exception):
    pass


def read_xml(file: Path) -> Element:
    """The root element of a file. Raises ValueError."""
    try:
        with open_regular(file) as stream:
            text = stream.read()
    except FileNotFoundError:
        raise ValueError(
            f"annotation file {shown(file)} does not exist; add it, or take its name from the list"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"annotation file {shown(file)} cannot be read: {error}; replace it") from None
    if not text.strip():
        raise ValueError(f"annotation file {shown(file)} is empty; replace or remove it")
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse
    try:
        parser.Parse(text, True)
    except _Refused:
        raise ValueError(
            f"{shown(file)} has a document type (<!DOCTYPE), which may define entities and is not read; remove it"
        ) from None
    except (expat.ExpatError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        raise ValueError(f"{shown(file)} is no well-formed XML ({error}); replace or correct it") from None
    return builder.close()


def _refuse(*_: Any) -> NoReturn:
    raise _Refused
