"""From the MODEL argument to a model: a built-in shape, a config.json, a folder with weights, a Hugging Face id, a
module.

`resolve` only looks, `build` makes the module; a `ModelSource` can be sent to another process, which builds its own
copy."""

import difflib
import importlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lora_fast import LoraFastError

# Llama shapes. The first two train on a laptop's CPU in seconds a step; the others are the published sizes of Llama 3.
# All have RoPE, so max_position_embeddings bounds nothing but the length that we accept.
SHAPES: dict[str, dict] = {
    "llama-5m": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "llama-25m": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
MAX_POSITIONS = 131072

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. kind is "shape", "config", "folder" or "module"; location is the shape's name, the path
    of the config.json, the folder, or the file that torch.save wrote; name is what tables and folders call it."""

    kind: str
    location: str
    name: str

    @property
    def weights(self) -> str:
        """What the parameters hold: "random", "loaded" or "given"."""
        return {"shape": "random", "config": "random", "folder": "loaded", "module": "given"}[self.kind]

    def to_dict(self) -> dict:
        return asdict(self)


def resolve(model: str) -> ModelSource:
    """Find out what MODEL means; a Hugging Face id is downloaded here if it has to be. Raises LoraFastError."""
    if not model.strip():
        raise LoraFastError(f"MODEL is empty; expected a path, a Hugging Face id, or one of {', '.join(SHAPES)}")
    if model in SHAPES:
        return ModelSource("shape", model, model)
    path = Path(model).expanduser()
    if path.is_file():
        return _resolve_config(path)
    if path.is_dir():
        return _resolve_folder(path, path.resolve().name)
    if model.endswith(".json") or model.startswith((".", "~", "/")) or model.count("/") > 1:
        raise LoraFastError(f"MODEL {model!r}: there is no such file or folder")
    return _resolve_folder(_download(model), model)


def resolve_shapes(model: str) -> ModelSource:
    """As `resolve`, where only the config is looked at: a folder's weights may be missing. Raises LoraFastError."""
    path = Path(model).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return replace(resolve(str(path / "config.json")), name=path.resolve().name)
    return resolve(model)


def _resolve_config(path: Path) -> ModelSource:
    if path.suffix != ".json":
        raise LoraFastError(
            f"MODEL {str(path)!r} is a file but no config.json; give a config.json, or the folder with the weights"
        )
    read_config(path)
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return ModelSource("config", str(path.resolve()), name)


def _resolve_folder(folder: Path, name: str) -> ModelSource:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise LoraFastError(f"MODEL {name!r} is an adapter's folder; give the base model that the adapter belongs to")
    if not (folder / "config.json").is_file():
        raise LoraFastError(f"MODEL {name!r}: the folder holds no config.json, so it is no Transformers model")
    read_config(folder / "config.json")
    missing = _missing_weights(folder)
    if missing:
        raise LoraFastError(
            f"MODEL {name!r}: {missing}; download the weights, or measure with random ones: "
            f"lora-fast profile {folder / 'config.json'}"
        )
    return ModelSource("folder", str(folder.resolve()), name)


def _missing_weights(folder: Path) -> str | None:
    """Why the folder's weights cannot be complete, or None."""
    # Transformers takes safetensors where there are any; what another format's index lists need not be there.
    chosen = next(
        (p for p in ("*.safetensors", "*.bin") if [*folder.glob(p), *folder.glob(f"{p}.index.json")]), "*.bin"
    )
    for index in sorted(folder.glob(f"{chosen}.index.json")):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            return f"{index.name} cannot be read ({type(error).__name__})"
        absent = sorted(shard for shard in shards if not (folder / shard).is_file())
        if absent:
            return f"{len(absent)} of {len(shards)} weight files are missing ({absent[0]} first)"
    if not any(file.is_file() for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern)):
        return "the folder holds no weights (*.safetensors or *.bin)"
    return None


def _download(model: str) -> Path:
    """The folder of a Hugging Face id in the local cache, fetched if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    near = difflib.get_close_matches(model, SHAPES, n=1)
    shapes = f"built-in shapes are {', '.join(SHAPES)}" + (f"; did you mean {near[0]}?" if near else "")
    try:
        # Weights first as safetensors, pickles only where there is nothing else; files in subfolders are other formats'
        # copies.
        for pattern in WEIGHT_PATTERNS:
            folder = Path(snapshot_download(model, allow_patterns=["*.json", pattern], ignore_patterns=["*/*"]))
            if any(folder.glob(pattern)):
                break
        return folder
    except (GatedRepoError, PermissionError) as error:
        raise LoraFastError(
            f"MODEL {model!r} has a licence to accept: do so at https://huggingface.co/{model}, then `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise LoraFastError(
            f"MODEL {model!r} is neither a path nor a model on the Hugging Face Hub; {shapes}"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise LoraFastError(
            f"MODEL {model!r} is not in the local Hugging Face cache and the Hub cannot be reached; download it once "
            f"with `hf download {model}`, or give a local folder or a config.json; {shapes}"
        ) from error


def read_config(path: str | Path):
    """The Transformers config in a config.json. Raises LoraFastError if it is none, or of no causal language model."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    try:
        fields = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise LoraFastError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise LoraFastError(f"{path} has no field model_type, so it is no Transformers config")
    model_type = fields["model_type"]
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        near = difflib.get_close_matches(str(model_type), CONFIG_MAPPING_NAMES, n=3)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise LoraFastError(
            f"{path}: unknown model type {model_type!r}; Transformers {transformers.__version__} has none such{hint}"
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # what a config class raises on wrong fields is its own choice
        raise LoraFastError(f"{path}: Transformers refuses these fields: {_first_line(error)}") from error
    _check_causal(config, str(path))
    return config


def _check_causal(config, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise LoraFastError(
            f"{name}: model type {config.model_type!r} has no causal language model in Transformers; "
            "give a decoder such as llama, qwen3, gpt2 or mistral"
        )


def _config(source: ModelSource):
    from transformers import LlamaConfig

    if source.kind == "shape":
        return LlamaConfig(**SHAPES[source.location], max_position_embeddings=MAX_POSITIONS)
    path = Path(source.location)
    return read_config(path / "config.json" if source.kind == "folder" else path)


def build(
    source: ModelSource,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    attn_implementation: str | None = None,
    layers: int | None = None,
) -> nn.Module:
    """The model in training mode, its key-value cache off. On device "meta" it has shapes and no memory.

    Random weights are drawn from `seed`. layers: so many decoder layers instead of the config's. Raises LoraFastError
    where Transformers cannot make or load it."""
    if source.kind == "module":
        model = torch.load(source.location, map_location=device, weights_only=False)
        model.config.use_cache = False
        return model.train()

    from transformers import AutoModelForCausalLM

    config = _config(source)
    config.use_cache = False
    if layers is not None:
        _shorten(config, layers)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    try:
        if source.kind == "folder" and str(device) != "meta":
            model = AutoModelForCausalLM.from_pretrained(
                source.location, config=config, dtype=dtype, local_files_only=True
            ).to(device)
        else:
            with torch.random.fork_rng(), torch.device(device):  # the caller's random numbers go on undisturbed
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, AssertionError, ImportError) as error:
        raise LoraFastError(f"{source.name}: Transformers cannot make this model: {_first_line(error)}") from error
    except Exception as error:
        if str(device) == "meta":  # no memory was asked for: the config's numbers make no model
            raise LoraFastError(f"{source.name}: no model has these sizes: {_first_line(error)}") from error
        if type(error).__name__ == "SafetensorError":  # derives from Exception alone
            raise LoraFastError(f"{source.name}: a weight file is damaged: {_first_line(error)}") from error
        raise
    return model.train()


def layer_count(config) -> int | None:
    """Number of decoder layers; None where the config doesn't say."""
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    return count if isinstance(count, int) else None


def _shorten(config, layers: int) -> None:
    """Leaves the first `layers` decoder layers, and of every list with an entry per layer the first entries."""
    text = config.get_text_config()
    count = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers


def check_module(model: nn.Module) -> None:
    """Raises LoraFastError unless token ids can be drawn for it, for which Transformers' `config.vocab_size` is
    needed."""
    if not isinstance(model, nn.Module):
        raise LoraFastError(f"model is a {type(model).__name__}; expected a name, a path or a torch.nn.Module")
    if vocab_size(model) is None:
        raise LoraFastError(f"{type(model).__name__} has no config.vocab_size; expected a Transformers language model")
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise LoraFastError("the model carries adapters already; give the base model, or take them out first")
    for parameter in model.parameters():
        if parameter.device.type == "meta":
            raise LoraFastError(
                "the model has parameters on the meta device, which hold no values; load the weights first"
            )


def save_module(model: nn.Module, file: Path) -> ModelSource:
    """Write a module so that a memory child can load it. Raises LoraFastError where it cannot be pickled."""
    name = type(model).__name__
    if type(model).__module__ == "__main__":
        raise LoraFastError(
            f"{name} is defined in the script that is running, where another process cannot import it; "
            "move the class to a file of its own"
        )
    try:
        importlib.import_module(type(model).__module__)
        torch.save(model, file)
    except Exception as error:  # pickling runs the model's own code
        raise LoraFastError(f"{name} cannot be sent to a process of its own: {_first_line(error)}") from error
    return ModelSource("module", str(file), name)


def vocab_size(model: nn.Module) -> int | None:
    """Number of token ids that the model's embedding knows; a multimodal config keeps it in its text part."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def counts(model: nn.Module, targets: Sequence[nn.Module]) -> dict:
    """What of a model's shape a run records, for what is read off its numbers later: vocab_size, linears (how many
    layers all-linear could name, the head among them), and adapted: how many but embeddings have an adapter, and their
    Σ K and Σ N, or None where none has."""
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and ".lora_" not in path]
    targets = [module for module in targets if not isinstance(module, nn.Embedding)]  # which multiplies nothing
    inputs = sum(getattr(module, "in_features", module.weight.shape[0]) for module in targets)  # a Conv1D's is (K, N)
    outputs = sum(sum(module.weight.shape[-2:]) for module in targets) - inputs
    adapted = {"modules": len(targets), "in_features": inputs, "out_features": outputs}
    return {
        "vocab_size": vocab_size(model),
        "linears": max(len(linears), len(targets)),
        "adapted": adapted if targets else None,
    }


def max_positions(model: nn.Module) -> int | None:
    """Longest sequence by the model's config, or None where the config sets no bound."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def note_on_class(model: nn.Module) -> list[str]:
    """What a run says where the checkpoint is of another class than the causal language model that it is read as."""
    named = getattr(model.config, "architectures", None) or [type(model).__name__]
    if type(model).__name__.lower() in map(str.lower, named):
        return []
    return [
        f"read as {type(model).__name__}, and the checkpoint is of {', '.join(named)}: its own head is left out, and a "
        "language model's, with random weights, stands in its place"
    ]


def _first_line(error: BaseException) -> str:
    """An exception's message as one line of at most 300 characters."""
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"
