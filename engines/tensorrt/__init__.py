"""TensorRT, both kinds of it: one implementation over a library handle."""
