"""Why LoRA is slow or large here: sentences, each read off a Profile's numbers and silent where they don't say so.

An advice is a function of a Profile that returns its sentences or None; `advise` asks them all. Thresholds say from
where on a cost is worth a sentence; they are choices, and every sentence carries the figures that it rests on."""

from lora_fast.profiler.crossover import flops_ratio_at
from lora_fast.profiler.profile import Arm, Profile

# From this share of a step's time or of its peak on, a single cause is worth a sentence.
WORTH = 0.05
# Timed and counted ratio differ by less where products run near the hardware's rate.
SLOWER = 1.10
HALF = {"bf16", "fp16"}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def advise(profile: Profile) -> list[str]:
    return [text for advice in ADVICE if (text := advice(profile))]


def slower_than_counted(profile: Profile) -> str | None:
    """Timed far above what FLOPs say: packed weights are unpacked for every product, or the adapters' products are too
    small to run at the hardware's rate."""
    slow = [
        arm
        for arm in profile.lora
        if arm.ratio_ci and arm.flops_ratio is not None and arm.ratio_ci[0] > SLOWER * arm.flops_ratio
    ]
    if not slow:
        return None
    arm, work = slow[0], profile.workload
    text = (
        f"{arm.name} takes {arm.ratio_to_full:.2f} of full's time with {arm.flops_ratio:.2f} of its FLOPs: a FLOP "
        f"takes {arm.ratio_to_full / arm.flops_ratio:.2f} times as long as in full fine-tuning."
    )
    if work.get("quantize"):
        return (
            f"{text} The weights under it are in {work['quantize']} and are unpacked for every product, forward and "
            "backward, at any rank and however few the tokens: more tokens a pass spread that out."
        )
    if adapted := work.get("adapted"):
        k, n = adapted["in_features"] / adapted["modules"], adapted["out_features"] / adapted["modules"]
        text += (
            f" Each of {adapted['modules']} adapted layers (on average {k:,.0f} → {n:,.0f}) adds two products with a "
            f"side of {arm.rank} forward and four backward, over the same activations: they cost reads and calls, not "
            "FLOPs."
        )
    return text + " Larger batches, wider layers or fewer targets bring the two ratios together."


def optimizer_share(profile: Profile) -> str | None:
    """Few tokens a step: full fine-tuning pays the optimizer over all parameters, which a larger step spreads out."""
    full = profile.full
    if full.step_ms is None or full.optimizer_ms is None or full.optimizer_ms < WORTH * full.step_ms:
        return None
    arms = [arm for arm in profile.lora if arm.ratio_to_full is not None]
    if not arms:
        return None
    arm = min(arms, key=lambda arm: abs(arm.ratio_to_full - 1))
    passes = (arm.forward_ms + arm.backward_ms) / (full.forward_ms + full.backward_ms)
    return (
        f"Batch: {profile.workload['optimizer']} takes {full.optimizer_ms:.3g} of full's {full.step_ms:.3g} ms "
        f"({full.optimizer_ms / full.step_ms:.0%}) at {profile.workload['tokens_per_step']:,} tokens a step. With more "
        f"tokens a step, by batch or gradient accumulation, that share goes to 0 and {arm.name} from "
        f"{arm.ratio_to_full:.2f} towards {passes:.2f} of full's time: time's crossover depends on the batch."
    )


def few_tokens(profile: Profile) -> str | None:
    """Weights are read for too few tokens: 2 FLOPs a weight and token, against what GPUs do per byte that they read
    (their makers' peaks: A100 312 TFLOP/s over 2.0 TB/s, H100 989 over 3.35)."""
    work = profile.workload
    tokens = work["batch_size"] * work["seq_len"]
    intensity = 2 * tokens / BYTES[work["dtype"]]
    if not work["device"].startswith("cuda") or intensity >= 156 or work.get("quantize"):
        return None
    return (
        f"Batch: {tokens:,} tokens a pass give {intensity:.0f} FLOPs per byte of weights; an A100 needs "
        "156 to be busy and an H100 295 (data sheets). The step waits for memory at every rank; more tokens a pass are "
        "nearly free."
    )


def fp32_adapters(profile: Profile) -> str | None:
    """fp32 adapters beside a base of half their width: their states' bytes."""
    work = profile.workload
    if work["dtype"] not in HALF or work.get("adapter_dtype") != "fp32":
        return None
    for arm in _sized(profile):
        held = sum(arm.by_category[name] for name in ("adapters", "gradients", "optimizer"))
        if held >= WORTH * arm.peak_MiB:
            return (
                f"fp32 adapters on a {work['dtype']} base: with gradients and {work['optimizer']}'s states they are "
                f"{_size(held)} of {_size(arm.peak_MiB)} at {arm.name}. --adapter-dtype {work['dtype']} halves that, "
                "and rounds small updates away."
            )
    return None


def activations(profile: Profile) -> str | None:
    """Without checkpointing what is kept for backward is much of LoRA's peak at every rank."""
    arms = _sized(profile)
    if profile.workload.get("gradient_checkpointing") or not arms:
        return None
    arm = arms[0]
    kept = arm.by_category["activations"]
    if kept < 0.25 * arm.peak_MiB:
        return None
    text = (
        f"Activations kept for backward are {_size(kept)} of the {_size(arm.peak_MiB)} at {arm.name}'s peak "
        f"({kept / arm.peak_MiB:.0%}), which no smaller rank saves. Gradient checkpointing recomputes them by "
        "layers (Chen et al. 2016, arXiv:1604.06174) for one more forward"
    )
    if arm.forward_ms is not None and arm.step_ms is not None:
        return text + f": up to {arm.forward_ms:.3g} ms on {arm.step_ms:.3g}."
    if arm.forward_flops:
        return text + f": up to {arm.forward_flops / (arm.forward_flops + arm.backward_flops):.0%} more FLOPs."
    return text + "."


def recomputation(profile: Profile) -> str | None:
    """With checkpointing LoRA loses more than full fine-tuning: its backward has no weight gradients to hide it."""
    full = profile.full
    arms = [arm for arm in profile.lora if arm.forward_flops]
    if not profile.workload.get("gradient_checkpointing") or not arms or not full.forward_flops:
        return None
    shares = [arm.forward_flops / (arm.forward_flops + arm.backward_flops) for arm in (arms[0], full)]
    return (
        f"Checkpointing runs the forward of the layers twice: up to {shares[0]:.0%} of {arms[0].name}'s FLOPs, "
        f"{shares[1]:.0%} of full's. Where the activations fit, LoRA is faster without."
    )


def foreach(profile: Profile) -> str | None:
    """An optimizer over lists of parameters holds temporaries of their size at its step."""
    if not profile.workload.get("foreach"):
        return None
    at_step = [
        arm
        for arm in (profile.full, *profile.lora)
        if arm.by_category and arm.peak_phase == "optimizer" and arm.by_category["temporaries"] >= WORTH * arm.peak_MiB
    ]
    if not at_step:
        return None
    arm = at_step[0]
    return (
        f"{profile.workload['optimizer']} with foreach holds {_size(arm.by_category['temporaries'])} of temporaries at "
        f"{arm.name}'s peak of {_size(arm.peak_MiB)}. --no-foreach takes them away: "
        + (
            "full fine-tuning's peak falls, and memory's crossover with it."
            if arm.kind == "full"
            else "large ranks get smaller."
        )
    )


def logits(profile: Profile) -> str | None:
    """The loss holds whole copies of the logits (tokens, vocabulary) in fp32."""
    work, arms = profile.workload, _sized(profile)
    if not work.get("vocab_size") or not arms or arms[0].peak_phase == "optimizer":
        return None
    arm = arms[0]
    copy = 4 * work["batch_size"] * work["seq_len"] * work["vocab_size"] / 2**20
    copies = int(arm.by_category["temporaries"] / copy + 0.05)
    if copies < 1 or copies * copy < WORTH * arm.peak_MiB:
        return None
    return (
        f"Output head: one fp32 copy of the logits, {work['batch_size'] * work['seq_len']:,} tokens × "
        f"{work['vocab_size']:,} words, is {_size(copy)}; the temporaries at {arm.name}'s peak are {copies} of them, "
        f"{copies * copy / arm.peak_MiB:.0%} of {_size(arm.peak_MiB)}, at every rank. A loss that never holds all "
        "logits (Cut Cross-Entropy, arXiv:2411.09009; Liger Kernel, arXiv:2410.10989) saves them."
    )


def dropout_masks(profile: Profile) -> str | None:
    """Every adapted layer draws a mask of its own over its input, and keeps a bit per element for backward."""
    work, arms = profile.workload, _sized(profile)
    if not work.get("lora_dropout") or not work.get("adapted") or not arms or work.get("gradient_checkpointing"):
        return None
    arm = arms[0]
    mask = work["batch_size"] * work["seq_len"] * work["adapted"]["in_features"] / 8 / 2**20
    if mask < 0.01 * arm.peak_MiB:
        return None
    return (
        f"Dropout {work['lora_dropout']:g}: {work['adapted']['modules']} layers draw and keep a mask each, "
        f"{_size(mask)} in bits, {mask / arm.peak_MiB:.0%} of {arm.name}'s peak. --lora-dropout 0 saves them and their "
        "time."
    )


def few_targets(profile: Profile) -> str | None:
    """Adapters on some layers only, where more of them would cost little."""
    work = profile.workload
    adapted, linears = work.get("adapted"), work.get("linears")
    if not adapted or (work["target_modules"] == "all-linear" and not work.get("exclude_modules")):
        return None
    arms = [arm for arm in profile.lora if arm.flops_ratio is not None]
    base = flops_ratio_at(arms, 0)
    if base is None or adapted["modules"] >= linears - 1:
        return None
    share = 1 - base / arms[0].flops_ratio
    if share >= WORTH:
        return None
    return (
        f"Targets: {adapted['modules']} of {linears} linear layers have adapters, and these are {share:.1%} of "
        f"{arms[0].name}'s FLOPs; the rest, {base:.2f} of full's, is the frozen model's at any rank. Adapting all "
        "layers costs little more, and QLoRA's authors needed it to match full fine-tuning (Dettmers et al. 2023, "
        "arXiv:2305.14314, section 4)."
    )


def peft(profile: Profile) -> str | None:
    """What PEFT costs beside it, at the ranks that both have."""
    ours = {arm.rank: arm for arm in profile.lora}
    pairs = [(arm, ours[arm.rank]) for arm in profile.arms if arm.kind == "peft" and arm.rank in ours]
    timed = [(a, b) for a, b in pairs if a.step_ms is not None and b.step_ms is not None]
    sized = [(a, b) for a, b in pairs if a.peak_MiB is not None and b.peak_MiB is not None]
    said = []
    if timed:
        ratios = _each([f"{a.step_ms / b.step_ms:.2f} (r{b.rank})" for a, b in timed])
        said.append(f"its steps take {ratios} times ours")
    elif projected := [(a, b) for a, b in pairs if a.projected_ratio is not None and b.projected_ratio is not None]:
        ratios = _each([f"{a.projected_ratio / b.projected_ratio:.2f} (r{b.rank})" for a, b in projected])
        said.append(f"its steps take, projected, {ratios} times ours")
    for where, sign in (("above", 1), ("below", -1)):
        apart = [(sign * (a.peak_MiB - b.peak_MiB), b) for a, b in sized]
        differences = [f"{_size(MiB)} (r{b.rank})" for MiB, b in apart if MiB > 0 or (MiB == 0 and sign > 0)]
        if differences:
            said.append(f"its peaks are {_each(differences)} {where} ours")
    if not said:
        return None
    text = f"PEFT beside it: {'; '.join(said)}."
    work = profile.workload
    kept = [(a, b) for a, b in sized if a.by_category and b.by_category]
    more = kept[0][0].by_category["activations"] - kept[0][1].by_category["activations"] if kept else 0
    if kept and more >= WORTH * kept[0][1].peak_MiB:
        text += f" At r{kept[0][1].rank} {_size(more)} are activations"
        if work["dtype"] in HALF and work.get("adapter_dtype") == "fp32":
            text += ": its fp32 adapters keep an fp32 copy of each layer's input"
        text += ". accelerate_peft takes a PEFT model as it is."
    return text


ADVICE = (
    *(slower_than_counted, optimizer_share, few_tokens, fp32_adapters, activations, recomputation),
    *(foreach, logits, dropout_masks, few_targets, peft),
)


def _sized(profile: Profile) -> list[Arm]:
    return [arm for arm in profile.lora if arm.peak_MiB and arm.by_category]


def _each(values: list[str]) -> str:
    return values[0] if len(values) == 1 else ", ".join(values[:-1]) + " and " + values[-1]


def _size(MiB: float) -> str:
    return f"{MiB / 1024:.2f} GiB" if abs(MiB) >= 1000 else f"{MiB:.0f} MiB" if abs(MiB) >= 10 else f"{MiB:.1f} MiB"
