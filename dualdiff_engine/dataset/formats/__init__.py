"""Datasets in formats that training programs read: one file per format."""

from dualdiff_engine.dataset.formats.export import FORMATS, Exported, check_format, export

__all__ = ["FORMATS", "Exported", "check_format", "export"]
