"""Triton kernels and their plain PyTorch reference, installed as `lora_fast.kernels`.

This file holds nothing but its docstring, no version either: with the repository root on sys.path, Transformers takes
this folder for Hugging Face's `kernels` package and imports it under that name."""
