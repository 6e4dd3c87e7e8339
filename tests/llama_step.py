"""One training step of a tiny Transformers Llama, and which `kernels` package Transformers found on its way.

Run as a file it prints that version: python tests/llama_step.py [--site FOLDER] [--expect VERSION]
--site adds a folder at the end of the path, as site-packages stands there; --expect fails on any other version."""

import argparse
import importlib.metadata
import site
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run() -> str:
    """Import the model, take the step; return the version of the `kernels` that Transformers imported, or "none"."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.import_utils import is_kernels_available

    import lora_fast  # noqa: F401  (beside it, as in a user's training script)

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    tokens = torch.arange(16).reshape(2, 8)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    found = sys.modules.get("kernels")
    if found is not None and Path(found.__file__).resolve().is_relative_to(ROOT / "kernels"):
        raise RuntimeError("Transformers imported this repository's folder `kernels` as Hugging Face's package")
    if not is_kernels_available():
        return "none"
    assert found is not None, "Transformers accepts `kernels` and has not imported it"
    return importlib.metadata.version("kernels")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", metavar="FOLDER")
    parser.add_argument("--expect", metavar="VERSION")
    options = parser.parse_args()
    if options.site:
        site.addsitedir(options.site)
    version = run()
    print(f"Llama took a step; kernels: {version}")
    if options.expect not in (None, version):
        sys.exit(f"expected kernels {options.expect}")
