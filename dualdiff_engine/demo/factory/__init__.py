"""Synthetic parts and their defects, every mask exact."""

from dualdiff_engine.demo.factory.samples import encode_png as encode_png
from dualdiff_engine.demo.factory.samples import make as make
from dualdiff_engine.demo.factory.samples import write_dataset as write_dataset
