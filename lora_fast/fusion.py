"""What runs each adapted module of a model, and why not something faster: nothing is slow in silence.

Layers answer for themselves: one with a method `fusion_path() -> (path, reason)` is a row of the report, and one with a
counter `calls_by_path` says which way its calls really went."""

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from lora_fast.config import plain_name
from lora_fast.tuning import choices

NOT_ACCELERATED = "a LoRA layer of PEFT's; accelerate_peft(model) speeds it up"


@dataclass(frozen=True)
class FusionRow:
    """One module or adapted parameter: its dotted name, the path that its adapter takes as it stands, and why not the
    Triton path (None on it). path: "triton", "torch" (our op in PyTorch), "base" (no adapter runs) or "peft" (its own
    forward)."""

    module: str
    path: str
    reason: str | None


@dataclass(frozen=True)
class FusionReport:
    """Module by module, which implementation runs; printing it groups the modules by path and reason.

    rows: of the adapted layers. mlps: of modules with three adapted layers of the sizes of gate, up and down; path:
    "lora_swiglu_mlp" (they run as one op) or "layers" (one by one). counts: layers per path. calls: how many calls took
    which way so far, {(path, reason): calls}, of the layers that count (outside compiled graphs). routes: {step and
    sizes: implementation} of what the tuner chose in this process, for the steps of the Triton path that cuBLAS can do
    too."""

    rows: tuple[FusionRow, ...]
    mlps: tuple[FusionRow, ...] = ()
    calls: Counter[tuple[str, str | None]] = field(default_factory=Counter, compare=False)
    routes: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(row.path for row in self.rows))

    def __str__(self) -> str:
        if not self.rows:
            return "lora-fast: no adapted module"
        lines = [f"lora-fast: {len(self.rows)} adapted modules", *_grouped(self.rows)]
        if self.mlps:
            lines += [f"{len(self.mlps)} MLPs of three of them", *_grouped(self.mlps)]
        for (path, reason), count in self.calls.most_common():
            lines.append(f"  {count} calls so far took {path}" + (f": {reason}" if reason else ""))
        lines += [f"  {step} runs {route}" for step, route in sorted(self.routes.items())]
        return "\n".join(lines)


def _grouped(rows: tuple[FusionRow, ...]) -> list[str]:
    """A line for each path and reason, the most frequent first."""
    lines = []
    for (path, reason), count in Counter((row.path, row.reason) for row in rows).most_common():
        example = next(row.module for row in rows if (row.path, row.reason) == (path, reason))
        lines.append(f"  {count:4d} {path:6} {reason or ''} (e.g. {example})")
    return lines


def calls_by_path(model: nn.Module) -> Counter[tuple[str, str | None]]:
    """How many calls of the layers that count took which path, and why: {(path, reason): calls}.

    path: "lora_linear" (base and update in one op), "lora_linears" (so together with the layers that read the same
    input), "lora_swiglu_mlp" (an MLP's three layers in one op), "lora_experts" (a mixture's stacked experts, all
    parameters of the module together), "lora_embedding" (a lookup), "lora_update" (the base layer called as it is, the
    update fused), "formed" (a module called with W + ΔW in place of its parameter), "layers" (an MLP that calls its
    layers one by one), "base" (no adapter runs) or "peft"."""
    counters = (module.__dict__.get("calls_by_path", {}) for module in model.modules())
    return sum(map(Counter, counters), Counter())


def mlp_rows(model: nn.Module) -> tuple[FusionRow, ...]:
    rows = []
    for name, module in model.named_modules():
        if hasattr(module, "swiglu_layers"):
            rows.append(FusionRow(plain_name(name), "lora_swiglu_mlp", None))
        elif hasattr(module, "swiglu_refusal"):
            rows.append(FusionRow(plain_name(name), "layers", module.swiglu_refusal))
    return tuple(rows)


def fusion_report(model: nn.Module) -> FusionReport:
    """Which implementation runs each adapted module, ours and PEFT's, and why not the Triton kernels where it is not
    they."""
    rows = []
    for name, module in model.named_modules():
        if hasattr(module, "fusion_path"):
            name = getattr(module, "adapted_name", str)(name)  # what holds a parameter's adapters bears another
            rows.append(FusionRow(plain_name(name), *module.fusion_path()))
        elif hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            rows.append(FusionRow(plain_name(name), "peft", NOT_ACCELERATED))
    return FusionReport(tuple(rows), mlp_rows(model), calls_by_path(model), choices())
