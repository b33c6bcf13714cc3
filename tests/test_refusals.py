"""What cannot work is refused by name before a model is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_kvcompress.attention.heads import check
from vllm_kvcompress.config import SCHEDULERS, WORKERS
from vllm_kvcompress.settings import SettingsError


@pytest.fixture(scope="module")
def deep_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only the configuration of a Llama with 30 layers: no weights are ever read."""
    from transformers import LlamaConfig

    directory = tmp_path_factory.mktemp("deep-llama")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=30,
        max_position_embeddings=8192,
    ).save_pretrained(directory)
    return directory


def config_of(model: Path, settings: Any, **options: Any) -> Any:
    args = EngineArgs(
        str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=2048,
        kv_cache_memory_bytes=64 << 20,
        additional_config={"kvcompress": settings},
        **options,
    )
    return args.create_engine_config()


def test_classes_and_block_size_are_filled_in(deep_llama: Path) -> None:
    config = config_of(deep_llama, {"budget": 256})
    assert config.parallel_config.worker_cls in WORKERS.values()
    assert config.scheduler_config.scheduler_cls in SCHEDULERS.values()
    assert config.cache_config.block_size == 32


def test_a_chosen_block_size_stays(deep_llama: Path) -> None:
    assert config_of(deep_llama, {}, block_size=64).cache_config.block_size == 64


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budgt": 5}, "unknown setting 'budgt'"),
        ({"budget": "many"}, "budget='many'"),
        ({"budget": 512, "keep_ratio": 0.5}, "budget (512) and keep_ratio (0.5)"),
        ({"keep_ratio": 1.5}, "keep_ratio=1.5"),
        ({"pyramid_beta": -1.0}, "pyramid_beta=-1.0"),
        ({"skip_layers": [30]}, "layers 0 to 29"),
        ({"budget": 63}, "at least two blocks, 64 tokens"),
        ({"keep_ratio": 0.5, "max_budget": 63}, "max_budget=63 is not allowed: budget=63"),
        ({"budget": 128, "recent_tokens": 100}, "do not fit the smallest band"),
        ({"bands": 4}, "nearest good choices are 2, 3, 5"),
        ({"bands": 4, "skip_layers": [0, 1]}, "nearest good choices are"),
        (
            {"skip_heads": "29:1,30:0"},
            "there is no 30:0; the model has layers 0 to 29 with KV heads",
        ),
        ({"skip_heads": "0:0,4:2"}, "there is no 4:2"),
        ({"skip_heads": "0:0,3:1,4:0"}, "3 heads do not fill pages of 2 KV heads; name 2 or 4"),
        ({"skip_heads": "3:1"}, "1 heads do not fill pages of 2 KV heads; name 2."),
        ({"skip_heads": "3:0,4:1", "skip_layers": [4]}, "4:1 is in skip_layers=[4] already"),
        ({"skip_heads": "3:0,3:0"}, "a head is named twice"),
        (
            {"skip_heads": "0:0,0:1", "skip_layers": list(range(1, 30))},
            "with skip_heads it names every layer",
        ),
        ({"boost_heads": "3:0,30:1"}, "there is no 30:1; the model has layers 0 to 29"),
        ({"boost_heads": "3:1", "boost": 2.0}, "1 heads do not fill pages of 2 KV heads; name 2."),
        (
            {"boost_heads": "3:0,4:1", "skip_heads": "4:1,5:1"},
            "4:1 is in both skip_heads and boost",
        ),
        ({"boost_heads": "3:0,4:1", "bands": 2}, "boost_heads and bands (2) are both set"),
        ({"boost_heads": "3:0,4:1", "pyramid_beta": 2.0}, "boost_heads and pyramid_beta (2.0)"),
        ({"boost": 3.0}, "boost (3.0) is set, but no boost_heads"),
        ({"method": "snapkv"}, "streaming, random, merge, knorm+merge, none"),
        ({"method": "merge", "budget": 192}, "one block per power of two of the longest request"),
        ({"method": "knorm+merge", "budget": 192}, "raise budget, lower pyramid_beta or max_model"),
        ("knorm", "must be an object of settings"),
    ],
)
def test_bad_settings(settings: Any, said: str, deep_llama: Path) -> None:
    with pytest.raises(SettingsError) as raised:
        config_of(deep_llama, settings)
    message = str(raised.value)
    assert said in message
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 4}, "decode context"),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 3,
                }
            },
            "speculative decoding",
        ),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "KV connectors",
        ),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler_cls"),
        ({"worker_cls": "my.own.Worker"}, "worker_cls='my.own.Worker'"),
    ],
)
def test_unsupported_features(options: dict[str, Any], said: str, deep_llama: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        config_of(deep_llama, {"budget": 256}, **options)


def test_heads_stay_on_their_rank(deep_llama: Path) -> None:
    with pytest.raises(SettingsError, match="boost_heads cannot be combined with tensor parallel"):
        config_of(deep_llama, {"boost_heads": "3:0,7:1"}, tensor_parallel_size=2)
    config_of(deep_llama, {"skip_layers": [3]}, tensor_parallel_size=2)
    config_of(deep_llama, {"skip_heads": "3:0,7:1"})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"backend": "FLASH_ATTN"}, "backend FLASH_ATTN yet; choose CPU_ATTN or TRITON_ATTN with"),
        ({"sinks": object()}, "attention sinks; use skip_layers"),
        ({"query_quant": object()}, "quantized queries, .* kv_cache_dtype=fp8; use skip_layers"),
        ({"fused": True}, "fused with the rotary embedding"),
        ({"kv_heads": 4}, "layers.0 has 4 KV heads here, not the 2 of the model"),
    ],
)
def test_attention_that_was_not_tried_with_heads(changed: dict[str, Any], said: str) -> None:
    def layer(
        backend: str = "TRITON_ATTN",
        sinks: object = None,
        query_quant: object = None,
        fused: bool = False,
        kv_heads: int = 2,
    ) -> SimpleNamespace:
        return SimpleNamespace(
            layer_name="layers.0",
            attn_backend=SimpleNamespace(get_name=lambda: backend),
            impl=SimpleNamespace(sinks=sinks, fused_rope_kvcache_supported=lambda: fused),
            query_quant=query_quant,
            kv_cache_dtype="fp8",
            num_kv_heads=kv_heads,
        )

    check(layer(), 2)
    with pytest.raises(SettingsError, match=said):
        check(layer(**changed), 2)


def test_outputs_quantized_within_attention(deep_llama: Path) -> None:
    fused = {"pass_config": {"fuse_attn_quant": True}}
    with pytest.raises(SettingsError, match="fuse_attn_quant"):
        config_of(deep_llama, {"skip_heads": "3:0,7:1"}, compilation_config=fused)


def test_during_prefill_needs_chunks(deep_llama: Path) -> None:
    with pytest.raises(SettingsError, match="needs chunked prefill"):
        config_of(
            deep_llama,
            {"budget": 256, "phase": "during_prefill"},
            enable_chunked_prefill=False,
            max_num_batched_tokens=2048,
        )


def test_mixed_layers(tmp_path: Path) -> None:
    from transformers import Qwen2Config

    Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=64,
        max_window_layers=2,
    ).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="mix full attention with other kinds"):
        config_of(tmp_path, {"budget": 256})


def test_other_peoples_additional_config(deep_llama: Path) -> None:
    """Any object with ``compute_hash`` is fine with vLLM; it must not meet our check."""

    class Other:
        def compute_hash(self) -> str:
            return "x"

    args = EngineArgs(str(deep_llama), skip_tokenizer_init=True, additional_config=Other())
    assert args.create_engine_config().scheduler_config.scheduler_cls is None


def test_bands_need_the_hybrid_manager(deep_llama: Path) -> None:
    with pytest.raises(SettingsError, match="disable_hybrid_kv_cache_manager"):
        config_of(
            deep_llama,
            {"budget": 512, "bands": 6},
            disable_hybrid_kv_cache_manager=True,
        )


def test_another_vllm_is_refused_only_when_compressing(
    deep_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_kvcompress.plugin.version", lambda name: "0.40.1")
    with pytest.raises(RuntimeError, match=r">= 0\.32\.0 and < 0\.33 is supported; vllm 0\.40\.1"):
        config_of(deep_llama, {"budget": 256})
    EngineArgs(str(deep_llama), skip_tokenizer_init=True).create_engine_config()


def test_no_compressible_layer(tmp_path: Path) -> None:
    """A model of sliding-window layers only fails at start-up, by name."""
    from transformers import MistralConfig

    MistralConfig(
        architectures=["MistralForCausalLM"],
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=2,
        vocab_size=128,
        sliding_window=64,
        max_position_embeddings=512,
    ).save_pretrained(tmp_path)
    code = (
        "from vllm import LLM; LLM("
        f"{str(tmp_path)!r}, load_format='dummy', skip_tokenizer_init=True, dtype='float32', "
        "max_model_len=512, enforce_eager=True, kv_cache_memory_bytes=16 << 20, "
        "additional_config={'kvcompress': {'budget': 256}})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    assert run.returncode != 0
    assert "this model has no compressible layer" in run.stderr
