"""Artefacts that run without our Python: ONNX, TensorRT, bundles, a serving repository.

Installed as `dualdiff_engine.export`; the package itself never needs it.
"""
