"""Published drafts computed straight from config.json and tensors, one query at a time: the formulas and nothing else.

Nothing of the package is used, so that a reading of a format is held against a second one. Sources as in
specbench/checkpoints/formats.py. `w` are tensors under the names of DeepSpec, `c` flat facts with nothing left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def frequencies(theta: float, d: int, scaling: dict | None) -> tuple[list[float], float]:
    """Radians a position of each pair of dimensions, and the factor on cosine and sine."""
    plain = [theta ** (-2 * i / d) for i in range(d // 2)]
    if scaling is None:
        return plain, 1.0
    factor, old = scaling["factor"], scaling.get("original_max_position_embeddings")
    if scaling["rope_type"] == "linear":
        return [f / factor for f in plain], 1.0
    if scaling["rope_type"] == "llama3":
        found = []
        for f in plain:
            wavelength = 2 * math.pi / f
            smooth = (old / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            if wavelength < old / scaling["high_freq_factor"]:
                found.append(f)
            elif wavelength > old / scaling["low_freq_factor"]:
                found.append(f / factor)
            else:
                found.append((1 - smooth) * f / factor + smooth * f)
        return found, 1.0

    def turning(rotations: float) -> float:
        return d * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(turning(32)), 0), min(math.ceil(turning(1)), d - 1)
    high = high + 0.001 if low == high else high
    ramps = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(d // 2)]
    found = [f / factor * ramp + f * (1 - ramp) for f, ramp in zip(plain, ramps, strict=True)]
    return found, scaling.get("attention_factor") or 0.1 * math.log(factor) + 1


def rope(x: Tensor, position: int, c: dict) -> Tensor:
    """x (heads, d): dimension i and i + d/2 turn by position times the pair's frequency."""
    d = x.shape[-1]
    turns, factor = frequencies(c["rope_theta"], d, c.get("rope_scaling"))
    angle = position * torch.tensor(turns)
    a, b, cos, sin = x[:, : d // 2], x[:, d // 2 :], angle.cos() * factor, angle.sin() * factor
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def linear(w: dict, name: str, x: Tensor) -> Tensor:
    y = w[f"{name}.weight"] @ x
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def act(name: str, x: Tensor) -> Tensor:
    if name == "silu":
        return x * torch.sigmoid(x)
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def heads(c: dict, w: dict, at: str, kind: str, y: Tensor, position: int) -> Tensor:
    """Queries, keys or values (heads, d) of one position."""
    x = linear(w, f"{at}.self_attn.{kind}_proj", y).view(-1, c["head_dim"])
    if kind == "v":
        return x
    norm = f"{at}.self_attn.{kind}_norm.weight"
    if norm in w:
        x = rms(x, w[norm], c["rms_norm_eps"])
    return rope(x, position, c)


def attention(c: dict, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    group = c["num_attention_heads"] // c["num_key_value_heads"]
    out = []
    for h, q in enumerate(query):
        scores = torch.stack([k[h // group] @ q for k in keys]) / math.sqrt(c["head_dim"])
        share = torch.softmax(scores, 0)
        out.append(sum(s * v[h // group] for s, v in zip(share, values, strict=True)))
    return torch.cat(out)


def mlp(c: dict, w: dict, at: str, x: Tensor) -> Tensor:
    gate = act(c["hidden_act"], linear(w, f"{at}.mlp.gate_proj", x))
    return linear(w, f"{at}.mlp.down_proj", gate * linear(w, f"{at}.mlp.up_proj", x))


def head(c: dict, w: dict, hidden: Tensor) -> Tensor:
    table = w["embed_tokens.weight"] if c.get("tie_word_embeddings") else w["lm_head.weight"]
    logits = table @ hidden * c.get("output_multiplier", 1.0)
    cap = c.get("final_logit_softcapping")
    return logits if not cap else torch.tanh(logits / cap) * cap


def eagle3(c: dict, w: dict, taps: Tensor, tokens: Tensor, anchor: int, steps: int) -> Tensor:
    """Logits (steps, W) of the chain that starts from the target states before `anchor`; taps (T, C, D)."""
    eps, at = c["rms_norm_eps"], "layers.0"

    def fused(t: int) -> Tensor:
        parts = list(taps[t])
        if c.get("fc_norm"):
            parts = [rms(part, w[f"fc_norm.{i}.weight"], eps) for i, part in enumerate(parts)]
        joined = torch.cat(parts)
        if c.get("norm_before_fc"):
            joined = rms(joined, w["input_norm.weight"], eps)
        return w["fc.weight"] @ joined

    def paired(feature: Tensor, token: int) -> Tensor:
        embedding = w["embed_tokens.weight"][token]
        normed = rms(feature, w[f"{at}.hidden_norm.weight"], eps)
        return torch.cat([rms(embedding, w[f"{at}.input_layernorm.weight"], eps), normed])

    entries = []
    for t in range(anchor):
        y = paired(fused(t), int(tokens[t + 1]))
        entries.append((t, heads(c, w, at, "k", y, t), heads(c, w, at, "v", y, t)))
    feature, logits = fused(anchor - 1), []
    for k in range(steps):
        position = anchor - 1 + k
        y = paired(feature, int(tokens[anchor + k]))
        if k > 0:
            entries.append((position, heads(c, w, at, "k", y, position), heads(c, w, at, "v", y, position)))
        window = c.get("sliding_window") or 10**9
        seen = [(key, value) for p, key, value in entries if position - p < window]
        mixed = attention(c, heads(c, w, at, "q", y, position), *map(list, zip(*seen, strict=True)))
        residual = rms(feature, w[f"{at}.hidden_norm.weight"], eps) if c.get("norm_before_residual") else feature
        x = residual + linear(w, f"{at}.self_attn.o_proj", mixed)
        x = x + mlp(c, w, at, rms(x, w[f"{at}.post_attention_layernorm.weight"], eps))
        normed = rms(x, w["norm.weight"], eps)
        logits.append(head(c, w, normed))
        feature = normed if c.get("norm_output") else x
    return torch.stack(logits)


def eagle1(c: dict, w: dict, last: Tensor, tokens: Tensor, anchor: int, steps: int) -> Tensor:
    """Logits (steps, W) of the chain that starts from the target's last states (T, D) before `anchor`."""
    at = "layers.0"

    def joined(feature: Tensor, token: int) -> Tensor:
        return linear(w, "fc", torch.cat([w["embed_tokens.weight"][token], feature]))

    entries = []
    for t in range(anchor):
        y = joined(last[t], int(tokens[t + 1]))
        entries.append((heads(c, w, at, "k", y, t), heads(c, w, at, "v", y, t)))
    feature, logits = last[anchor - 1], []
    for k in range(steps):
        position = anchor - 1 + k
        y = joined(feature, int(tokens[anchor + k]))
        if k > 0:
            entries.append((heads(c, w, at, "k", y, position), heads(c, w, at, "v", y, position)))
        mixed = attention(c, heads(c, w, at, "q", y, position), *map(list, zip(*entries, strict=True)))
        x = y + linear(w, f"{at}.self_attn.o_proj", mixed)
        feature = x + mlp(c, w, at, rms(x, w[f"{at}.post_attention_layernorm.weight"], c["rms_norm_eps"]))
        logits.append(head(c, w, feature))
    return torch.stack(logits)


def p_eagle(c: dict, w: dict, taps: Tensor, tokens: Tensor, anchor: int, slots: int) -> Tensor:
    """Logits (slots, W) of the rollout from the target states before `anchor`; taps (T, C, D). The rows are every
    position before the anchor, with its taps and the token after it, and slots - 1 masks; each sees the rows up to
    itself."""
    eps = c["rms_norm_eps"]
    inputs = [(taps[t].flatten(), int(tokens[t + 1])) for t in range(anchor)]
    inputs += [(w["mask_hidden"].flatten(), c["mask_token_id"])] * (slots - 1)
    x, embeddings = [], []
    for joined, token in inputs:
        if c.get("fc_norm"):
            parts = joined.chunk(taps.shape[1])
            joined = torch.cat([rms(part, w[f"fc_norm.{i}.weight"], eps) for i, part in enumerate(parts)])
        if c.get("norm_before_fc"):
            joined = rms(joined, w["input_norm.weight"], eps)
        x.append(w["fc.weight"] @ joined)
        embeddings.append(w["embed_tokens.weight"][token])
    for i in range(c["num_hidden_layers"]):
        at = f"layers.{i}"
        y, residual = [], list(x)
        for j, row in enumerate(x):
            normed = rms(row, w[f"{at}.{'input_layernorm' if i else 'hidden_norm'}.weight"], eps)
            if i == 0 and c.get("norm_before_residual"):
                residual[j] = normed
            if i == 0:
                normed = torch.cat([rms(embeddings[j], w[f"{at}.input_layernorm.weight"], eps), normed])
            y.append(normed)
        keys = [heads(c, w, at, "k", row, j) for j, row in enumerate(y)]
        values = [heads(c, w, at, "v", row, j) for j, row in enumerate(y)]
        for j, row in enumerate(y):
            mixed = attention(c, heads(c, w, at, "q", row, j), keys[: j + 1], values[: j + 1])
            z = residual[j] + linear(w, f"{at}.self_attn.o_proj", mixed)
            x[j] = z + mlp(c, w, at, rms(z, w[f"{at}.post_attention_layernorm.weight"], eps))
    return torch.stack([head(c, w, rms(row, w["norm.weight"], eps)) for row in x[anchor - 1 :]])


def block(c: dict, w: dict, taps: Tensor, anchor_token: int, anchor: int) -> Tensor:
    """Logits (inputs - 1, V) of a block whose masks predict; taps (T, C, D)."""
    tokens = [anchor_token] + [c["mask_token_id"]] * (c["block_size"] - 1)
    return torch.stack([head(c, w, row) for row in block_states(c, w, taps, tokens, anchor)[1:]])


def block_states(c: dict, w: dict, taps: Tensor, tokens: list[int], anchor: int) -> list[Tensor]:
    """Normed final states (D) of the inputs `tokens` of a block at `anchor`; taps (T, C, D)."""
    eps = c["rms_norm_eps"]
    context = [rms(w["fc.weight"] @ taps[t].flatten(), w["hidden_norm.weight"], eps) for t in range(anchor)]
    x = [w["embed_tokens.weight"][token] * c.get("input_embedding_scale", 1.0) for token in tokens]
    for i in range(c["num_hidden_layers"]):
        at = f"layers.{i}"
        slides = (c.get("layer_types") or ["sliding_attention"] * (i + 1))[i] == "sliding_attention"
        window = c.get("sliding_window") or 10**9 if slides else 10**9
        causal = c["causal"] and (slides or not c.get("sliding_window"))
        y = [rms(row, w[f"{at}.input_layernorm.weight"], eps) for row in x]
        rows = [(t, row) for t, row in enumerate(context)] + [(anchor + j, row) for j, row in enumerate(y)]
        entries = [(p, heads(c, w, at, "k", row, p), heads(c, w, at, "v", row, p)) for p, row in rows]
        out = []
        for j, row in enumerate(y):
            here = anchor + j
            seen = [(k, v) for p, k, v in entries if here - p < window and (p <= here or not causal)]
            mixed = attention(c, heads(c, w, at, "q", row, here), *map(list, zip(*seen, strict=True)))
            z = x[j] + linear(w, f"{at}.self_attn.o_proj", mixed)
            out.append(z + mlp(c, w, at, rms(z, w[f"{at}.post_attention_layernorm.weight"], eps)))
        x = out
    return [rms(row, w["norm.weight"], eps) for row in x]


def two_taps(w: dict, name: str, side: int, read: list[Tensor], values: list[Tensor], group: int) -> list[Tensor]:
    """One convolution of DFlash2, channel by channel."""
    base, changing = w[f"{name}.base_kernel"], w[f"{name}.kernel_projection.weight"]
    groups, out = len(values[0]) // group, []
    for t, row in enumerate(values):
        before = values[t - 1] if t > 0 else torch.zeros_like(row)
        made = []
        for channel in range(len(row)):
            at = side * 2 * groups + channel // group
            own, other = (changing[at + tap * groups] @ read[t] for tap in (0, 1))
            own, other = own + base[side, 0, channel], other + base[side, 1, channel]
            made.append(own * row[channel] + other * before[channel])
        out.append(torch.stack(made))
    return out


def dflash2_states(c: dict, w: dict, taps: Tensor, tokens: list[int], anchor: int) -> list[Tensor]:
    """Normed final states (D) of a block whose layers convolve; every slot sees the whole block."""
    eps, group = c["rms_norm_eps"], c["conv_group_size"]
    context = [rms(w["fc.weight"] @ taps[t].flatten(), w["hidden_norm.weight"], eps) for t in range(anchor)]
    x = [w["embed_tokens.weight"][token] for token in tokens]
    for i in range(c["num_hidden_layers"]):
        at = f"layers.{i}"
        read = [rms(row, w[f"{at}.input_layernorm.weight"], eps) for row in x]
        y = two_taps(w, f"{at}.attention_conv", 0, read, read, group)
        rows = [*enumerate(context), *((anchor + j, row) for j, row in enumerate(y))]
        keys, values = ([heads(c, w, at, kind, row, p) for p, row in rows] for kind in "kv")
        seen = [attention(c, heads(c, w, at, "q", row, anchor + j), keys, values) for j, row in enumerate(y)]
        out = [linear(w, f"{at}.self_attn.o_proj", row) for row in seen]
        x = [a + b for a, b in zip(x, two_taps(w, f"{at}.attention_conv", 1, read, out, group), strict=True)]
        read = [rms(row, w[f"{at}.post_attention_layernorm.weight"], eps) for row in x]
        out = [mlp(c, w, at, row) for row in two_taps(w, f"{at}.mlp_conv", 0, read, read, group)]
        x = [a + b for a, b in zip(x, two_taps(w, f"{at}.mlp_conv", 1, read, out, group), strict=True)]
    return [rms(row, w["norm.weight"], eps) for row in x]


def selected(w: dict, hidden: Tensor, base: Tensor, before: int, count: int) -> dict[int, float]:
    """Scores of DFlash2's candidates, by token."""
    chosen = sorted(range(len(base)), key=lambda token: -float(base[token]))[:count]
    gate = w["candidate_selector.predecessor_codebook"][before] * (
        w["candidate_selector.hidden_projection.weight"] @ hidden
    )
    return {b: float(base[b] + w["candidate_selector.successor_codebook"][b] @ gate) for b in chosen}
