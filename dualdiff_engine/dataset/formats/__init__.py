"""Datasets in formats that training programs read: one file per format."""

from dualdiff_engine.dataset.formats.export import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "export"]
