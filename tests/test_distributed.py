"""Models spread over processes: gradients as in one process, and adapters saved, read, disabled and merged there."""

import json
import re
import warnings
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

PROCESSES = 2
# The head is in the model's own group, which FSDP2 leaves gathered after an evaluation.
TARGETS = ["q_proj", "up_proj", "lm_head"]
EPS = torch.finfo(torch.float32).eps


def tokens(number):
    return torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(number))


def adapted(start: bool | str = False, **config):
    """A Llama whose adapters differ from zero; the same in every process."""
    torch.manual_seed(0)
    model = apply_lora(build("llama"), LoraConfig(r=5, init_lora_weights=start, **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for factor in lora_parameters(model):
            factor.add_(torch.randn(factor.shape, generator=generator), alpha=0.05)
    return model


def of_peft():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=5, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), config)
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
MODELS = {"lora": adapted, "peft": of_peft}


def refusal(call):
    try:
        call()
    except LoraFastError as error:
        return str(error)
    return None


def everything(model, folder):
    """What one does with a trained adapter, each with what it gives."""
    found = {"adapted": logits(model)}
    save_adapter(model, folder)
    found["spectra"] = [spectrum.singular_values for spectrum in adapter_spectra(model).values()]
    with disable_adapters(model):
        found["disabled"] = logits(model)
    merge_lora(model)
    found["merged"] = logits(model)
    unmerge_lora(model)
    found["unmerged"] = logits(model)
    remove_lora(model)
    found["removed"] = logits(model)
    return found


def worker(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # FSDP1 lists each module that trains only some of its parameters
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    results, keep = {}, []
    for (way, distribute), (kind, make) in ((w, k) for w in WAYS.items() for k in MODELS.items()):
        model, call = distribute(make().train())
        found = gradients(model, call, [rank])
        if way == "fsdp1":
            with FullyShardedDataParallel.summon_full_params(call, with_grads=True):
                found = gradients(model, call, [])
                found = {name: gradient.clone() for name, gradient in found.items()}
        results[way, kind] = found
        results["calls", way, kind] = dict(calls_by_path(model))
        keep.append(call)
    for start in (False, "pissa"):
        results["all", start] = everything(
            sharded(adapted(start, bias="all", target_modules=TARGETS))[0], f"{folder}/{start}"
        )
    model, _ = sharded(adapted("pissa"))
    save_adapter(model, f"{folder}/portable", portable=True)
    merged = adapted()
    merge_lora(merged)
    merged, _ = sharded(merged)
    unmerge_lora(merged)
    results["unmerged after sharding"] = logits(merged)
    model, _ = sharded(adapted())
    results["refused"] = {
        "apply": refusal(lambda: apply_lora(sharded(build("llama"))[0], LoraConfig())),
        "load": refusal(lambda: load_adapter(model, f"{folder}/False", adapter_name="second")),
        "save": refusal(lambda: save_adapter(model, f"{folder}/store")),
    }
    model, call = in_ddp(adapted())
    results["refused"]["apply to ddp"] = refusal(lambda: apply_lora(call, LoraConfig(), adapter_name="second"))
    results["refused"]["save ddp"] = refusal(lambda: save_adapter(call, f"{folder}/ddp"))
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
    root = FullyShardedDataParallel(build("llama"), use_orig_params=True, device_id=torch.device("cpu"))
    results["refused"]["apply inside fsdp1"] = refusal(lambda: apply_lora(root.module, LoraConfig()))
    two = adapted(modules_to_save=["lm_head"])
    apply_lora(two, LoraConfig(r=3, target_modules=["q_proj"]), adapter_name="second")
    two, _ = sharded(two)
    results["refused"]["switch"] = refusal(lambda: set_adapter(two, "default"))
    with FullyShardedDataParallel.summon_full_params(call):
        if rank == 0:
            save_adapter(model, f"{folder}/fsdp1")
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


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_all_batches_in_one_process(run, way, kind):
    model = MODELS[kind]().train()
    expected = gradients(model, model, range(PROCESSES))
    for results in run[1]:
        found = results[way, kind]
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name])
        calls = results["calls", way, kind]
        assert set(calls) == {("lora_linear", None), ("lora_linears", None), ("lora_swiglu_mlp", None)}


@pytest.mark.parametrize("start", [False, "pissa"])
def test_a_sharded_model_does_what_a_whole_one_does(run, start, tmp_path):
    folder, processes = run
    expected = everything(adapted(start, bias="all", target_modules=TARGETS), tmp_path / "one")
    for results in processes:
        found = results["all", start]
        for singular, values in zip(found.pop("spectra"), expected["spectra"], strict=True):
            assert_close(torch.as_tensor(singular), torch.as_tensor(values))
        for name, value in found.items():
            assert_close(value, expected[name])
    # One file, the same to the byte as from one process.
    assert sorted(path.name for path in (folder / str(start)).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / str(start) / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_portable_and_unmerged(run):
    folder, processes = run
    assert json.loads((folder / "portable" / "adapter_config.json").read_text())["r"] == 10
    assert_close(logits(load_adapter(build("llama"), folder / "portable")), logits(adapted("pissa")))
    for results in processes:
        assert_close(results["unmerged after sharding"], logits(adapted()))


def test_what_would_go_wrong_in_silence_is_refused_in_every_process(run):
    folder, processes = run
    first, second = (results["refused"] for results in processes)
    for refused in (first, second):
        for name, told in (("apply", "sharded over processes"), ("load", "sharded over processes")):
            assert told in refused[name] and "nothing would average the gradients" in refused[name]
        for name, wrapper in (("apply to ddp", "DistributedData"), ("apply to fsdp1", "FullyShardedData")):
            assert f"wrapped in {wrapper}Parallel" in refused[name] and "put them in first" in refused[name]
        assert "work on the model inside: model.module" in refused["save ddp"]
        for name in ("save", "merge", "spectra", "remove", "disable"):
            assert "holds model.layers.0.self_attn.q_proj in pieces" in refused[f"{name} fsdp1"]
            assert "summon_full_params(model)" in refused[f"{name} fsdp1"]
        assert "in pieces already, so that nothing would average the gradients" in refused["apply inside fsdp1"]
        assert "sharded over processes" in refused["switch"] and "choose the adapter first" in refused["switch"]
        for name, how in (("sharded", "sharded over processes"), ("in_fsdp1", "wrapped in FullyShardedDataParallel")):
            assert how in refused[f"accelerate {name}"] and "accelerate it first" in refused[f"accelerate {name}"]
        assert f"{folder}/store is a file; expected a folder for the adapter" in refused["save"]
    assert second["save"].startswith("in the first process: ")


def test_fsdp1s_whole_parameters_are_saved_under_the_models_own_names(run):
    assert_close(logits(load_adapter(build("llama"), run[0] / "fsdp1")), logits(adapted()))


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
