"""README's example runs as it stands, and its tables are what the committed result files say."""

import re
import subprocess
import sys
from pathlib import Path

import lora_fast
from lora_fast.checkpoint import read_adapter

ROOT = Path(__file__).resolve().parent.parent


def test_the_first_example_runs_and_saves_an_adapter(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config, tensors = read_adapter(tmp_path / "adapter")
    assert config.r == 16
    # One AdamW step has moved B away from zero.
    assert tensors["model.layers.0.self_attn.q_proj.lora_B.weight"].abs().max() > 0


def test_every_public_name_is_explained():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Names")[2].partition("\n## ")[0]
    assert [name for name in lora_fast.__all__ if not re.search(rf"`{name}\b", table)] == []


def test_the_tables_are_what_the_result_files_say():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
