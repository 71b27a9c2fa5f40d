"""GPT-NeoX checkpoints of small MetaLA models, as an oracle for the converter: written from the
definition of the tensor-parallel layer, without the converter's table."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

TOKENS = 90


@dataclass(frozen=True)
class Model:
    """The settings of a model, and its weights."""

    layers: int = 2
    d: int = 32
    heads: int = 4
    f: int = 24
    tied: bool = False
    norm: str = "simplermsnorm"
    self_augmentation: bool = True
    conv_width: int = 4
    expand_k: float = 0.5
    tokens: int = TOKENS
    divisible_by: int = 16
    dtype: torch.dtype = torch.float32
    attention: tuple[int, ...] = ()
    kv_heads: int = 4
    attention_f: int = 8  # a third of f, which is what GPT-NeoX makes of it
    bias: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    def rows(self, tp: int) -> int:
        rows = self.tokens
        while rows % (self.divisible_by * tp):
            rows += 1
        return rows

    def yaml(self, tp: int, pp: int, vocab_file: Path | None) -> dict[str, Any]:
        of_attention = {
            "num_kv_heads": self.kv_heads,
            "use_bias_in_attn_linear": self.bias,
            "use_bias_in_mlp": self.bias,
        }
        return {
            "num_layers": self.layers,
            "hidden_size": self.d,
            "num_attention_heads": self.heads,
            "intermediate_size": self.f,
            "seq_length": 32,
            "max_position_embeddings": 32,
            "attention_config": [
                "global" if i in self.attention else "metala" for i in range(self.layers)
            ],
            "metala": {
                "conv_width": self.conv_width,
                "self_augmentation": self.self_augmentation,
                "expand_k": self.expand_k,
            },
            "norm": self.norm,
            **({} if self.norm == "layernorm" else {"rms_norm_epsilon": 1.0e-6}),
            "activation": "swiglu",
            "pos_emb": "none",
            "no_weight_tying": not self.tied,
            "make_vocab_size_divisible_by": self.divisible_by,
            "tokenizer_type": "HFTokenizer",
            "vocab_file": str(vocab_file),
            "model_parallel_size": tp,
            "pipe_parallel_size": pp,
            **(of_attention if self.attention else {}),
            **self.settings,
        }

    def tensors(self, rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Returns random Hugging Face tensors, padding rows included. They depend on the seed and
        not on the number of padding rows."""
        made: dict[str, torch.Tensor] = {}

        def random_tensor(name: str, *size: int, scale: float = 1.0, mean: float = 0.0) -> None:
            generator = torch.Generator().manual_seed(hash_of(name) + seed)
            values = torch.randn(size, generator=generator) * scale + mean
            made[name] = values.to(self.dtype)

        def vocabulary(name: str, scale: float) -> None:
            random_tensor(name, 4 * self.tokens, self.d, scale=scale)
            made[name] = made[name][:rows].clone()

        def linear(name: str, out: int, in_: int, bias: bool = False) -> None:
            random_tensor(f"{name}.weight", out, in_, scale=in_**-0.5)
            if bias:
                random_tensor(f"{name}.bias", out)

        def norm(name: str) -> None:
            if self.norm != "simplermsnorm":
                random_tensor(f"{name}.weight", d, scale=0.3, mean=1.0)
            if self.norm == "layernorm":
                random_tensor(f"{name}.bias", d, scale=0.3)

        d = self.d
        vocabulary("model.embed_tokens.weight", 1.0)
        for i in range(self.layers):
            mixer = f"model.layers.{i}.token_mixer"
            mlp = f"model.layers.{i}.channel_mixer"
            is_attention = i in self.attention
            bias, f = is_attention and self.bias, self.attention_f if is_attention else self.f
            if is_attention:
                linear(f"{mixer}.q_proj", d, d, bias)
                for name in ("k_proj", "v_proj"):
                    linear(f"{mixer}.{name}", self.kv_heads * d // self.heads, d, bias)
            else:
                random_tensor(f"{mixer}.conv1d.weight", d, 1, self.conv_width, scale=0.5)
                columns = int(self.expand_k * d)
                linear(f"{mixer}.q_proj", columns, d)
                linear(f"{mixer}.k_gate", columns, d)
                linear(f"{mixer}.v_proj", d, d)
                linear(f"{mixer}.g_proj", d, d, bias=True)
                if self.self_augmentation:
                    random_tensor(f"{mixer}.aug_balance", columns, scale=10.0)
            linear(f"{mixer}.out_proj", d, d, bias)
            linear(f"{mlp}.l1", f, d, bias)
            linear(f"{mlp}.l2", f, d, bias)
            linear(f"{mlp}.l3", d, f, bias)
            norm(f"model.layers.{i}.token_norm")
            norm(f"model.layers.{i}.channel_norm")
        norm("model.final_norm")
        if not self.tied:
            vocabulary("lm_head.weight", d**-0.5)
        return made


def hash_of(name: str) -> int:
    """Returns a hash that is the same in every process, unlike `hash`."""
    return sum((i + 1) * ord(c) for i, c in enumerate(name))


def attention_layer(
    model: Model, mixer: dict[str, torch.Tensor], mlp: dict[str, torch.Tensor], tp: int, rank: int
) -> dict[str, torch.Tensor]:
    """Returns the tensors of GPT-NeoX's `ParallelTransformerLayer` on one rank."""
    width = model.d // model.heads
    my_heads = range(rank * model.heads // tp, (rank + 1) * model.heads // tp)
    mine = slice(my_heads.start * width, my_heads.stop * width)
    my_keys = slice(rank * model.kv_heads // tp * width, (rank + 1) * model.kv_heads // tp * width)
    my_f = slice(rank * model.attention_f // tp, (rank + 1) * model.attention_f // tp)
    layer = {
        "attention.dense.weight": mixer["out_proj.weight"][:, mine],
        "mlp.linear2.weight": mlp["l3.weight"][:, my_f],
    }
    if model.bias:
        layer["attention.dense.bias"] = mixer["out_proj.bias"]
        layer["mlp.linear2.bias"] = mlp["l3.bias"]
    for kind in ("weight", "bias") if model.bias else ("weight",):
        q, k, v = (mixer[f"{name}.{kind}"] for name in ("q_proj", "k_proj", "v_proj"))
        if model.kv_heads == model.heads:
            rows = []
            for h in my_heads:
                rows += [x[h * width : (h + 1) * width] for x in (q, k, v)]
        else:
            rows = [q[mine], k[my_keys], v[my_keys]]
        layer[f"attention.query_key_value.{kind}"] = torch.cat(rows)
        # GPT-NeoX computes `x, gate = chunk(2)` and activates the gate.
        layer[f"mlp.linear1.{kind}"] = torch.cat([mlp[f"l2.{kind}"][my_f], mlp[f"l1.{kind}"][my_f]])
    return layer


def norm_tensors(
    model: Model, hf: dict[str, torch.Tensor], name: str, hf_name: str
) -> dict[str, torch.Tensor]:
    """Returns a norm's tensors: `scale` of GPT-NeoX's RMSNorm, `weight` and `bias` of LayerNorm."""
    if model.norm == "layernorm":
        return {f"{name}.{kind}": hf[f"{hf_name}.{kind}"] for kind in ("weight", "bias")}
    return {f"{name}.scale": hf[f"{hf_name}.weight"]} if model.norm == "rmsnorm" else {}


def rank_layers(
    model: Model, hf: dict[str, torch.Tensor], tp: int, rank: int
) -> dict[int, dict[str, torch.Tensor]]:
    """Returns the tensors of each GPT-NeoX layer on one rank."""
    d, f, heads = model.d, model.f, model.heads
    key, value = int(model.expand_k * d) // heads, d // heads
    my_heads = range(rank * heads // tp, (rank + 1) * heads // tp)
    my_width = slice(rank * f // tp, (rank + 1) * f // tp)
    rows = hf["model.embed_tokens.weight"].shape[0]
    my_tokens = slice(rank * rows // tp, (rank + 1) * rows // tp)

    layers: dict[int, dict[str, torch.Tensor]] = {
        0: {"word_embeddings.weight": hf["model.embed_tokens.weight"][my_tokens]}
    }
    for i in range(model.layers):
        mixer, channel = (
            {
                name.removeprefix(f"model.layers.{i}.{part}."): tensor
                for name, tensor in hf.items()
                if name.startswith(f"model.layers.{i}.{part}.")
            }
            for part in ("token_mixer", "channel_mixer")
        )
        if i in model.attention:
            layers[i + 2] = attention_layer(model, mixer, channel, tp, rank)
            for name, of in (("input", "token"), ("post_attention", "channel")):
                layers[i + 2] |= norm_tensors(
                    model, hf, f"{name}_layernorm", f"model.layers.{i}.{of}_norm"
                )
            continue
        in_proj, bias, aug, out_proj = [], [], [], []
        for h in my_heads:
            of_key = slice(h * key, (h + 1) * key)
            of_value = slice(h * value, (h + 1) * value)
            in_proj += [mixer["q_proj.weight"][of_key], mixer["k_gate.weight"][of_key]]
            in_proj += [mixer["v_proj.weight"][of_value], mixer["g_proj.weight"][of_value]]
            bias.append(mixer["g_proj.bias"][of_value])
            out_proj.append(mixer["out_proj.weight"][:, of_value])
            if model.self_augmentation:
                aug.append(mixer["aug_balance"][of_key])
        layer = {
            "mixer.conv1d.weight": mixer["conv1d.weight"],
            "mixer.in_proj.weight": torch.cat(in_proj),
            "mixer.out_gate_bias": torch.stack(bias),
            "mixer.out_proj.weight": torch.cat(out_proj, dim=1),
            "mlp.gate_up_proj.weight": torch.cat(
                [channel["l1.weight"][my_width], channel["l2.weight"][my_width]]
            ),
            "mlp.down_proj.weight": channel["l3.weight"][:, my_width],
        }
        if model.self_augmentation:
            layer["mixer.aug_balance"] = torch.stack(aug)
        layer |= norm_tensors(model, hf, "input_norm", f"model.layers.{i}.token_norm")
        layer |= norm_tensors(model, hf, "mlp_norm", f"model.layers.{i}.channel_norm")
        layers[i + 2] = layer
    layers[model.layers + 3] = norm_tensors(model, hf, "norm", "model.final_norm")
    if not model.tied:
        layers[model.layers + 4] = {"final_linear.weight": hf["lm_head.weight"][my_tokens]}
    return {
        index: {name: tensor.clone() for name, tensor in layer.items()}
        for index, layer in layers.items()
    }


def write(
    folder: Path,
    model: Model,
    tp: int = 1,
    pp: int = 0,
    vocab_file: Path | None = None,
    iteration: int = 7,
    configs: dict[str, str] | None = None,
    change: Callable[[int, dict[int, dict[str, torch.Tensor]]], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Writes a checkpoint as GPT-NeoX and DeepSpeed lay it out.

    Args:
        folder: what `save` would name.
        model: the model.
        tp, pp: the layout.
        vocab_file: the tokenizer that the settings name.
        iteration: the iteration.
        configs: YAML files by name, by default one with all settings.
        change: called with each rank and its layers before they are written, to change them.

    Returns:
        the Hugging Face tensors, padding rows included.
    """
    hf = model.tensors(model.rows(tp))
    step = folder / f"global_step{iteration}"
    (step / "configs").mkdir(parents=True)
    if configs is None:
        configs = {"all.yml": yaml.safe_dump(model.yaml(tp, pp, vocab_file))}
    for name, text in configs.items():
        (step / "configs" / name).write_text(text)
    states = {
        "dp_world_size": 1,
        "mp_world_size": tp * max(pp, 1),
        "ds_config": {"train_batch_size": 4, "fp16": {"enabled": False}},
        "iteration": iteration,
        "args": {"num_layers": model.layers, "model_parallel_size": tp},
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
    }
    for rank in range(tp):
        layers = rank_layers(model, hf, tp, rank)
        if change:
            change(rank, layers)
        if pp:
            for index, layer in layers.items():
                torch.save(layer, step / f"layer_{index:02d}-model_{rank:02d}-model_states.pt")
        else:
            module = {
                f"sequential.{index}.{name}": tensor
                for index, layer in layers.items()
                for name, tensor in layer.items()
            }
            torch.save({"module": module, **states}, step / f"mp_rank_{rank:02d}_model_states.pt")
    for rank in range(tp * pp):
        torch.save({"module": None, **states}, step / f"mp_rank_{rank:02d}_model_states.pt")
    (folder / "latest").write_text(step.name)
    return hf
