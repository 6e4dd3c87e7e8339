"""A training step of Llama-3-8B-shaped decoder layers on a GPU: ours, PEFT's, full fine-tuning, the frozen model's.

    make gpu, or: python benchmarks/bench_train_step_gpu.py [--rounds 20] [--deadline 90]

A step is forward, backward and AdamW (fused; a learning rate of 0 does all of its work and keeps every arm at the same
weights) on random inputs of the first layer, whose gradient is computed too; no activation checkpointing, no embedding,
no output head. The frozen model's is forward and dX. Launched as users launch it, without CUDA graphs, and timed by
events, in interleaved random rounds. All arms but full fine-tuning read the same frozen weights from the same memory.
peak_MiB is what the arm would peak at alone, its own parameters, gradients and optimizer states included, and the
frozen weights left out. In the CSV M is tokens, K the hidden size, N the intermediate size."""

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import harness
import torch
from arms import AGAIN, FROZEN
from modules import accelerated, injected, peft_model
from timing import Arm, Measured, figures, peak_MiB, ratio, routes_of, saved_MiB, time_rounds
from torch import Tensor, nn

FULL, PEFT = "full fine-tuning", "peft"
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COLUMNS = (
    *harness.COLUMNS,
    *("layers", "seq_len", "tokens_per_s"),
    *("ratio_to_full", "ratio_to_full_low", "ratio_to_full_high"),
    *("ratio_to_peft", "ratio_to_peft_low", "ratio_to_peft_high"),
)


class Case(NamedTuple):
    layers: int
    batch: int
    seq_len: int
    R: int
    dropout: float


LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [Case(1, 2, 8, 4, 0.0)]
    return [Case(4, 4, 2048, R, p) for R, p in ((16, 0.0), (16, 0.1), (64, 0.0), (8, 0.0), (256, 0.0))]


@dataclass
class Trained:
    """A model in training: what is trained (nothing: forward and dX) and its optimizer."""

    model: nn.Module
    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer | None

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x, use_cache=False).last_hidden_state

    def step(self, x: Tensor, dy: Tensor) -> None:
        self.forward(x).backward(dy)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        x.grad = None

    def own_MiB(self) -> float:
        """What lives from step to step: trained parameters and optimizer states."""
        states = [] if self.optimizer is None else [v for s in self.optimizer.state.values() for v in s.values()]
        tensors = [*self.parameters, *(v for v in states if isinstance(v, Tensor))]
        return sum(t.numel() * t.itemsize for t in tensors) / 2**20


def frozen_model(case: Case, args) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    sizes = TINY if args.tiny else LLAMA_8B
    config = LlamaConfig(**sizes, num_hidden_layers=case.layers, vocab_size=32, max_position_embeddings=8192)
    with torch.device(args.device):
        torch.manual_seed(0)
        model = LlamaModel(config).to(args.dtype)
    return model.requires_grad_(False).train()


@torch.no_grad()
def with_updates(model: nn.Module) -> nn.Module:
    """lora_B starts at zero, and zeros compute faster than other numbers."""
    generator = None
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            generator = generator or torch.Generator(parameter.device).manual_seed(0)
            parameter.normal_(std=0.01, generator=generator)
    return model


def trained(model: nn.Module) -> Trained:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = parameters[0].is_cuda if parameters else False
    return Trained(model, parameters, torch.optim.AdamW(parameters, lr=0.0, fused=fused) if parameters else None)


def arms_of(base: nn.Module, case: Case) -> dict[str, Trained]:
    def share() -> nn.Module:
        return copy.deepcopy(base, {id(p): p for p in base.parameters()})

    adapters = NAMES, case.R, case.dropout
    models = {
        "lora_fast apply_lora": injected(share(), *adapters),
        "lora_fast accelerate_peft": accelerated(share(), *adapters),
        PEFT: peft_model(share(), *adapters),
        "peft bf16 adapters": peft_model(share(), *adapters, fp32_adapters=False),
    }
    arms = {FROZEN: Trained(share(), [], None), AGAIN: Trained(share(), [], None)}
    arms |= {name: trained(with_updates(model)) for name, model in models.items()}
    full = copy.deepcopy(base).requires_grad_(True)
    full.embed_tokens.requires_grad_(False)  # nothing is looked up: the inputs are given
    arms[FULL] = trained(full)
    return arms


def prepare(arm: Trained, x: Tensor, dy: Tensor, frozen: list[Tensor], measured: Measured) -> bool:
    """Compiles, tunes and looks at an arm; False, and measured.error, where it fails."""
    try:
        arm.forward(x).backward(dy)
        gradients = [x.grad, *(parameter.grad for parameter in arm.parameters)]
        if not all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in gradients):
            measured.error = "wrong: a gradient is missing, not finite, or all zero"
            return False
        arm.step(x, dy)
        measured.route = routes_of(lambda: arm.step(x, dy))
        measured.saved_MiB = saved_MiB(Arm(arm.forward, arm.parameters), x, frozen)
        peak = peak_MiB(lambda: arm.step(x, dy), x.device)
        measured.peak_MiB = None if peak is None else peak + arm.own_MiB()
    except Exception as error:  # an arm that can't run is a row, and the others go on
        measured.error = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        return False
    finally:
        x.grad = None
    measured.timed_by = "CUDA events" if x.is_cuda else "clock"
    return True


def measure(case: Case, args) -> Iterator[dict]:
    base = frozen_model(case, args)
    hidden, tokens = base.config.hidden_size, case.batch * case.seq_len
    generator = torch.Generator(args.device).manual_seed(0)
    shape = case.batch, case.seq_len, hidden
    x, dy = (torch.randn(shape, generator=generator, device=args.device).to(args.dtype) for _ in range(2))
    x.requires_grad_()
    arms = arms_of(base, case)
    measured = {name: Measured() for name in arms}
    frozen = list(base.parameters())
    ready = {name: arm for name, arm in arms.items() if prepare(arm, x, dy, frozen, measured[name])}
    calls = {name: lambda arm=arm: arm.step(x, dy) for name, arm in ready.items()}
    for name, samples in time_rounds(calls, args.device, args.rounds, lambda: args.deadline.left() < 0).items():
        measured[name].samples = samples
    sizes = {"M": tokens, "K": hidden, "N": base.config.intermediate_size, "R": case.R, "dropout": case.dropout}
    for provider, row in figures(measured, FROZEN).items():
        row |= {"layers": case.layers, "seq_len": case.seq_len}
        if row.get("ms_p50"):
            row["tokens_per_s"] = f"{1e3 * tokens / float(row['ms_p50']):.0f}"
        for name, column in ((FULL, "ratio_to_full"), (PEFT, "ratio_to_peft")):
            if (found := ratio(measured[provider], measured[name])) is not None:
                middle, (low, high) = found
                row |= {column: f"{middle:.4f}", f"{column}_low": f"{low:.4f}", f"{column}_high": f"{high:.4f}"}
        yield {"provider": provider, **sizes, **row}


def main(argv=None) -> int:
    args = harness.arguments(__doc__, argv)
    return harness.run(args, "train_step", cases(args.tiny), lambda case: measure(case, args), COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
