"""Legends that QGIS loads by itself: NAME.qml beside NAME.tif or NAME.gpkg."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from shards.manifest import ClassInfo

HEAD = "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"


def raster_legend(classes: Sequence[ClassInfo]) -> str:
    """A paletted style of band 1: each class id with its colour and name; no data stays transparent."""
    root = ET.Element("qgis", version="3.22", styleCategories="Symbology")
    pipe = ET.SubElement(root, "pipe")
    renderer = ET.SubElement(
        pipe, "rasterrenderer", type="paletted", band="1", opacity="1", alphaBand="-1", nodataColor=""
    )
    palette = ET.SubElement(renderer, "colorPalette")
    for code, info in enumerate(classes):
        ET.SubElement(palette, "paletteEntry", value=str(code), color=_hex(info), alpha="255", label=info.name)
    ET.SubElement(root, "blendMode").text = "0"
    return _text(root)


def polygon_legend(classes: Sequence[ClassInfo], attribute: str) -> str:
    """A categorised style of polygons by their class id in ``attribute``."""
    root = ET.Element("qgis", version="3.22", styleCategories="Symbology")
    renderer = ET.SubElement(root, "renderer-v2", type="categorizedSymbol", attr=attribute, symbollevels="0")
    categories = ET.SubElement(renderer, "categories")
    symbols = ET.SubElement(renderer, "symbols")
    for code, info in enumerate(classes):
        ET.SubElement(categories, "category", value=str(code), symbol=str(code), label=info.name, render="true")
        symbol = ET.SubElement(symbols, "symbol", name=str(code), type="fill", alpha="1", clip_to_extent="1")
        layer = ET.SubElement(symbol, "layer", {"class": "SimpleFill", "enabled": "1", "pass": "0", "locked": "0"})
        red, green, blue = info.color
        for key, value in (("color", f"{red},{green},{blue},255"), ("outline_style", "no"), ("style", "solid")):
            ET.SubElement(layer, "prop", k=key, v=value)
    return _text(root)


def _hex(info: ClassInfo) -> str:
    return "#{:02x}{:02x}{:02x}".format(*info.color)


def _text(root: ET.Element) -> str:
    ET.indent(root)
    return HEAD + ET.tostring(root, encoding="unicode") + "\n"
