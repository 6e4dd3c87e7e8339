"""Models spread over processes: gradients as in one process, and adapters saved, read, disabled and merged there."""

import json
import re
import warnings
from contextlib import nullcontext
from functools import partial

import peft
import pytest
import torch
from support import build
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from lora_fast import (
    LoraConfig,
    LoraFastError,
    accelerate_peft,
    adapter_spectra,
    amplification_factor,
    apply_lora,
    disable_adapters,
    load_adapter,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_adapter,
    set_adapter,
    unmerge_lora,
)
from lora_fast.fusion import calls_by_path
from lora_fast.injection import lora_layers

PROCESSES = 2
# The head is in the model's own group, which FSDP2 leaves gathered after an evaluation.
TARGETS = ["q_proj", "up_proj", "lm_head"]
# Of three experts over two processes: a piece of lora_A ends inside of one. A router runs by W + ΔW formed.
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
MIXTURE = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}
DOWN = "model.layers.1.mlp.experts.down_proj"
EPS = torch.finfo(torch.float32).eps


def tokens(number):
    return torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(number))


def adapted(start: bool | str = False, family="llama", **config):
    """A model whose adapters differ from zero; the same in every process."""
    torch.manual_seed(0)
    model = apply_lora(build(family), LoraConfig(r=5, init_lora_weights=start, **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for factor in lora_parameters(model):
            factor.add_(torch.randn(factor.shape, generator=generator), alpha=0.05)
    return model


def of_peft(family="llama", **config):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=5, init_lora_weights=False, **{"target_modules": "all-linear"} | config)
    model = peft.get_peft_model(build(family), config)
    accelerate_peft(model)
    return model


def base_of(model):
    return model.base_model.model if isinstance(model, peft.PeftModel) else model


def gradients(model, call, numbers):
    """{name: gradient} of the mean loss over these batches, whole and without wrappers' names."""
    for number in numbers:
        (call(input_ids=tokens(number), labels=tokens(number)).loss / len(numbers)).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            gradient = parameter.grad
            name = re.sub(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.", "", name)
            found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


def logits(model):
    if hasattr(model, "reshard"):
        model.reshard()  # as a training step does: what was written into gathered parameters is gone
    with torch.no_grad():
        return model.eval()(input_ids=tokens(0)).logits


def in_ddp(model):
    return model, DistributedDataParallel(model)


def sharded(model):
    mesh = torch.distributed.init_device_mesh("cpu", (PROCESSES,))
    for layer in base_of(model).model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, model


def checkpointed_and_sharded(model):
    layers = base_of(model).model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    return sharded(model)


def in_fsdp1(model):
    policy = ModuleWrapPolicy({type(base_of(model).model.layers[0])})
    device = torch.device("cpu")
    wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
    return model, wrapped


WAYS = {"ddp": in_ddp, "sharded": sharded, "checkpointed": checkpointed_and_sharded, "fsdp1": in_fsdp1}
mixture = partial(adapted, family="mixtral", rank_pattern={"gate.weight": 2}, **MIXTURE)
of_peft_on_experts = partial(of_peft, family="mixtral", **MIXTURE)
dora = partial(adapted, use_dora=True)
MODELS = {"lora": adapted, "dora": dora, "experts": mixture, "peft": of_peft, "peft experts": of_peft_on_experts}
LINEARS = {("lora_linear", None), ("lora_linears", None), ("lora_swiglu_mlp", None)}
FORMED = "MixtralTopKRouter is no module of experts as Transformers describes them"
EXPERTS = {("lora_linear", None), ("lora_experts", None)}
CALLS = {
    "lora": LINEARS,
    "dora": LINEARS - {("lora_swiglu_mlp", None)},
    "experts": EXPERTS | {("formed", FORMED)},
    "peft": LINEARS,
    "peft experts": EXPERTS,
}
# PEFT's own adapters of experts fail under FSDP1: a parametrization changes a view of the flat parameter in place.
SPREAD = [(way, kind) for way in WAYS for kind in MODELS if (way, kind) != ("fsdp1", "peft experts")]
DONE = {
    "lora": partial(adapted, bias="all", target_modules=TARGETS),
    "pissa": partial(adapted, "pissa", bias="all", target_modules=TARGETS),
    "dora": partial(dora, target_modules=TARGETS),
    "experts": mixture,
}


def refusal(call):
    try:
        call()
    except LoraFastError as error:
        return str(error)
    return None


def whole(call):
    """Inside, FSDP1's parameters are whole."""
    fsdp1 = isinstance(call, FullyShardedDataParallel)
    return FullyShardedDataParallel.summon_full_params(call) if fsdp1 else nullcontext()


def singular_values(model):
    return torch.cat([spectrum.singular_values for spectrum in adapter_spectra(model).values()])


def everything(model, call, folder):
    """What one does with a trained adapter, each with what it gives."""
    found = {"adapted": logits(call)}
    with whole(call):
        save_adapter(model, folder)
        if not any(hasattr(module, "lora_magnitude_vector") for module in model.modules()):  # DoRA has none
            found["singular values"] = singular_values(model)
            sizes = amplification_factor(model, base=model).values()
            found["sizes"] = torch.tensor([(size.projected_norm, size.weight_norm) for size in sizes])
        disabled = disable_adapters(model)
        disabled.__enter__()  # its end is in another of these blocks
    found["disabled"] = logits(call)
    with whole(call):
        disabled.__exit__(None, None, None)
        merge_lora(model)
    found["merged"] = logits(call)
    with whole(call):
        unmerge_lora(model)
    found["unmerged"] = logits(call)
    with whole(call):
        remove_lora(model)
    found["removed"] = logits(call)
    return found


@torch.no_grad()
def unmergeable(value, *, weight):
    """A sharded mixture with this number in the part of the last process alone: in lora_A, or in a weight that the
    update then makes overflow."""
    model = mixture()
    layer = lora_layers(model)[DOWN]
    lora_A, lora_B = (factors["default"].weight for factors in (layer.lora_A, layer.lora_B))
    if weight:
        lora_A.fill_(1e18), lora_B.fill_(1e18)
    (layer.weight if weight else lora_A)[-1] = value
    return sharded(model)[0]


def worker(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # FSDP1 lists each module that trains only some of its parameters
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    results, keep = {}, []
    for way, kind in SPREAD:
        model, call = WAYS[way](MODELS[kind]().train())
        found = gradients(model, call, [rank])
        if way == "fsdp1":
            with FullyShardedDataParallel.summon_full_params(call, with_grads=True):
                found = gradients(model, call, [])
                found = {name: gradient.clone() for name, gradient in found.items()}
        results[way, kind] = found
        results["calls", way, kind] = dict(calls_by_path(model))
        keep.append(call)
    for kind, make in DONE.items():
        results["done", "sharded", kind] = everything(*sharded(make()), f"{folder}/sharded {kind}")
        results["done", "fsdp1", kind] = everything(*in_fsdp1(make()), f"{folder}/fsdp1 {kind} {rank}")
    model, _ = sharded(adapted("pissa"))
    save_adapter(model, f"{folder}/portable", portable=True)
    for kind in ("lora", "experts"):
        merged = MODELS[kind]()
        merge_lora(merged)
        merged, _ = sharded(merged)
        unmerge_lora(merged)
        results["unmerged after sharding", kind] = logits(merged)
    results["spectra of peft"] = singular_values(sharded(of_peft_on_experts())[0])
    model, _ = sharded(adapted())
    results["refused"] = {
        "apply": refusal(lambda: apply_lora(sharded(build("llama"))[0], LoraConfig())),
        "load": refusal(lambda: load_adapter(model, f"{folder}/sharded lora", adapter_name="second")),
        "save": refusal(lambda: save_adapter(model, f"{folder}/store")),
        "portable": refusal(lambda: save_adapter(sharded(mixture())[0], f"{folder}/none", portable=True)),
        "merge nan": refusal(lambda: merge_lora(unmergeable(torch.nan, weight=False))),
        "merge too large": refusal(lambda: merge_lora(unmergeable(3.4e38, weight=True))),
    }
    model, call = in_ddp(adapted())
    results["refused"]["apply to ddp"] = refusal(lambda: apply_lora(call, LoraConfig(), adapter_name="second"))
    results["refused"]["save ddp"] = refusal(lambda: save_adapter(call, f"{folder}/ddp"))
    merged = adapted()
    merge_lora(merged)
    merged, _ = in_fsdp1(merged)
    results["refused"]["unmerge fsdp1"] = refusal(lambda: unmerge_lora(merged))
    model, call = in_fsdp1(adapted())
    results["refused"]["apply to fsdp1"] = refusal(lambda: apply_lora(call, LoraConfig(), adapter_name="second"))
    results["refused"]["save fsdp1"] = refusal(lambda: save_adapter(model, f"{folder}/fsdp1"))
    results["refused"]["merge fsdp1"] = refusal(lambda: merge_lora(model))
    for way in (sharded, in_fsdp1):
        late = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        late = way(late)[1]
        results["refused"][f"accelerate {way.__name__}"] = refusal(lambda late=late: accelerate_peft(late))
    results["refused"]["spectra fsdp1"] = refusal(lambda: adapter_spectra(model))
    pissa, _ = in_fsdp1(adapted("pissa"))
    results["refused"]["remove fsdp1"] = refusal(lambda: remove_lora(pissa))
    results["refused"]["disable fsdp1"] = refusal(lambda: disable_adapters(pissa).__enter__())
    for family, config in (("llama", LoraConfig()), ("mixtral", LoraConfig(**MIXTURE))):
        root = FullyShardedDataParallel(build(family), use_orig_params=True, device_id=torch.device("cpu")).module
        told = refusal(lambda root=root, config=config: apply_lora(root, config))
        results["refused"][f"apply inside fsdp1 {family}"] = told
    two = adapted(modules_to_save=["lm_head"])
    apply_lora(two, LoraConfig(r=3, target_modules=["q_proj"]), adapter_name="second")
    two, _ = sharded(two)
    results["refused"]["switch"] = refusal(lambda: set_adapter(two, "default"))
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, results of each process)."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=PROCESSES)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() <= 256 * EPS * theirs.abs().max() and theirs.abs().max() > 0


@pytest.mark.parametrize(("way", "kind"), SPREAD)
def test_gradients_are_those_of_all_batches_in_one_process(run, way, kind):
    model = MODELS[kind]().train()
    expected = gradients(model, model, range(PROCESSES))
    calls = CALLS[kind]
    if (way, kind) == ("fsdp1", "experts"):
        calls = calls - EXPERTS | {("lora_linear", None), ("formed", "gate_up_proj is computed from what is trained")}
    for results in run[1]:
        found = results[way, kind]
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name])
        assert set(results["calls", way, kind]) == calls


@pytest.mark.parametrize("kind", DONE)
def test_a_sharded_model_does_what_a_whole_one_does(run, kind, tmp_path):
    folder, processes = run
    model = DONE[kind]()
    expected = everything(model, model, tmp_path / "one")
    for results in processes:
        for way in ("sharded", "fsdp1"):
            found = results["done", way, kind]
            assert found.keys() == expected.keys()
            for name, value in found.items():
                assert_close(value, expected[name])
    # One file, the same to the byte as from one process.
    for written in (f"sharded {kind}", *(f"fsdp1 {kind} {rank}" for rank in range(PROCESSES))):
        names = ["adapter_config.json", "adapter_model.safetensors"]
        assert sorted(path.name for path in (folder / written).iterdir()) == names
        for name in names:
            assert (folder / written / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_portable_and_unmerged_and_pefts_spectra(run):
    folder, processes = run
    assert json.loads((folder / "portable" / "adapter_config.json").read_text())["r"] == 10
    assert_close(logits(load_adapter(build("llama"), folder / "portable")), logits(adapted("pissa")))
    for results in processes:
        for kind in ("lora", "experts"):
            assert_close(results["unmerged after sharding", kind], logits(MODELS[kind]()))
        assert_close(results["spectra of peft"], singular_values(of_peft_on_experts()))


def test_what_would_go_wrong_in_silence_is_refused_in_every_process(run):
    folder, processes = run
    first, second = (results["refused"] for results in processes)
    for refused in (first, second):
        for name, told in (("apply", "sharded over processes"), ("load", "sharded over processes")):
            assert told in refused[name] and "nothing would average the gradients" in refused[name]
        for name, wrapper in (("apply to ddp", "DistributedData"), ("apply to fsdp1", "FullyShardedData")):
            assert f"wrapped in {wrapper}Parallel" in refused[name] and "put them in first" in refused[name]
        assert "work on the model inside: model.module" in refused["save ddp"]
        for name in ("save", "merge", "unmerge", "spectra", "remove", "disable"):
            assert "holds model.layers.0.self_attn.q_proj in pieces" in refused[f"{name} fsdp1"]
            assert "summon_full_params(model)" in refused[f"{name} fsdp1"]
        for family in ("llama", "mixtral"):
            told = refused[f"apply inside fsdp1 {family}"]
            assert "FullyShardedDataParallel's pieces already, so that nothing would average the gradients" in told
        assert "portable=True: model.layers.0.mlp.gate.weight is no linear layer" in refused["portable"]
        assert f"holds NaN or inf in {DOWN}; nothing was merged" in refused["merge nan"]
        assert f"into {DOWN} exceeds what torch.float32 holds" in refused["merge too large"]
        assert "sharded over processes" in refused["switch"] and "choose the adapter first" in refused["switch"]
        for name, how in (("sharded", "sharded over processes"), ("in_fsdp1", "wrapped in FullyShardedDataParallel")):
            assert how in refused[f"accelerate {name}"] and "accelerate it first" in refused[f"accelerate {name}"]
        assert f"{folder}/store is a file; expected a folder for the adapter" in refused["save"]
    assert second["save"].startswith("in the first process: ")


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, partial(torch.compile, backend="eager")])
@pytest.mark.parametrize("first", ["wrapped", "adapted"])
def test_wrappers_inside_a_model_stay_out_of_configs_and_files(tmp_path, wrap, first):
    config = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 3}}
    plain = adapted(target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], **config)
    save_adapter(plain, tmp_path / "plain")

    def wrapped(model):
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj = wrap(layer.self_attn.q_proj)
            model.model.layers[i] = wrap(layer)
        model.lm_head = wrap(model.lm_head)
        return model

    if first == "wrapped":
        model = load_adapter(wrapped(build("llama")), tmp_path / "plain")
    else:
        model = wrapped(load_adapter(build("llama"), tmp_path / "plain"))
    assert_close(logits(model), logits(plain))
    assert list(adapter_spectra(model)) == list(adapter_spectra(plain))
    save_adapter(model, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    with disable_adapters(model):
        assert_close(logits(model), logits(build("llama")))
    remove_lora(model)
    assert_close(logits(model), logits(build("llama")))
    assert all(parameter.requires_grad for parameter in model.parameters())
