"""Predicted memory of one process under FSDP2 against what the real thing allocates, all but the network: a process
group whose collectives do nothing."""

import itertools
import json
import warnings

import pytest
import torch
from torch._C._profiler import _EventType
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile, record_function
from torch.testing._internal.distributed.fake_pg import FakeStore

from lora_fast import LoraFastWarning
from lora_fast.profiler.memory import PHASES
from lora_fast.profiler.models import build, resolve
from lora_fast.profiler.predict import predict
from lora_fast.profiler.workload import Workload, loss_of, optimizer_of, train_adapter, train_full

pytestmark = pytest.mark.filterwarnings("ignore::lora_fast.LoraFastWarning")
BASE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "layers": {"model_type": "llama", **BASE, "vocab_size": 128},  # the layers decide
    "logits": {"model_type": "llama", **BASE, "vocab_size": 4096},  # the rest and the logits do
    "tied": {"model_type": "llama", **BASE, "vocab_size": 1024, "tie_word_embeddings": True},
    "experts": {"model_type": "mixtral", **BASE, "vocab_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2},
}
OPTIONS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation": 2},
    "foreach": {"foreach": True},
    "dropout": {"lora_dropout": 0.1},
}
CASES = [
    *itertools.product(("layers",), ("plain", "checkpointing"), (8, None), (2, 4)),
    *itertools.product(("logits", "tied", "experts"), ("checkpointing",), (8, None), (2,)),
    ("layers", "accumulation", 8, 4),
    ("layers", "accumulation", None, 4),
    ("layers", "foreach", None, 4),
    ("layers", "dropout", 8, 4),
    ("layers", "plain", 96, 4),  # adapters as large as the layers
]


def workload(option):
    fields = {
        "batch_size": 1,
        "seq_len": 32,
        "dtype": "fp32",
        "target_modules": "all-linear",
        "device": "cpu",
        "seed": 0,
    }
    return Workload(**{**fields, **OPTIONS[option]})


def allocations(call):
    """[(time in ns, bytes more or less)] of PyTorch's CPU allocator in `call`, [(time, phase that starts)]."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    changes, starts = [], {phase: [] for phase in PHASES}
    events = list(recorded.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.typed[0] == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
        elif event.name in starts:
            starts[event.name].append(event.start_time_ns)
    return sorted(changes), sorted((time, phase) for phase, times in starts.items() for time in times)


def measured(source, work, rank, processes):
    """{phase: bytes at its peak} of the second step of the first of so many processes."""
    model = build(source, device="cpu", dtype=work.torch_dtype)
    trained = train_full(model, work) if rank is None else train_adapter(model, work, rank)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {names[id(parameter)] for parameter in trained}
    mesh = torch.distributed.init_device_mesh("cpu", (processes,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(work, [p for name, p in model.named_parameters() if name in names])
    batch = work.batch(model)

    def step():
        for _ in range(work.gradient_accumulation):
            with record_function("forward"):
                loss = loss_of(model, batch)
            with record_function("backward"):
                loss.backward()
            del loss
        with record_function("optimizer"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    changes, starts = allocations(step)
    states = (value for state in optimizer.state.values() for value in state.values())
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*map(local, (*model.parameters(), *states)), *model.buffers(), *batch.values())
    }
    now, peaks, place = sum(held.values()), dict.fromkeys(PHASES, 0), -1
    for time, size in changes:
        now += size
        while place + 1 < len(starts) and starts[place + 1][0] <= time:
            place += 1
        if place >= 0:
            phase = starts[place][1]
            peaks[phase] = max(peaks[phase], now)
    return peaks


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def worker(_, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", LoraFastWarning)
    results = []
    for processes in (2, 4):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        for config, option, rank, size in CASES:
            if size == processes:
                source = resolve(f"{folder}/{config}.json")
                results.append(((config, option, rank, size), measured(source, workload(option), rank, size)))
        torch.distributed.destroy_process_group()
    torch.save(results, f"{folder}/measured.pt")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    torch.multiprocessing.spawn(worker, args=(str(folder),))
    return folder, dict(torch.load(folder / "measured.pt"))


@pytest.mark.parametrize(("config", "option", "rank", "processes"), CASES)
def test_what_is_predicted_is_what_fsdp2_allocates(run, config, option, rank, processes):
    folder, results = run
    found = predict(resolve(str(folder / f"{config}.json")), workload(option), rank, shards=processes)
    for phase, peak in results[config, option, rank, processes].items():
        assert sum(found.phases[phase].values()) == pytest.approx(peak, rel=0.01), phase
