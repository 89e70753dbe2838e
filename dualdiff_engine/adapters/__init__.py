"""Adapters: hostile bytes (files) -> checked names (format) -> folded tensors (fold)."""

from dualdiff_engine.adapters.distilled import Distilled as Distilled
from dualdiff_engine.adapters.format import Adapter as Adapter
from dualdiff_engine.adapters.format import AdapterSummary as AdapterSummary
from dualdiff_engine.adapters.format import check_fits as check_fits
from dualdiff_engine.adapters.format import convert as convert
from dualdiff_engine.adapters.format import default_name as default_name
from dualdiff_engine.adapters.format import load as load
from dualdiff_engine.adapters.format import named as named
from dualdiff_engine.adapters.format import parse as parse
from dualdiff_engine.adapters.format import summary as summary
