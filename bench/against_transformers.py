"""A full-size model on the GPU here against transformers on the same GPU, layer by layer.

    python bench/against_transformers.py ARTIFACT [--tokens 512] [--seed 0]

ARTIFACT has random weights. First a process of its own makes the same weights, dequantised to bf16, gives them to
transformers' GptOssForCausalLM and keeps what one prompt leaves: the residual stream behind every layer, the router's logits
and the logits of the last token. Then the artifact's extend step runs on that prompt, launch by launch, each layer on what
transformers computed before it, so that an error is seen in the layer that makes it. Printed are, for each layer, the
tokens that were routed otherwise, with the largest gap in transformers' logits between an expert left out and one taken (a
near tie, or a fault), and the worst and mean cosine over the others; then the Kullback-Leibler divergence of the next
token's distribution. A table, then one JSON line. The process that runs the artifact needs neither PyTorch nor Triton.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gpu import NEAR_TIE, cosines

from gptoss_compile.artifact import Artifact
from gptoss_compile.config import ModelConfig
from gptoss_compile.launch_plan import Step
from gptoss_compile.random_weights import round_bf16, widen_bf16
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.timing import prompt_chunks

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, Any]
PIECE = 1 << 26  # words of random weights at a time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)  # in the process that runs transformers
    options = parser.parse_args()
    try:
        artifact = Artifact.open(options.artifact)
        if not artifact.weights.startswith("random:"):
            raise ValueError(f"{options.artifact} has stored weights; compile it with --weights random:SEED")
        tokens = np.random.default_rng(options.seed).integers(0, artifact.config.vocab_size, options.tokens)
        if options.reference:
            reference(artifact, tokens, options.reference)
            return 0
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "reference.npz"
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--reference", str(path)], check=True)
            with np.load(path) as arrays:
                result = compare(artifact, tokens, dict(arrays))
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"against_transformers: error: {error}", file=sys.stderr)
        return 2
    show(result)
    imported = sorted({"torch", "triton"} & set(sys.modules))
    print(json.dumps({"bench": "against_transformers", "imported": imported, **result}))
    return 0 if result["good"] else 1


# transformers ---------------------------------------------------------------------------------------------------------


def reference(artifact: Artifact, tokens: Array, path: Path) -> None:
    """Write `hidden` [L, T, H] and `router` [L, T, E] in fp32 and `logits` [V] of transformers' model in bf16."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    from gptoss_compile.demo import huggingface_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = huggingface_config(artifact.config)
    data.pop("quantization_config", None)
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**data, attn_implementation="eager", experts_implementation="eager"))
    model = model.to(torch.bfloat16).eval()
    state = dict(huggingface_weights(artifact.config, int(artifact.weights.partition(":")[2]), device))
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not missing and not unexpected, f"transformers' model has other weights: {missing}, {unexpected}"
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)  # its buffers are no weights
    hidden: list[Tensor] = []
    router: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: hidden.append(out[0] if isinstance(out, tuple) else out))
        gate = layer.mlp.router

        def keep(_: Any, inputs: tuple[Tensor, ...], __: Any, gate: Any = gate) -> None:
            router.append(torch.nn.functional.linear(inputs[0].reshape(-1, gate.weight.shape[1]), gate.weight, gate.bias))

        gate.register_forward_hook(keep)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)[None].to(device), logits_to_keep=1).logits[0, -1]
    np.savez(path, hidden=torch.stack([h.reshape(len(tokens), -1) for h in hidden]).float().cpu().numpy(),
             router=torch.stack(router).float().cpu().numpy(), logits=logits.float().cpu().numpy())


def huggingface_weights(config: ModelConfig, seed: int, device: str) -> Iterator[tuple[str, Tensor]]:
    """The artifact's random weights under transformers' names, experts dequantised."""
    from dataclasses import replace

    import torch

    from gptoss_compile.dialect import mxfp4_dequantize
    from gptoss_compile.layouts import placements
    from gptoss_compile.logical import logical_tensors

    tensors = logical_tensors(config)
    places = placements(replace(config, expert_format="bf16"), "huggingface")
    for name, place in places.items():
        base, _, kind = name.rpartition(".")
        if kind == "weight" and f"{base}.blocks" in tensors:
            blocks, scales = (random_tensor(f"{base}.{part}", tensors[f"{base}.{part}"].shape, "u8", seed, device)
                              for part in ("blocks", "scales"))
            value = torch.stack([mxfp4_dequantize(b, s, torch.bfloat16) for b, s in zip(blocks, scales, strict=True)])
        else:
            value = random_tensor(name, tensors[name].shape, "bf16", seed, device)
        yield place.name, value.transpose(-1, -2).contiguous() if place.transposed else value


def random_tensor(name: str, shape: tuple[int, ...], dtype: str, seed: int, device: str) -> Tensor:
    """`random_weights.random_values`, made on a device by the definition that the GPU's kernel has too."""
    import torch

    from gptoss_compile.kernels.generate import generated
    from gptoss_compile.random_weights import device_parameters

    known = device_parameters(name, shape, dtype, seed)
    row = torch.from_numpy(known.row(0)).to(device)
    pieces = [generated(row, at, min(at + PIECE, known.counters)) for at in range(0, known.counters, PIECE)]
    flat = torch.cat(pieces).view(torch.uint8 if dtype == "u8" else torch.bfloat16)
    return flat[: int(np.prod(shape))].view(shape)


# the artifact ---------------------------------------------------------------------------------------------------------


def compare(artifact: Artifact, tokens: Array, wanted: dict[str, Array]) -> dict[str, Any]:
    """Runs the artifact's extend step on the prompt and holds every layer against the reference."""
    executor = CudaExecutor.load(artifact, num_pages=-(-artifact.max_context // artifact.page_size) + 1, max_num_seqs=1)
    layers: list[dict[str, Any]] = []
    chosen: list[Array] = []
    count = len(tokens)
    try:
        buckets = [b for b in artifact.buckets if b.kind == "extend" and b.tokens >= count]
        if not buckets:
            raise ValueError(f"no extend bucket of {artifact.path} takes {count} tokens at once")
        ((bucket, inputs),) = prompt_chunks(executor, count, [min(buckets, key=lambda b: b.tokens)])
        inputs["tokens"][:count] = tokens

        def watch(rank: int, _: int, step: Step) -> None:
            if step.op == "norm_route":
                chosen.append(executor.read(bucket, step.outputs[1])[:count])
            elif step.op.startswith("moe_") and step.op != "moe_gate_up":
                stream = executor.read(bucket, step.outputs[0])
                layers.append(layer_row(len(layers), widen_bf16(stream[:count]), chosen[-1], wanted))
                stream[:count] = round_bf16(wanted["hidden"][len(layers) - 1])
                executor.write(bucket, step.outputs[0], stream)

        logits = executor.run_steps(bucket, inputs, watch)[0].astype(np.float64)
        name = executor.device_name
    finally:
        executor.close()
    divergence = kl(wanted["logits"].astype(np.float64), logits)
    same = int(logits.argmax()) == int(wanted["logits"].argmax())
    good = min(row["cosine"] for row in layers) >= 0.999 and max(row["gap"] for row in layers) <= NEAR_TIE
    return {"artifact": artifact.path.name, "gpu": name, "tokens": count, "layers": layers, "kl": divergence,
            "same_token": same, "good": good}


def layer_row(layer: int, stream: Array, chosen: Array, wanted: dict[str, Array]) -> dict[str, Any]:
    cosine = cosines(stream, wanted["hidden"][layer])
    router = wanted["router"][layer]
    best = np.argsort(-router, axis=1, kind="stable")[:, : chosen.shape[1]]
    differ = [t for t in range(len(chosen)) if set(chosen[t]) != set(best[t])]
    gaps = [max(router[t, list(set(best[t]) - set(chosen[t]))]) - min(router[t, list(set(chosen[t]) - set(best[t]))])
            for t in differ]
    alike = np.delete(cosine, differ)
    return {"layer": layer, "cosine": float(alike.min()), "mean_cosine": float(alike.mean()), "differ": len(differ),
            "gap": float(max(gaps, default=0.0))}


def kl(wanted: Array, found: Array) -> float:
    """Σ p log(p / q) of the distributions that two vectors of logits give."""
    p, q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (wanted, found))
    return float((np.exp(p) * (p - q)).sum())


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['artifact']} on {result['gpu']} against transformers, {result['tokens']} tokens")
    print(f"  {'layer':>5} {'worst cosine':>12} {'mean':>10} {'routed otherwise':>16} {'largest gap':>11}")
    for row in result["layers"]:
        print(f"  {row['layer']:5} {row['cosine']:12.6f} {row['mean_cosine']:10.7f} {row['differ']:16} {row['gap']:11.4f}")
    likeliest = "the same likeliest one" if result["same_token"] else "another likeliest one"
    print(f"  next token: KL {result['kl']:.2e}, {likeliest}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
